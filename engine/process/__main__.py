"""The engine process: `python -m jamba_server.engine.process FD`, where FD is the file descriptor of its socket.

`supervisor.Supervisor` starts this process with one end of a socket pair. The process receives its EngineConfig, sends
some Progress messages and then Ready or Failed. It runs until it is told to stop or its parent is gone. It sends its
log records over the socket, too, so that there is one log with one format.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.process.child import CLOSE_SECONDS, DISK_CLOSE_SECONDS
from jamba_server.engine.process.heartbeat import beating
from jamba_server.engine.process.standard_streams import open_missing_streams
from jamba_server.engine.process.wire import pack, receive
from jamba_server.engine.read_ahead import reading_early
from jamba_server.engine.types import Abort, Failed, LogLine, Progress, Ready, Submit, ToEngine, Working

if TYPE_CHECKING:
    from jamba_server.engine.core import EngineCore, Inbox

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


def read(connection: socket.socket, inbox: Inbox, stop: threading.Event) -> None:
    """Moves messages from the socket to the inbox until the parent process tells the engine to stop or is gone. Runs in
    a thread of its own."""
    try:
        while True:
            match receive(connection, ToEngine):
                case Submit(requests):
                    inbox.submit(requests)
                case Abort(request_ids):
                    inbox.abort(request_ids)
                case _:
                    return
    except ConnectionResetError:
        return  # the parent was killed before it read this process's last message
    finally:
        stop.set()
        inbox.wake()


def load(config: EngineConfig, send: Send) -> EngineCore | None:
    """Returns the engine, or None after the parent was told why there is none."""
    # These modules import torch, so they are imported only after the log handler is set. Warnings of torch then go to
    # the parent's log.
    from jamba_server.engine.start.build import build_engine
    from jamba_server.kernels.table import KernelError

    try:
        with beating(lambda: send(Working())):
            return build_engine(config, lambda phase, fraction: send(Progress(phase, fraction)))
    except (ConfigError, KernelError) as error:
        send(Failed(str(error)))
        return None


def run(connection: socket.socket, send: Send) -> int:
    if (config := receive(connection, EngineConfig)) is None:
        return 1
    with reading_early(Path(config.model), config.load_format):
        core = load(config, send)
    if core is None:
        return 1
    gc.collect()
    # The objects that exist now live as long as the process. The function `gc.freeze` excludes these objects from
    # garbage collection. Without `gc.freeze`, each full collection would examine all these objects and stop the engine
    # for about 0.1 s.
    gc.freeze()
    stop = threading.Event()
    threading.Thread(target=read, args=(connection, core.inbox, stop), daemon=True).start()
    core.announce = send
    send(Ready(core.info))
    while not stop.is_set():
        if not core.has_work:
            core.inbox.wait()
        send(core.step())
    core.close(CLOSE_SECONDS if config.state_cache_disk_path is None else DISK_CLOSE_SECONDS)
    return 0


def end_with_parent() -> None:
    """Makes Linux kill this process when its parent ends, even if this process hangs or was stopped by a signal.
    Elsewhere this process notices the end of the socket's stream."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    open_missing_streams()
    end_with_parent()
    # This process ignores SIGINT and SIGTERM. The parent process gets these signals, too, and tells this process to
    # end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        send = sender(connection)
        logging.basicConfig(level=logging.INFO, handlers=[LogToParent(send)])
        logging.captureWarnings(True)
        try:
            status = run(connection, send)
        except (BrokenPipeError, ConnectionResetError):
            status = 0  # the parent process is gone, so there is nobody to serve
    os._exit(status)  # `os._exit` is used because a normal exit could hang while the reading thread waits in `recv`


if __name__ == "__main__":
    main()
