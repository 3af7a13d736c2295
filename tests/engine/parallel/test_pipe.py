"""What stages send to each other: everything arrives in order, and no stage waits for the next one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from jamba_server.engine.parallel.pipe import Pipe
from jamba_server.engine.parallel.stages import even_stages
from tests.engine.parallel.ranks import CPU, TIMEOUT

STAGES, STEPS, HIDDEN = 3, 7, 40


def step_input(number: int) -> Tensor:
    """What the first stage sends for a step. The steps have different numbers of rows."""
    return (torch.arange((1 + number % 3) * HIDDEN).view(-1, HIDDEN) * (number + 1)).bfloat16()


def step_result(number: int) -> bytes:
    return bytes([number]) * (1 + 50_000 * (number % 2))


def test_steps_arrive_in_order_and_no_stage_waits_for_the_next() -> None:
    """The first stage launches as many steps as there are stages before the last one begins with the first step."""
    store, launched = HashStore(), threading.Event()
    pipes: list[Pipe] = []  # a stage that has ended must not close connections of which others still read

    def run(index: int) -> list[bytes]:
        pipe = Pipe.join(even_stages(STAGES, STAGES)[index], store, CPU, TIMEOUT)
        pipes.append(pipe)
        assert pipe.smallest([5 + index, 9 - index]) == [5, 7]
        results: list[bytes] = []
        if pipe.stage.is_last:
            assert launched.wait(TIMEOUT.total_seconds())
        for number in range(STEPS):
            sent = step_input(number)
            received = pipe.receive(len(sent), HIDDEN, torch.bfloat16, CPU)
            if pipe.stage.is_first:
                assert received is None
            else:
                assert received is not None
                assert (received == sent + (index - 1)).all()
            if pipe.stage.is_last:
                pipe.send_results(step_result(number))
                continue
            pipe.send(sent + index)
            if number >= STAGES - 1:
                launched.set()
                results.append(pipe.receive_results())
        while not pipe.stage.is_last and len(results) < STEPS:
            results.append(pipe.receive_results())
        return results

    with ThreadPoolExecutor(STAGES) as pool:
        futures = [pool.submit(run, index) for index in range(STAGES)]
        first, middle, last = (future.result(timeout=120) for future in futures)
    assert first == middle == [step_result(number) for number in range(STEPS)]
    assert last == []


def test_one_stage_exchanges_nothing() -> None:
    [stage] = even_stages(4, 1)
    pipe = Pipe(stage)
    assert pipe.receive(1, HIDDEN, torch.float32, CPU) is None
    assert pipe.smallest([3, 4]) == [3, 4]
