"""An engine process without a model: each step gives one token, and the token at position i is 1000 + i.

The first token of the prompt chooses a failure. With 666 the process ends at the second step that runs the request,
every time, with 668 at the first, and with 669 before the request is in the queue. With 667 it ends once at the second
step: it first creates the file named by $SCRIPTED_ENGINE_MARK, and if that file exists it does not fail. With 555 it
hangs, with 556 it sends five bytes that are no message and goes on, and with 557 no step gives a token.
The file is also how a model fails: "loads once" cannot be loaded when the file exists, and creates it; "hangs later"
hangs then instead.
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
    Adding,
    EngineInfo,
    EngineStats,
    Failed,
    Progress,
    Ready,
    Request,
    Starting,
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
    max_num_mixed_tokens=64,
    block_size=16,
    num_kv_blocks=1,
    num_state_slots=1,
    num_saved_states=0,
    weight_bytes=0,
    kv_bytes=0,
    state_bytes=0,
    kernels={"linear": "scripted"},
    load_seconds=0.0,
)


def misbehave(connection: socket.socket, request: Request, age: int) -> None:
    mark = os.environ.get("SCRIPTED_ENGINE_MARK")
    kind = request.prompt[0]
    if kind == 555:
        select.select([], [], [])
    if kind == 556 and age == 1:
        connection.sendall(b"oops!")
    if kind == 668 or (kind == 666 and age > 1):
        os._exit(9)
    if kind == 667 and age > 1 and mark and not Path(mark).exists():
        Path(mark).touch()
        os._exit(9)


def load(model: str) -> None:
    if model not in ("loads once", "hangs later"):
        return
    try:
        # Two engines may start at the same time, and only one of them must create the file.
        Path(os.environ["SCRIPTED_ENGINE_MARK"]).touch(exist_ok=False)
    except FileExistsError:
        if model == "loads once":
            os._exit(9)
        select.select([], [], [])


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    config = receive(connection, EngineConfig)
    if config.model == "broken":
        connection.sendall(pack(Failed("the model is broken")))
        return
    load(config.model)
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
                    connection.sendall(pack(Adding([request.id for request in requests])))
                    if any(request.prompt[0] == 669 for request in requests):
                        os._exit(9)
                    for request in requests:
                        live[request.id], tokens[request.id] = request, len(request.generated)
                        ages[request.id] = 0
                        started.append(request.id)
                case Abort(request_ids):
                    for request_id in request_ids:
                        live.pop(request_id, None)
                case _:
                    return
        steps += bool(live)
        if started:
            connection.sendall(pack(Starting(started)))
        updates: list[TokenUpdate] = []
        for request in list(live.values()):
            ages[request.id] += 1
            misbehave(connection, request, ages[request.id])
            if request.prompt[0] == 557:
                continue
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
        connection.sendall(pack(StepResult(updates, stats)))
        started = []


if __name__ == "__main__":
    main()
