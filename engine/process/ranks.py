"""The other ranks of an engine, as processes that rank 0 starts and watches.

The process that the HTTP process starts as the engine is rank 0. It starts the other ranks, and all of them end
together: a rank ends when rank 0 does, and rank 0 ends when a rank does, in the same way, so that the HTTP process
finds the cause.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable

import msgspec

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.process.wire import pack, receive
from jamba_server.engine.start.rank_options import num_ranks
from jamba_server.engine.types import Failed, LogLine, StepResult, Submit, Working

# The option -P keeps Python from importing modules of the current folder.
RANK_COMMAND = (sys.executable, "-P", "-m", "jamba_server.engine.process.rank")
# If a step of rank 0 fails, the cause may be that another rank has died. Rank 0 waits for this number of seconds for
# the news of such a death.
NEWS_SECONDS = 5.0


class Join(msgspec.Struct, frozen=True, tag=True):
    """The first message to a rank. The ranks find each other in a file without a name; `store` is its descriptor."""

    config: EngineConfig
    rank: int
    store: int


class StepInputs(msgspec.Struct, frozen=True, tag=True):
    """What a step takes from the inbox. The lists have ids of requests; `ended_pins` has names of pins.

    Requests that were `dropped` were aborted before a step took them, and those that `failed` have a grammar that could
    not be compiled. `results` is the checksum of the results of the step before.
    """

    submitted: list[str]
    dropped: list[str]
    failed: list[str]
    aborted: list[str]
    ended_pins: list[str]
    results: int


ToRank = Submit | StepInputs
FromRank = LogLine | Working | Failed


class Ranks:
    """The ranks from 1 on. `report` sends a message to the HTTP process."""

    def __init__(self, report: Callable[[msgspec.Struct], None]) -> None:
        self._report, self._lock = report, threading.Lock()
        self._connections: list[socket.socket] = []
        self._store = os.memfd_create("jamba ranks")
        self._death = threading.Event()

    @property
    def store_path(self) -> str:
        """The path of the file in which the ranks find each other, for this process."""
        return descriptor_path(self._store)

    def start(self, config: EngineConfig) -> None:
        """Starts the ranks. Must be called by the main thread: on Linux, a rank is killed when the thread that has
        started it ends."""
        for rank in range(1, num_ranks(config)):
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    (*RANK_COMMAND, str(theirs.fileno())),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), self._store),
                )
            ours.sendall(pack(Join(config, rank, self._store)))
            self._connections.append(ours)
            threading.Thread(target=self._watch, args=(rank, ours, process), daemon=True, name=f"rank {rank}").start()

    def send(self, message: ToRank) -> None:
        """Sends a message to all ranks."""
        frame = pack(message)
        with self._lock:
            for connection in self._connections:
                connection.sendall(frame)

    def wait_for_news(self) -> None:
        """Waits for the news that a rank has died, which end this process, for up to NEWS_SECONDS seconds."""
        self._death.wait(NEWS_SECONDS)

    def _watch(self, rank: int, connection: socket.socket, process: subprocess.Popen[bytes]) -> None:
        """Passes the messages of a rank on to the HTTP process. When the rank ends, ends this process, too."""
        try:
            while (message := receive(connection, FromRank)) is not None:
                match message:
                    case LogLine(level, name, text):
                        self._report(LogLine(level, name, f"rank {rank}: {text}"))
                    case Failed(text):
                        self._report(Failed(text))
                        os._exit(1)
                    case Working():
                        self._report(message)
        except OSError:
            pass  # this process, the rank or the HTTP process is ending
        finally:
            end_as(process.wait())


def checksum(result: StepResult) -> int:
    """Returns a number that says which tokens a step has sampled for which requests."""
    tokens = [(update.request_id, update.token_ids) for update in result.updates if update.token_ids]
    return zlib.crc32(repr(tokens).encode())


def descriptor_path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def end_as(status: int) -> None:
    """Ends this process with the exit status of another process, or with the signal that ended it."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -status)
    os._exit(max(status, 1))
