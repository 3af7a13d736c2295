"""What the processes of an engine have in common: how they talk to the process that has started them, and how they load
the engine."""

from __future__ import annotations

import ctypes
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.parallel.meeting import Meeting
from jamba_server.engine.process.heartbeat import beating
from jamba_server.engine.process.wire import pack
from jamba_server.engine.types import Failed, LogLine, Progress, Working

if TYPE_CHECKING:
    from jamba_server.engine.core import EngineCore

Send = Callable[[msgspec.Struct], None]

# This number stands for an operation of Linux's system call `prctl`, which makes the kernel send a signal to this
# process when its parent ends.
PR_SET_PDEATHSIG = 1


def sender(connection: socket.socket) -> Send:
    """Returns a function that sends a message to the parent. A lock prevents two threads from mixing the bytes of their
    messages."""
    lock = threading.Lock()

    def send(message: msgspec.Struct) -> None:
        frame = pack(message)
        with lock:
            connection.sendall(frame)

    return send


class LogToParent(logging.Handler):
    """A log handler that sends every log record to the parent process, which decides which records are shown."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        # The text has neither the level nor the name of the logger, because the struct `LogLine` has separate fields
        # for the level and the name.
        self.setFormatter(logging.Formatter("%(message)s"))
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(LogLine(record.levelno, record.name, self.format(record)))
        except OSError:
            return  # the parent process is gone; the reading thread notices this and ends the engine
        except Exception:  # noqa: BLE001 - a record that cannot be formatted must not end the engine
            self.handleError(record)


def load(config: EngineConfig, send: Send, rank: int = 0, meeting: Meeting | None = None) -> EngineCore | None:
    """Returns the engine of a rank, or None after the parent was told why there is none. Several ranks find each other
    at the `meeting`."""
    # These modules import torch, so they are imported only after the log handler is set. Warnings of torch then go to
    # the parent's log.
    from jamba_server.engine.start.build import build_engine
    from jamba_server.engine.start.parallel import join_ranks
    from jamba_server.kernels.table import KernelError

    def progress(phase: str, fraction: float) -> None:
        send(Progress(phase, fraction) if rank == 0 else Working())

    try:
        with beating(lambda: send(Working())):
            joined = None if meeting is None else join_ranks(config, rank, meeting)
            return build_engine(config, progress, joined)
    except (ConfigError, KernelError) as error:
        send(Failed(str(error)))
        return None


def end_with_parent() -> None:
    """Makes Linux kill this process when its parent ends, even if this process hangs or was stopped by a signal.
    Elsewhere this process notices the end of the socket's stream."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
