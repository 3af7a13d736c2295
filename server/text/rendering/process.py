"""Renders templates in child processes, so that no template can block this process or fill its memory.

There are several processes. If a rendering takes too long or its process dies, the process is replaced. The other
processes serve other requests meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Self, TypeVar

import jamba_server
from jamba_server.engine.errors import ConfigError, Overloaded
from jamba_server.server.text import rendering
from jamba_server.server.text.rendering.renderer import Compiled, RendererStopped, Rendering
from jamba_server.server.text.rendering.wire import Done, Ready, Work, pack, receive

T = TypeVar("T")

logger = logging.getLogger(__name__)

NUM_PROCESSES: Final = 2  # a prompt takes about a millisecond, so two processes serve some hundred prompts a second
RENDER_SECONDS: Final = 5.0  # time limit for compiling or rendering one template, in seconds
START_SECONDS: Final = 60.0  # time in seconds in which a new process must have imported its modules
# If a process has exceeded its time limit by this number of seconds, it ends itself. That happens only if its parent
# has died; otherwise the parent has killed the process before.
_ORPHAN_SECONDS: Final = 1.0
# The only environment variables that a rendering process gets. It needs no others, and some of the others hold secrets.
_ENVIRONMENT: Final = ("LD_LIBRARY_PATH", "PYTHONHOME", "TZ", "TZDIR")


class TemplateProcesses:
    """A `Renderer` that renders in several child processes. Several threads may use it at the same time; each call uses
    one process alone.

    The first process starts at once. Each of the others starts when it is first needed.
    """

    def __init__(self, *, num_processes: int = NUM_PROCESSES, seconds: float = RENDER_SECONDS) -> None:
        """Starts the first process. Raises ConfigError if that fails."""
        self._seconds = seconds
        self._lock = threading.Lock()
        self._closed = False
        self._running: set[_Process] = set()
        # The free processes. None stands for a process that is not started yet. The queue returns the item that was put
        # last, so a process that was used before is used again before another process is started.
        self._free: queue.LifoQueue[_Process | None] = queue.LifoQueue()
        for _ in range(num_processes - 1):
            self._free.put(None)
        try:
            self._free.put(self._start())
        except Overloaded as error:
            raise ConfigError(str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Returns the process ids of the running processes."""
        with self._lock:
            return sorted(process.pid for process in self._running)

    def compile(self, source: str) -> Compiled:
        compiled = self._run(Work(source)).compiled
        return compiled or Compiled(error="the process that renders templates gave a wrong reply")

    def render(self, source: str, contexts: Sequence[Mapping[str, object]]) -> list[Rendering]:
        renderings = self._run(Work(source, [dict(context) for context in contexts])).renderings or []
        if len(renderings) != len(contexts):
            raise RendererStopped("was rendered by a process that gave a wrong reply")
        return renderings

    def close(self) -> None:
        """Ends all processes. Calls that other threads are making then raise Overloaded, and so do later calls."""
        with self._lock:
            self._closed = True
            running = list(self._running)
        for process in running:
            process.kill()
        num_free = 0
        with contextlib.suppress(queue.Empty):
            while True:
                self._discard(self._free.get_nowait())
                num_free += 1
        for _ in range(num_free):
            self._free.put(None)

    def _run(self, work: Work) -> Done:
        """Sends a message with work to a free process and returns the process's reply. Waits if no process is free.

        If the process dies, the work is tried once more in a new process, because the template need not be the cause of
        the death.
        """
        frame = pack(work)
        process = self._free.get()
        try:
            for is_last in (False, True):
                process = process or self._start()
                try:
                    return process.run(frame, self._seconds)
                except _Ended as end:
                    if not self._closed:
                        logger.warning("A process that renders chat templates %s. A new one takes its place.", end)
                    self._discard(process)
                    process = None
                    if is_last:
                        raise RendererStopped(f"failed twice: the process that renders it {end}") from end
                except TimeoutError as timeout:
                    logger.warning("A chat template did not finish within %g s. Its process is ended.", self._seconds)
                    self._discard(process)
                    process = None
                    raise RendererStopped(f"did not finish within {self._seconds:g} s") from timeout
            raise AssertionError("the second try returns or raises")
        finally:
            self._give_back(process)

    def _give_back(self, process: _Process | None) -> None:
        """Makes a process available to other threads. If `process` is None, a new process is started first."""
        if process is None:
            with contextlib.suppress(Overloaded):
                process = self._start()
        self._free.put(process)
        if self._closed:
            self.close()

    def _start(self) -> _Process:
        """Starts a process. Raises Overloaded if that is not possible at the moment."""
        with self._lock:
            if self._closed:
                raise Overloaded("The server is shutting down; send the request again.")
            try:
                process = _Process(self._seconds + _ORPHAN_SECONDS)
            except OSError as error:
                raise Overloaded(f"No process that renders chat templates can be started: {error}.") from error
            self._running.add(process)
        return process

    def _discard(self, process: _Process | None) -> None:
        if process is not None:
            with self._lock:
                self._running.discard(process)
            process.kill()
            process.close()


class _Ended(Exception):
    """The child process has ended, or its reply cannot be read. The exception's message completes a sentence that
    begins with "The process"."""


class _Process:
    """One child process, and the parent's end of the socket to it."""

    def __init__(self, seconds: float) -> None:
        """Starts the process. The process ends itself if one message takes it more than `seconds` seconds. Raises
        OSError if the process cannot be started."""
        root = str(Path(jamba_server.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"PYTHONPATH": path}
        self._connection, theirs = socket.socketpair()
        self._is_ready = False
        with theirs:
            # the option -P keeps Python from importing modules of the current folder
            command = (sys.executable, "-P", "-m", rendering.__name__, str(theirs.fileno()), f"{seconds:g}")
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=environment,
                )
            except OSError:
                self._connection.close()
                raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, frame: bytes, seconds: float) -> Done:
        """Sends a frame and returns the reply. Raises TimeoutError if that takes more than `seconds` seconds, and
        _Ended if the process has ended."""
        if not self._is_ready:
            try:
                self._receive(Ready, time.monotonic() + START_SECONDS)
            except TimeoutError as error:
                raise _Ended(f"did not start within {START_SECONDS:g} s") from error
            self._is_ready = True
        deadline = time.monotonic() + seconds
        try:
            self._connection.settimeout(seconds)
            self._connection.sendall(frame)
        except ConnectionError as error:
            raise self._ended() from error
        return self._receive(Done, deadline)

    def _receive(self, kind: type[T], deadline: float) -> T:
        try:
            message = receive(self._connection, kind, deadline=deadline)
        except ConnectionError as error:
            raise self._ended() from error
        except ValueError as error:
            raise _Ended(f"sent a message that cannot be read: {error}") from error
        if message is None:
            raise self._ended()
        return message

    def _ended(self) -> _Ended:
        self.kill()
        status = self._process.returncode
        return _Ended(f"ended with signal {-status}" if status < 0 else f"ended with status {status}")

    def kill(self) -> None:
        """Kills the process. If a thread waits for the process's reply, it sees the end of the stream."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self._connection.close()
