"""The other ranks of an engine, as processes that rank 0 starts and watches.

The process that the HTTP process starts as the engine is rank 0. It starts the other ranks of this machine, and has a
connection to each rank of other machines (`engine/nodes`). All of them end together: a rank ends when rank 0 does, and
rank 0 ends when a rank does, in the same way, so that the HTTP process finds the cause.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.parallel.meeting import Meeting, open_listener
from jamba_server.engine.process.wire import pack, receive
from jamba_server.engine.start.rank_options import num_ranks, ranks_per_node
from jamba_server.engine.types import Failed, LogLine, StepResult, Submit, Working

# The option -P keeps Python from importing modules of the current folder.
RANK_COMMAND = (sys.executable, "-P", "-m", "jamba_server.engine.process.rank")
# If a step of rank 0 fails, the cause may be that another rank has died. Rank 0 waits for this number of seconds for
# the news of such a death.
NEWS_SECONDS = 5.0


class Join(msgspec.Struct, frozen=True, tag=True):
    """The first message to a rank, which says where the ranks find each other."""

    config: EngineConfig
    rank: int
    meeting: Meeting


class Ended(msgspec.Struct, frozen=True, tag=True):
    """The last message on the connection of a rank on another machine: how its process has ended. A negative status is
    minus the number of a signal."""

    status: int


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
FromRank = LogLine | Working | Failed | Ended


class Ranks:
    """The ranks from 1 on. `report` sends a message to the HTTP process. `remote` has the connections of the ranks on
    other machines, in their order; they are the last ranks."""

    def __init__(self, report: Callable[[msgspec.Struct], None], remote: Sequence[socket.socket] = ()) -> None:
        self._report, self._lock, self._remote = report, threading.Lock(), remote
        self._connections: list[socket.socket] = []
        self._death = threading.Event()
        self.meeting = self._on_one_machine() if not remote else self._on_several_machines(remote[0].getsockname()[0])

    def _on_one_machine(self) -> Meeting:
        """Returns a file without a name as the place where the ranks find each other."""
        self._store = os.memfd_create("jamba ranks")
        return Meeting(path=f"/proc/self/fd/{self._store}")

    def _on_several_machines(self, host: str) -> Meeting:
        """Returns a store of this process as that place. `host` is the address at which other machines reach it."""
        self._listener = open_listener(host)
        store = (host, self._listener.getsockname()[1])
        return Meeting(store=store, host=host, listener=self._listener.fileno())

    def start(self, config: EngineConfig) -> None:
        """Starts the ranks of this machine, and tells all ranks to join. Must be called by the main thread: on Linux, a
        rank is killed when the thread that has started it ends."""
        local = ranks_per_node(config)
        assert len(self._remote) == num_ranks(config) - local, "each rank of another machine is connected"
        meeting = msgspec.structs.replace(self.meeting, listener=None)
        inherited = () if self.meeting.listener is not None else (self._store,)
        for rank in range(1, local):
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    (*RANK_COMMAND, str(theirs.fileno())),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), *inherited),
                )
            self._join(Join(config, rank, meeting), ours, process)
        for rank, connection in enumerate(self._remote, start=local):
            own = msgspec.structs.replace(meeting, host=connection.getpeername()[0])
            self._join(Join(config, rank, own), connection)

    def _join(self, join: Join, connection: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        """Tells a rank to join. `process` is its process if it runs on this machine."""
        connection.sendall(pack(join))
        self._connections.append(connection)
        arguments, name = (join.rank, connection, process), f"rank {join.rank}"
        threading.Thread(target=self._watch, args=arguments, daemon=True, name=name).start()

    def send(self, message: ToRank) -> None:
        """Sends a message to all ranks. If a rank has ended, this process ends as well, and the method does not
        return."""
        frame = pack(message)
        with self._lock:
            for connection in self._connections:
                try:
                    connection.sendall(frame)
                except OSError:
                    self.wait_for_news()
                    raise

    def wait_for_news(self) -> None:
        """Waits up to NEWS_SECONDS seconds for the news that a rank has died. The news ends this process."""
        self._death.wait(NEWS_SECONDS)

    def _watch(self, rank: int, connection: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
        """Passes the messages of a rank on to the HTTP process. When the rank ends, ends this process, too."""
        status = None
        try:
            while status is None and (message := receive(connection, FromRank)) is not None:
                match message:
                    case LogLine(level, name, text):
                        self._report(LogLine(level, name, f"rank {rank}: {text}"))
                    case Failed(text):
                        self._report(Failed(text))
                        os._exit(1)
                    case Working():
                        self._report(message)
                    case Ended():
                        status = message.status
        except (OSError, ValueError, msgspec.MsgspecError):
            pass  # this process, the rank or the HTTP process is ending, perhaps within a message
        finally:
            end_as(process.wait() if process is not None else self._remote_status(rank, status))

    def _remote_status(self, rank: int, status: int | None) -> int:
        """Returns the status with which this process must end because a rank of another machine has ended. Without a
        `status`, the connection to that rank was lost. No request has caused this, so it counts as a kill."""
        how = "status" if status is None or status >= 0 else "signal"
        end = "is lost: its connection has ended" if status is None else f"has ended with {how} {abs(status)}"
        with suppress(OSError):
            self._report(LogLine(logging.WARNING, __name__, f"rank {rank} on another node {end}"))
        return -signal.SIGKILL if status is None else status


def checksum(result: StepResult) -> int:
    """Returns a number that says which tokens a step has sampled for which requests."""
    tokens = [(update.request_id, update.token_ids) for update in result.updates if update.token_ids]
    return zlib.crc32(repr(tokens).encode())


def end_as(status: int) -> None:
    """Ends this process with the exit status of another process, or with the signal that ended it."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -status)
    os._exit(max(status, 1))
