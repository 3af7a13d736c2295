"""The segments of a prompt: their keys, whether a folder has them, and files that come from another server."""

from __future__ import annotations

from pathlib import Path

import pytest

from jamba_server.engine.cache.tiers.segment import Segment
from jamba_server.engine.disk_tier.folder import Usage, private_file
from jamba_server.engine.disk_tier.format import BadSegment
from jamba_server.engine.disk_tier.prompt_segments import PromptKeys, has_prefix, take_file
from tests.engine.tiers.files import BLOCK_SIZE, open_folder, segment

TOKENS = [(7 * i) % 1000 for i in range(40)]
ENDS = (7, 12, 13, 30)


def parts(salt: str = "a") -> list[Segment]:
    return [segment(TOKENS[:end], start, salt=salt) for start, end in zip((0, *ENDS[:-1]), ENDS, strict=True)]


def test_the_keys_are_those_of_the_engine(tmp_path: Path) -> None:
    keys = PromptKeys(TOKENS, "a", open_folder(tmp_path).layout)
    assert len(keys) == len(TOKENS)
    assert [keys.entry(part.entry.start, part.entry.end) for part in parts()] == [part.entry for part in parts()]
    assert keys.at(30) != PromptKeys(TOKENS, "b", open_folder(tmp_path).layout).at(30)


def test_a_folder_has_a_prefix_if_it_has_all_of_its_segments(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    keys = PromptKeys(TOKENS, "a", folder.layout)
    assert not has_prefix(folder, keys, 1)
    assert has_prefix(folder, keys, 0)
    for part in parts():
        folder.write(part)
    assert has_prefix(folder, keys, 30)
    assert not has_prefix(folder, keys, 31)
    assert has_prefix(folder, PromptKeys(TOKENS[:20], "a", folder.layout), 13)
    assert not has_prefix(folder, PromptKeys(TOKENS, "b", folder.layout), 1)
    folder.path_of(parts()[1].key).unlink()
    assert not has_prefix(folder, keys, 8)
    assert has_prefix(folder, keys, 7)


def sent(tmp_path: Path, part: Segment, *, model: int = 0) -> bytes:
    one = open_folder(tmp_path / "one", model=model)
    one.write(part)
    return one.path_of(part.key).read_bytes()


def test_a_file_that_comes_is_checked_and_kept(tmp_path: Path) -> None:
    other, part = open_folder(tmp_path / "other"), parts()[1]
    path = other.unfinished(part.key)
    content = sent(tmp_path, part)
    with private_file(path) as file:
        file.write(content)
    take_file(other, path, part.entry)
    assert not path.exists()
    assert other.usage == Usage(len(content), 1)
    read = other.read(part.entry)
    assert (read.tokens, read.tensors) == (part.tokens, part.tensors)
    with private_file(path) as file:
        file.write(content)
    take_file(other, path, part.entry)
    assert other.usage == Usage(len(content), 1), "it was there already"


@pytest.mark.parametrize("place", [0, 40, -1])
def test_a_change_of_a_byte_is_found(tmp_path: Path, place: int) -> None:
    other, part = open_folder(tmp_path / "other"), parts()[1]
    content, path = bytearray(sent(tmp_path, part)), other.unfinished(part.key)
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadSegment):
        take_file(other, path, part.entry)
    assert other.keys() == set()


def test_another_segment_or_model_is_refused(tmp_path: Path) -> None:
    other, part = open_folder(tmp_path / "other"), parts()[1]
    stranger = segment([*range(500, 500 + BLOCK_SIZE)], 0, salt="a")
    for content, words in (
        (sent(tmp_path, stranger), "not the segment that was asked for"),
        (sent(tmp_path, parts("b")[1]), "not the segment that was asked for"),
        (sent(tmp_path / "model", part, model=2), "another model or configuration"),
    ):
        path = other.unfinished(part.key)
        path.write_bytes(content)
        with pytest.raises(BadSegment, match=words):
            take_file(other, path, part.entry)
    assert other.keys() == set()


def test_usage_counts_what_others_have_written(tmp_path: Path) -> None:
    """Otherwise two servers would together keep twice the limit."""
    one, other = open_folder(tmp_path), open_folder(tmp_path)
    one.write(parts()[0])
    other.open()
    before = other.usage
    other.scan(lambda path, error: pytest.fail(str(error)))
    assert other.usage == before, "`open` has counted the file"
    one.write(parts()[1])
    other.scan(lambda path, error: pytest.fail(str(error)))
    assert other.usage.num_files == 2
    assert other.usage.num_bytes > before.num_bytes
