"""The files of the disk tier: what is written can be read, and nothing else is ever taken for a segment."""

from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path

import pytest
import safetensors.numpy

from jamba_server.engine.cache.tiers.events import Event, Ignored, Lost, Written
from jamba_server.engine.cache.tiers.segment import Segment
from jamba_server.engine.disk_tier import folder as module
from jamba_server.engine.disk_tier.folder import ABANDONED_SECONDS, collect, files_in
from jamba_server.engine.disk_tier.format import BadSegment
from tests.engine.tiers.files import conversation, open_folder, segment
from tests.engine.tiers.kills import kill_writers
from tests.engine.tiers.simulated import ManualWorker


def same(one: Segment, other: Segment) -> bool:
    tensors = {name: bytes(data) for name, data in one.tensors.items()}
    return (one.entry, one.tokens, tensors) == (
        other.entry,
        other.tokens,
        {n: bytes(d) for n, d in other.tensors.items()},
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "cache")
    written = list(conversation(1, 6))
    for part in written:
        folder.write(part)
    assert all(same(folder.read(part.entry), part) for part in written)
    found, gone = open_folder(tmp_path / "cache").scan(lambda path, error: pytest.fail(str(error)))
    assert (sorted(found, key=lambda e: e.end), gone) == ([part.entry for part in written], [])
    [path] = {file.path for file in files_in(tmp_path / "cache") if file.path.name.startswith(written[0].key.hex())}
    tensors = safetensors.numpy.load_file(path)
    assert tensors["tokens"].tolist() == list(written[0].tokens)
    assert tensors["kv"].tobytes() == bytes(written[0].tensors["kv"])


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "cache")
    folder.write(segment([1, 2, 3, 4, 5], 0, salt="a secret"))
    [file] = files_in(tmp_path / "cache")
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert [stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "cache", file.path.parent)] == [0o700, 0o700]
    assert b"a secret" not in file.path.read_bytes()


def test_every_byte_counts(tmp_path: Path) -> None:
    """A change of any byte, an end at any byte and a byte too many are found, when the header or the file is read."""
    folder = open_folder(tmp_path)
    part = [*conversation(2, 2)][1]
    folder.write(part)
    path = folder.path_of(part.key)
    good = path.read_bytes()
    damaged = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(len(good))]
    damaged += [good[:i] for i in range(0, len(good), 7)] + [good + b"\0"]
    reasons: set[str] = set()
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(BadSegment) as caught:
            folder.read(part.entry)
        reasons.add(caught.value.reason)
    assert reasons == {"torn", "edited", "foreign"}
    path.write_bytes(good)
    assert same(folder.read(part.entry), part)


def test_what_is_no_segment_is_ignored_once(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    part, other = segment([1, 2, 3, 4, 5], 0), segment([1, 2, 3, 4, 6], 0)
    foreign = open_folder(tmp_path, model=1)
    foreign.write(other)
    folder.path_of(part.key).write_bytes(foreign.path_of(other.key).read_bytes())  # of another model
    os.mkfifo(folder.path_of(other.key))
    folder.path_of(b"\1" * 32).symlink_to("/etc/passwd")
    folder.path_of(b"\2" * 32).mkdir()
    folder.path_of(b"\3" * 32).write_bytes(b"\0" * 100)
    (folder.path / "notes.safetensors").write_bytes(b"hello, this is text")
    reported: list[str] = []
    for _ in range(2):
        found, _ = folder.scan(lambda path, error: reported.append(error.reason))
        assert found == []
    assert sorted(reported) == ["foreign"] * 5 + ["unreadable"]
    folder.write(part)
    with pytest.raises(BadSegment):
        folder.read(part.entry)
    folder.write(part, replace=True)
    assert same(folder.read(part.entry), part)


def test_the_end_of_a_conversation_goes_first(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    chains = [list(conversation(seed, 4)) for seed in (1, 2)]
    for parts in chains:
        for i, part in enumerate(parts):
            folder.write(part)
            folder.touch([p.key for p in reversed(parts[: i + 1])])
    order = [p.key.hex() for parts in chains for p in reversed(parts)]
    sizes = {file.path.stem: file.num_bytes for file in files_in(tmp_path)}
    left = sum(sizes.values())
    for name in order:
        left -= sizes[name]
        usage, deleted = collect(tmp_path, left)
        assert [path.stem for path in deleted] == [name]
        assert usage.num_bytes == left


def test_an_open_file_outlives_its_deletion(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    part = segment([*range(50)], 0)
    folder.write(part)
    with module.opened(folder.path_of(part.key)) as file:
        collect(tmp_path, 0)
        assert files_in(tmp_path) == []
        header = module.read_header(file)
        assert same(module.read_tensors(file, header), part)
    with pytest.raises(BadSegment, match="gone"):
        folder.read(part.entry)


def test_unfinished_files_are_deleted_when_their_writer_is_gone(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    (folder.path / "aa-1-bb.part").write_bytes(b"12345")
    assert collect(tmp_path, 10**6)[0].num_files == 1
    assert collect(tmp_path, 10**6, now=time.time() + ABANDONED_SECONDS + 60)[1] == [folder.path / "aa-1-bb.part"]


@pytest.mark.parametrize("call", ["writev", "rename", "open"])
def test_a_full_disk(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is left of what could not be written, and one line in the log says so. Later it works again."""
    folder = open_folder(tmp_path)
    worker = ManualWorker(folder)
    parts = list(conversation(3, 3))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        for part in parts[:2]:
            worker.write(part, replace=False)
            worker.run()
    failed: list[Event] = [Written(part.key, 0, failed=True) for part in parts[:2]]
    assert worker.events == failed
    assert len(caplog.records) == 1
    assert files_in(tmp_path) == []
    worker.write(parts[2], replace=False)
    worker.run()
    assert same(folder.read(parts[2].entry), parts[2])


def test_a_file_that_cannot_be_synchronised_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = open_folder(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    first, second = conversation(3, 2)
    folder.write(first)
    with monkeypatch.context() as patch:

        def fail(descriptor: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        patch.setattr(os, "fsync", fail)
        assert folder.synchronise() == [first.key]
    assert files_in(tmp_path) == []
    folder.write(second)
    folder.write(second, replace=True)
    assert folder.synchronise() == []
    assert same(folder.read(second.entry), second)
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_are_synchronised_before_too_many_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised: list[int] = []
    monkeypatch.setattr(os, "fsync", synchronised.append)
    folder = open_folder(tmp_path)
    for seed in range(20):
        for part in conversation(seed, 2):
            folder.write(part)
    assert len(synchronised) == 33, "32 files and the folder"
    folder.synchronise()
    assert len(synchronised) == 33 + 9


def test_no_lost_file_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that cannot be synchronised in the middle of a burst are reported, too."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    folder = open_folder(tmp_path)
    parts = [part for seed in range(20) for part in conversation(seed, 2)]
    for part in parts:
        folder.write(part)
    assert folder.synchronise() == [part.key for part in parts]
    assert folder.synchronise() == [] == files_in(tmp_path)


def test_a_small_budget(tmp_path: Path) -> None:
    """The tier never has more than its budget, and segments that do not fit at all are refused."""
    folder = open_folder(tmp_path, max_bytes=25_000)
    worker = ManualWorker(folder)
    for seed in range(20):
        for part in conversation(seed, 3):
            worker.write(part, replace=False)
            worker.run()
            assert sum(file.num_bytes for file in files_in(tmp_path)) <= 25_000
    assert any(isinstance(event, Lost) for event in worker.events)
    small = ManualWorker(open_folder(tmp_path / "small", max_bytes=100))
    small.write(segment([1, 2], 0), replace=False)
    small.run()
    assert [event.failed for event in small.events if isinstance(event, Written)] == [True]


def test_a_damaged_file_is_counted(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    part = segment([1, 2, 3], 0)
    folder.write(part)
    folder.path_of(part.key).write_bytes(b"{}")
    worker = ManualWorker(open_folder(tmp_path))
    worker.scan()
    assert worker.events[:2] == [Ignored("torn"), Lost((part.key,), bad=True)]


def test_writers_that_are_killed_leave_whole_files(tmp_path: Path) -> None:
    counts = kill_writers(tmp_path, 6, seed=1)
    assert counts["kills"] == 6
    assert counts["whole"] > 0
