"""Child: starts the engine process and talks to it over a socket pair.

A socket pair has no name in the file system, so no other process can connect to it, and no file is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

import jamba_server
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.process.deaths import oom_kills
from jamba_server.engine.process.place import WHOLE_MACHINE, Place
from jamba_server.engine.process.standard_streams import open_missing_streams
from jamba_server.engine.process.wire import HEADER_BYTES, body_bytes, pack
from jamba_server.engine.types import Shutdown

# The option -P keeps Python from importing modules of the current folder.
ENGINE_COMMAND = (
    sys.executable,
    "-P",
    "-m",
    "jamba_server.engine.process",
)
# These environment variables hold secrets. The engine process does not get them, because it does not need them.
SECRETS = frozenset({"JAMBA_API_KEY", "JAMBA_PREFILL_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})
CLOSE_SECONDS = 5.0  # a child that still runs this many seconds after it was told to end is killed
# A child with a disk tier gets this many seconds, in which it writes what is not on the disk yet.
DISK_CLOSE_SECONDS = 30.0


def process_environment(additions: Mapping[str, str] | None = None) -> dict[str, str]:
    """Returns the environment of a process of the engine: that of this process without secrets, and `additions`."""
    # The child must import the same jamba_server as this process.
    root = str(Path(jamba_server.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # With the policy PASSIVE torch's idle threads sleep. Otherwise torch's idle threads would occupy cores that the
    # threads of this project's CPU kernels need.
    inherited = {name: value for name, value in os.environ.items() if name not in SECRETS}
    return {"OMP_WAIT_POLICY": "PASSIVE", **inherited, **(additions or {}), "PYTHONPATH": path}


class Child:
    """One engine process, and the parent's end of the socket to this process. When the socket reports the end of the
    stream, the process has ended. `num_messages` counts the messages that have arrived from the process.
    `oom_kills_before` is the result of `deaths.oom_kills` from the start of the process."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._close_seconds = CLOSE_SECONDS
        self.num_messages = 0
        self.oom_kills_before = oom_kills()

    @classmethod
    async def spawn(
        cls,
        config: EngineConfig,
        command: tuple[str, ...],
        place: Place = WHOLE_MACHINE,
        *,
        ranks: Sequence[socket.socket] = (),
    ) -> Child:
        """Starts the command line `command` as a new process and sends the configuration `config` to this process. The
        number of the socket's file descriptor is appended to the command line, and then those of `ranks`, which are the
        connections of ranks on other machines. Raises OSError if the process cannot be started, or may not run on the
        processors of its `place`."""
        # Descriptors 0 to 2 must be open, so that the new socket gets another number than the child's standard streams.
        open_missing_streams()
        ours, theirs = socket.socketpair()
        descriptors = [theirs.fileno(), *(rank.fileno() for rank in ranks)]
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    *map(str, descriptors),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=descriptors,
                    env=process_environment(place.environment),
                )
            except OSError:
                ours.close()
                raise
        try:
            if place.processors is not None:
                # The process reads its affinity mask only after it has received its configuration.
                os.sched_setaffinity(process.pid, place.processors)
            reader, writer = await asyncio.open_connection(sock=ours)
        except OSError:
            process.kill()
            ours.close()
            raise
        child = cls(process, reader, writer)
        if config.state_cache_disk_path is not None:
            child._close_seconds = DISK_CLOSE_SECONDS + CLOSE_SECONDS
        child.send(config)
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: msgspec.Struct) -> None:
        """Queues a message to the child. If the child dies before it reads the message, the message is lost."""
        if not self._writer.is_closing():
            self._writer.write(pack(message))

    async def receive(self, kind: Any) -> Any:
        """Waits for the next message of the child process and returns the message, decoded as an object of the type
        `kind`. Returns None when the child has ended. Raises ValueError for bytes that are not a valid message."""
        try:
            header = await self._reader.readexactly(HEADER_BYTES)
            body = await self._reader.readexactly(body_bytes(header))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self.num_messages += 1
        return msgspec.msgpack.decode(body, type=kind)

    async def deliver(self, kind: Any, handle: Callable[[Any], None]) -> None:
        """Calls `handle` with each message of the child process, decoded as an object of the type `kind`, until the
        child has ended."""
        while (message := await self.receive(kind)) is not None:
            handle(message)

    def shut_down(self) -> None:
        """Tells the child to end after its current step, and kills it if it still runs some seconds later."""
        self.send(Shutdown())
        asyncio.get_running_loop().call_later(self._close_seconds, self.kill)

    async def wait(self) -> None:
        """Waits until the process has ended."""
        await self._process.wait()

    def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self) -> int:
        """Closes the connection, kills the process if it still runs some seconds later, and returns its exit status. A
        negative status is minus the number of the signal that ended the process."""
        self._writer.close()
        try:
            async with asyncio.timeout(self._close_seconds):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        status = self._process.returncode
        assert status is not None
        return status
