"""A rank of the engine from 1 on: `python -m jamba_server.engine.process.rank FD [OPTIONS]`, with the descriptor of its
socket.

`ranks.Ranks` starts this process, or, on another machine than rank 0, `nodes.agent.Agent` does, with a JSON object of
the options that this machine has to itself. The process loads its part of the model and runs the steps that rank 0
announces. It sends no results to anybody, because rank 0 has the same results.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from jamba_server.engine.process.connection import LogToParent, Send, end_with_parent, load, sender
from jamba_server.engine.process.ranks import NEWS_SECONDS, Join, StepInputs, ToRank, checksum
from jamba_server.engine.process.wire import receive
from jamba_server.engine.read_ahead import reading_early
from jamba_server.engine.types import StepResult, Submit

if TYPE_CHECKING:
    from jamba_server.engine.core import EngineCore


def run(connection: socket.socket, send: Send, own_options: dict[str, Any]) -> int:
    if (join := receive(connection, Join)) is None:
        return 1
    config = msgspec.structs.replace(join.config, **own_options)
    with reading_early(Path(config.model), config.load_format):
        core = load(config, send, rank=join.rank, meeting=join.meeting)
    if core is None:
        return 1
    from jamba_server.engine.process.lockstep import FollowingInbox  # it imports torch

    core.inbox = inbox = FollowingInbox(core.inbox.compiler)
    gc.collect()
    gc.freeze()
    results = 0
    while (message := receive(connection, ToRank)) is not None:
        match message:
            case Submit(requests):
                inbox.submit(requests)
            case StepInputs():
                if message.results != results:
                    raise RuntimeError(f"rank {join.rank} has computed other tokens than rank 0")
                inbox.follow(message)
                results = checksum(run_step(core))
    return 0


def run_step(core: EngineCore) -> StepResult:
    """Runs a step. If the step fails, the cause may be that another rank has died. Rank 0 looks for the rank that ended
    first, and then ends this process, too. This process therefore waits before it ends by itself, so that rank 0 does
    not take it for the one that ended first."""
    try:
        return core.step()
    except Exception:
        time.sleep(NEWS_SECONDS)
        raise


def main() -> None:
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        send = sender(connection)
        logging.basicConfig(level=logging.INFO, handlers=[LogToParent(send)])
        logging.captureWarnings(True)
        try:
            status = run(connection, send, msgspec.json.decode(sys.argv[2]) if len(sys.argv) > 2 else {})
        except (BrokenPipeError, ConnectionResetError):
            status = 0  # rank 0 is gone, so there is nothing to do
    os._exit(status)


if __name__ == "__main__":
    main()
