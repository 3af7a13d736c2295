"""The engine process: `python -m jamba_server.engine.process FD [FD ...]`, where the first FD is the file descriptor of
its socket. The others are those of connections to ranks on other machines, in the order of the ranks.

`supervisor.Supervisor` starts this process with one end of a socket pair. The process receives its EngineConfig, sends
some Progress messages and then Ready or Failed. It runs until it is told to stop or its parent is gone. It sends its
log records over the socket, too, so that there is one log with one format.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from jamba_server.engine.cache.tiers.events import Found
from jamba_server.engine.cache.tiers.segment import Entry
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.process.child import CLOSE_SECONDS, DISK_CLOSE_SECONDS
from jamba_server.engine.process.connection import LogToParent, Send, end_with_parent, load, sender
from jamba_server.engine.process.ranks import Ranks
from jamba_server.engine.process.standard_streams import open_missing_streams
from jamba_server.engine.process.wire import receive
from jamba_server.engine.read_ahead import reading_early
from jamba_server.engine.start.rank_options import check_ranks, num_ranks
from jamba_server.engine.types import Abort, Arrived, Failed, Ready, Submit, ToEngine

if TYPE_CHECKING:
    from jamba_server.engine.core import Inbox


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
                case Arrived(segments):
                    inbox.post(Found(tuple(Entry(*msgspec.structs.astuple(segment)) for segment in segments)))
                case _:
                    return
    except ConnectionResetError:
        return  # the parent was killed before it read this process's last message
    finally:
        stop.set()
        inbox.wake()


def run(connection: socket.socket, send: Send, remote_ranks: Sequence[socket.socket] = ()) -> int:
    if (config := receive(connection, EngineConfig)) is None:
        return 1
    ranks = None
    try:
        several = num_ranks(config) > 1
        if several:
            check_ranks(config)
    except ConfigError as error:
        send(Failed(str(error)))
        return 1
    if several:
        ranks = Ranks(send, remote_ranks)
        ranks.start(config)
    with reading_early(Path(config.model), config.load_format):
        core = load(config, send, meeting=None if ranks is None else ranks.meeting)
    if core is None:
        return 1
    step = core.step
    if ranks is not None:
        from jamba_server.engine.process.lockstep import lead  # it imports torch

        step = lead(core, ranks)
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
        send(step())
    core.close(CLOSE_SECONDS if config.state_cache_disk_path is None else DISK_CLOSE_SECONDS)
    return 0


def main() -> None:
    open_missing_streams()
    end_with_parent()
    # This process ignores SIGINT and SIGTERM. The parent process gets these signals, too, and tells this process to
    # end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    remote_ranks = [socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[2:]]
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        send = sender(connection)
        logging.basicConfig(level=logging.INFO, handlers=[LogToParent(send)])
        logging.captureWarnings(True)
        try:
            status = run(connection, send, remote_ranks)
        except (BrokenPipeError, ConnectionResetError):
            status = 0  # the parent process is gone, so there is nobody to serve
    os._exit(status)  # `os._exit` is used because a normal exit could hang while the reading thread waits in `recv`


if __name__ == "__main__":
    main()
