"""Child: the engine process and its end of the socket pair, nothing else.

A socket pair needs no name in the file system: nobody else can connect, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec

import jamba_server
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.process.wire import HEADER_BYTES, pack
from jamba_server.engine.types import Shutdown

ENGINE_COMMAND = (
    sys.executable,
    "-P",
    "-m",
    "jamba_server.engine.process",
)  # -P: not from the folder we were started in
CLOSE_SECONDS = 5.0  # that a child has for ending by itself


class Child:
    """One engine process. Its end of stream is its death."""

    def __init__(
        self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer
        self._clock = asyncio.get_running_loop().time
        self._last_message = self._clock()

    @classmethod
    async def spawn(cls, config: EngineConfig, command: tuple[str, ...]) -> Child:
        """Starts `command` with the number of its socket as last argument, and sends it `config`. Raises OSError."""
        ours, theirs = socket.socketpair()
        root = str(Path(jamba_server.__file__).parent.parent)  # so that the child imports the engine that we are
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        # torch's own threads must not spin after their work: the core is wanted by the kernels' threads
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONPATH": path}
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *command, str(theirs.fileno()), pass_fds=[theirs.fileno()], env=environment
                )
            except OSError:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours)
        child = cls(process, reader, writer)
        child.send(config)
        return child

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def silent_seconds(self) -> float:
        """Time since its last message, or since it was last given work while it had none."""
        return self._clock() - self._last_message

    def send(self, message: msgspec.Struct) -> None:
        """Queues a message; one that a dead child does not read is lost with it."""
        if not self._writer.is_closing():
            self._writer.write(pack(message))

    async def receive(self, kind: Any) -> Any:
        """The next message, decoded as `kind`; None when the child has ended."""
        try:
            header = await self._reader.readexactly(HEADER_BYTES)
            body = await self._reader.readexactly(int.from_bytes(header, "little"))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        self._last_message = self._clock()
        return msgspec.msgpack.decode(body, type=kind)

    def touch(self) -> None:
        """Restarts `silent_seconds`: an idle child has been given work."""
        self._last_message = self._clock()

    def shut_down(self) -> None:
        """Tells it to end after its step; one that does not is killed."""
        self.send(Shutdown())
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, self.kill)

    def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self) -> int:
        """Ends the process if it still runs, and returns its exit status (negative: the signal that ended it)."""
        self._writer.close()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()
        status = self._process.returncode
        assert status is not None
        return status
