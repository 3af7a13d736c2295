"""An engine process without a model: each step gives one token, and the token at position i is 1000 + i.

The first token of the prompt chooses a failure. With 666 the process ends at the second step that runs the request,
every time. With 667 it does so once: it first creates the file named by $SCRIPTED_ENGINE_MARK, and if that file exists
it does not fail. With 555 it hangs.
The model "loads once" cannot be loaded when that file exists, and creates it.
"""

from __future__ import annotations

import os
import select
import socket
import sys
from pathlib import Path

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.process.wire import pack, receive
from jamba_server.engine.types import (
    Abort,
    EngineInfo,
    EngineStats,
    Failed,
    Progress,
    Ready,
    Request,
    StepResult,
    Submit,
    ToEngine,
    TokenUpdate,
)

INFO = EngineInfo(
    architecture="Scripted",
    num_parameters=0,
    vocab_size=5000,
    eos_token_ids=(),
    device="cpu",
    dtype="float32",
    max_model_len=4096,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    block_size=16,
    num_kv_blocks=1,
    num_state_slots=1,
    num_saved_states=0,
    weight_bytes=0,
    kv_bytes=0,
    state_bytes=0,
    kernels={},
    load_seconds=0.0,
)


def misbehave(request: Request, age: int) -> None:
    mark = os.environ.get("SCRIPTED_ENGINE_MARK")
    if request.prompt[0] == 555:
        select.select([], [], [])
    if request.prompt[0] == 666 and age > 1:
        os._exit(9)
    if request.prompt[0] == 667 and age > 1 and mark and not Path(mark).exists():
        Path(mark).touch()
        os._exit(9)


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    config = receive(connection, EngineConfig)
    if config.model == "broken":
        connection.sendall(pack(Failed("the model is broken")))
        return
    if config.model == "loads once":
        mark = Path(os.environ["SCRIPTED_ENGINE_MARK"])
        if mark.exists():
            os._exit(9)
        mark.touch()
    connection.sendall(pack(Progress("loading weights", 0.5)))
    connection.sendall(pack(Ready(INFO)))
    live: dict[str, Request] = {}
    tokens: dict[str, int] = {}
    ages: dict[str, int] = {}
    started: list[str] = []
    steps = 0
    while True:
        if not live or select.select([connection], [], [], 0.001)[0]:
            match receive(connection, ToEngine):
                case Submit(requests):
                    for request in requests:
                        live[request.id], tokens[request.id] = request, len(request.generated)
                        ages[request.id] = 0
                        started.append(request.id)
                case Abort(request_ids):
                    for request_id in request_ids:
                        live.pop(request_id, None)
                case _:
                    return
        steps += 1
        updates: list[TokenUpdate] = []
        for request in list(live.values()):
            ages[request.id] += 1
            misbehave(request, ages[request.id])
            position = len(request.prompt) + tokens[request.id]
            tokens[request.id] += 1
            done = tokens[request.id] >= request.params.max_tokens
            updates.append(
                TokenUpdate(
                    request_id=request.id,
                    token_ids=[1000 + position],
                    num_cached=3 if ages[request.id] == 1 else None,
                    finish_reason="length" if done else None,
                )
            )
            if done:
                del live[request.id]
        stats = EngineStats(num_running=len(live), num_steps_total=steps)
        connection.sendall(pack(StepResult(updates, started, stats)))
        started = []


if __name__ == "__main__":
    main()
