"""The engine process and its parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.core import Inbox
from jamba_server.engine.process.__main__ import read
from jamba_server.engine.process.child import Child
from jamba_server.engine.process.heartbeat import MIN_PROCESSOR_SECONDS, Heartbeat, beating
from jamba_server.engine.process.wire import HEADER_BYTES, MAX_FRAME_BYTES, body_bytes, pack, receive
from jamba_server.engine.types import Abort, Failed, FromEngine, ToEngine


def test_a_parent_killed_before_it_read_our_last_message_ends_the_engine() -> None:
    ours, theirs = socket.socketpair()
    stop, inbox = threading.Event(), Inbox()
    with theirs:
        theirs.sendall(b"unread")  # which makes the close a reset
        ours.close()
        read(theirs, inbox, stop)
    assert stop.is_set()
    inbox.wait()  # does not block: an idle engine is woken


def has_ended(pid: int) -> bool:
    """Whether there is no such process, or only its exit status is left."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot kill a process with its parent")
def test_an_engine_that_was_stopped_ends_with_its_parent() -> None:
    program = [
        "import os, signal, socket, subprocess, sys, time",
        "ours, theirs = socket.socketpair()",
        "command = [sys.executable, '-m', 'jamba_server.engine.process', str(theirs.fileno())]",
        "child = subprocess.Popen(command, pass_fds=[theirs.fileno()])",
        "status = f'/proc/{child.pid}/status'",
        # SIGTERM is number 15; the engine ignores it when it is about to read its configuration
        "ignored = lambda: int(open(status).read().partition('SigIgn:')[2].split()[0], 16)",
        "while not ignored() & 1 << 14: time.sleep(0.01)",
        "child.send_signal(signal.SIGSTOP)",
        "print(child.pid, flush=True)",
        "signal.pause()",
    ]
    with subprocess.Popen([sys.executable, "-c", "\n".join(program)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        assert not has_ended(engine)
        parent.kill()
    for _ in range(1000):
        if has_ended(engine):
            return
        threading.Event().wait(0.01)
    os.kill(engine, signal.SIGKILL)
    pytest.fail("the engine is an orphan")


# The bytes on the socket ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [b"oops! oops!", b"\0" * 20, pack(Abort(["a"]))[1:] + b"x"])
def test_bytes_that_are_no_frame_are_refused_at_once(garbage: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(garbage)
        with pytest.raises(ValueError, match="not the header of a frame"):
            receive(theirs, ToEngine)


def test_a_frame_with_another_message_is_refused() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(pack(Failed("why")) + pack(Failed("why")))
        assert receive(theirs, FromEngine) == Failed("why")
        with pytest.raises(msgspec.ValidationError):
            receive(theirs, ToEngine)


def test_a_length_beyond_the_limit_is_refused() -> None:
    header = pack(Failed(""))[:HEADER_BYTES]
    assert body_bytes(header) < 100
    with pytest.raises(ValueError, match="not the header"):
        body_bytes(header[:-4] + MAX_FRAME_BYTES.to_bytes(4, "little"))


# The heartbeat --------------------------------------------------------------------------------------------------


def test_only_a_process_that_works_beats() -> None:
    used = iter([10.0, 10.0, 10.0 + MIN_PROCESSOR_SECONDS / 2, 11.0, 11.0, 12.0])
    beats: list[int] = []
    heartbeat = Heartbeat(lambda: beats.append(1), used=lambda: next(used))
    counts: list[int] = []
    for _ in range(5):
        heartbeat.check()
        counts.append(len(beats))
    assert counts == [0, 0, 1, 1, 2]


def test_it_beats_until_the_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jamba_server.engine.process.heartbeat.BEAT_SECONDS", 0.001)
    monkeypatch.setattr("jamba_server.engine.process.heartbeat.MIN_PROCESSOR_SECONDS", 0.0)
    beaten = threading.Event()
    with beating(beaten.set):
        assert beaten.wait(30)
    beaten.clear()
    assert "heartbeat" not in {thread.name for thread in threading.enumerate()}


def test_a_parent_that_is_gone_ends_the_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jamba_server.engine.process.heartbeat.BEAT_SECONDS", 0.001)
    monkeypatch.setattr("jamba_server.engine.process.heartbeat.MIN_PROCESSOR_SECONDS", 0.0)
    beaten = threading.Event()

    def beat() -> None:
        beaten.set()
        raise BrokenPipeError

    with beating(beat):
        assert beaten.wait(30)


# Standard streams -----------------------------------------------------------------------------------------------

SHOW = """
import json, os, sys
from jamba_server.engine.process.standard_streams import open_missing_streams
open_missing_streams()
next_file = os.open(sys.argv[1], os.O_WRONLY)
print("lost"), sys.stderr.write("lost")
shown = {"links": [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)], "next": next_file, "read": sys.stdin.read()}
os.write(next_file, json.dumps(shown).encode())
"""


@pytest.mark.parametrize("closed", ["", "<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_missing_standard_streams_are_dev_null(closed: str, tmp_path: Path) -> None:
    shown = tmp_path / "shown"
    shown.touch()
    command = ["/bin/sh", "-c", f'exec "$0" -c "$1" "$2" {closed}', sys.executable, SHOW, str(shown)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    found = json.loads(shown.read_text())
    assert found["next"] > 2
    assert found["read"] == ""
    names = {"<&-": 0, ">&-": 1, "2>&-": 2}
    assert all(found["links"][names[one]] == os.devnull for one in closed.split())


async def test_the_engine_does_not_inherit_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("JAMBA_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HARMLESS"):
        monkeypatch.setenv(name, "value of a variable")
    file = tmp_path / "environment"
    program = f"import json, os; json.dump(dict(os.environ), open({str(file)!r}, 'w'))"
    child = await Child.spawn(EngineConfig(model="any"), (sys.executable, "-c", program))
    assert await child.close() == 0
    assert [name for name, value in json.loads(file.read_text()).items() if "value of" in value] == ["HARMLESS"]


async def test_a_child_whose_socket_cannot_be_used_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[asyncio.subprocess.Process] = []
    create = asyncio.create_subprocess_exec

    async def recorded(*arguments: Any, **settings: Any) -> asyncio.subprocess.Process:
        started.append(await create(*arguments, **settings))
        return started[-1]

    async def refuse(**_: Any) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", recorded)
    monkeypatch.setattr(asyncio, "open_connection", refuse)
    with pytest.raises(OSError, match="no memory"):
        await Child.spawn(EngineConfig(model="any"), (sys.executable, "-c", "import time; time.sleep(60)"))
    assert await asyncio.wait_for(started[0].wait(), 10) == -signal.SIGKILL
