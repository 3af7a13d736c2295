"""The engine process: `python -m jamba_server.engine.process FD`.

`client.EngineClient` starts it with one end of a socket pair. It receives its EngineConfig, answers
Progress... and Ready or Failed, then runs until it is told to stop or its parent is gone.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.core import Inbox
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.process.wire import pack, receive
from jamba_server.engine.start.build import build_engine
from jamba_server.engine.types import Abort, Failed, Progress, Ready, Submit, ToEngine
from jamba_server.kernels.table import KernelError

logger = logging.getLogger("engine")


def read(connection: socket.socket, inbox: Inbox, stop: threading.Event) -> None:
    """Moves messages into the inbox until the parent says stop or is gone."""
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
        return  # the parent was killed before it read our last message
    finally:
        stop.set()
        inbox.wake()


def run(connection: socket.socket) -> int:
    if (config := receive(connection, EngineConfig)) is None:
        return 1
    try:
        core = build_engine(config, lambda phase, fraction: connection.sendall(pack(Progress(phase, fraction))))
    except (ConfigError, KernelError) as error:
        connection.sendall(pack(Failed(str(error))))
        return 1
    gc.collect()
    gc.freeze()  # what has been loaded stays: looking through it takes about 0.1 s, in the middle of somebody's reply
    stop = threading.Event()
    threading.Thread(target=read, args=(connection, core.inbox, stop), daemon=True).start()
    connection.sendall(pack(Ready(core.info)))
    while not stop.is_set():
        if not core.has_work:
            core.inbox.wait()
        connection.sendall(pack(core.step()))
    return 0


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s engine: %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole process group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        try:
            status = run(connection)
        except (BrokenPipeError, ConnectionResetError):
            status = 0  # the parent is gone
    os._exit(status)  # the reader thread may still wait in recv


if __name__ == "__main__":
    main()
