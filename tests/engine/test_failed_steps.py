"""A failed step, wherever it fails, leaves nothing behind: no page, no slot and no wrong state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from jamba_server.engine.cache.block_pool import BlockPool
from jamba_server.engine.cache.manager import CacheManager
from jamba_server.engine.model_runner import ModelRunner, PendingStep
from jamba_server.engine.models.jamba import DecoderLayer
from jamba_server.engine.sampling.sampler import Sampler
from jamba_server.engine.scheduler import Scheduler
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.llm import LLM, Completion
from tests.engine.simulator import Simulator, make_scheduler
from tests.engine.test_exact import CONFIG

RANDOM = Random(3)
STEM = [RANDOM.randrange(3, 500) for _ in range(100)]
PROMPTS = [[*STEM, *(RANDOM.randrange(3, 500) for _ in range(length))] for length in (50, 1, 33)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)

# Where a step fails: in the middle of the method, as far as its callers can tell.
STAGES: dict[str, tuple[type, str]] = {
    "while sequences are admitted": (BlockPool, "retain"),
    "while saves are planned": (CacheManager, "plan_saves"),
    "before the launch": (ModelRunner, "_copy_units"),
    "in the forward pass": (DecoderLayer, "__call__"),
    "after the forward pass": (Sampler, "launch"),
    "while it is published": (CacheManager, "_publish_state"),
    "while results are read": (PendingStep, "results"),
    "while results are taken in": (Scheduler, "_report"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("failed_steps")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Any]:
    return [result(load(folder).generate([prompt], GREEDY)[0]) for prompt in PROMPTS]


def load(folder: Path, **settings: Any) -> LLM:
    sizes = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    return LLM(folder, load_format="dummy", threads=1, **sizes | settings)


def result(completion: Completion) -> tuple[list[int], list[Any]]:
    return completion.token_ids, completion.logprobs


def fail(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, error: type[BaseException]) -> None:
    """Makes one call of a method, counted from now on, raise an exception after it has done its work."""
    method: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def failing(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        value = method(*arguments, **named)
        if calls == call:
            monkeypatch.undo()
            raise error("injected")
        return value

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_the_same_prompts_again_get_the_same_tokens(
    folder: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch, stage: str, ahead: bool
) -> None:
    llm, (owner, name) = load(folder, async_scheduling=ahead, enforce_eager=True), STAGES[stage]
    per_step = CONFIG["num_hidden_layers"] if stage == "in the forward pass" else 1
    assert isinstance(per_step, int)
    cache = llm.core.scheduler.cache
    failures = 0
    for step, error in ((1, RuntimeError), (2, KeyboardInterrupt), (3, KeyboardInterrupt), (6, RuntimeError)):
        fail(monkeypatch, owner, name, per_step * step - per_step // 2, error)
        try:
            llm.generate([*PROMPTS], GREEDY)
        except error:
            failures += 1
        monkeypatch.undo()
        stats = llm.core.scheduler.stats
        assert (stats.kv_blocks_used, stats.state_slots_used, stats.num_running) == (0, 0, 0)
        assert not any((*cache.pages.refs, *cache.slots.refs))
        assert [result(completion) for completion in llm.generate([*PROMPTS], GREEDY)] == expected
    assert failures > 1
    while llm.core.has_work:
        llm.core.step()
    stats = llm.core.scheduler.stats
    assert (stats.kv_blocks_used, stats.state_slots_used) == (0, 0)
    assert stats.prefix_hits_total > 0


def test_what_earlier_steps_confirmed_is_still_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(folder)
    llm.generate([PROMPTS[0]], GREEDY)
    saved = llm.core.scheduler.stats.saved_states
    fail(monkeypatch, PendingStep, "results", 1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([STEM[::-1]], GREEDY)
    assert llm.core.scheduler.stats.saved_states == saved
    [again] = llm.generate([PROMPTS[0]], GREEDY)
    assert again.num_cached == 144
    [other] = llm.generate([STEM[::-1]], GREEDY)
    assert other.num_cached == 0, "what the failed step wrote must not be found"


def test_an_interrupt_while_a_failed_step_is_discarded(
    folder: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load(folder)
    fail(monkeypatch, CacheManager, "plan_saves", 2, RuntimeError)
    discard = llm.core.scheduler.discard

    def interrupted() -> None:
        llm.core.scheduler.discard = discard
        raise KeyboardInterrupt

    llm.core.scheduler.discard = interrupted
    with pytest.raises(KeyboardInterrupt):
        llm.generate([*PROMPTS], GREEDY)
    assert [result(completion) for completion in llm.generate([*PROMPTS], GREEDY)] == expected
    assert llm.core.scheduler.stats.state_slots_used == 0


def test_requests_that_only_wait_go_on(folder: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    core = load(folder, max_num_seqs=1).core
    first, *others = [Request(id=str(i), prompt=prompt, params=GREEDY) for i, prompt in enumerate(PROMPTS)]
    core.inbox.submit([first])
    fail(monkeypatch, PendingStep, "results", 2, RuntimeError)
    core.step()
    core.inbox.submit(others)
    with pytest.raises(RuntimeError, match="injected"):
        core.step()
    tokens: dict[str, list[int]] = {}
    while core.has_work:
        for update in core.step().updates:
            tokens.setdefault(update.request_id, []).extend(update.token_ids)
    assert tokens == {"1": expected[1][0], "2": expected[2][0]}


@pytest.mark.parametrize("num_compressed", [0, 6])
@pytest.mark.parametrize("ahead", [False, True])
def test_random_failures_between_random_requests(ahead: bool, num_compressed: int) -> None:
    """A step fails after its forward pass, before and after it is published; the simulator checks all that is read."""
    random, failures = Random(7), 0
    scheduler = make_scheduler(num_pages=30, max_model_len=60, interval=8, num_compressed=num_compressed)
    simulator = Simulator(scheduler, ahead=ahead)
    stems = [[random.randrange(5) for _ in range(40)] for _ in range(3)]
    for number in range(600):
        if len(scheduler.waiting) < 3:
            prompt = random.choice(stems)[: random.randint(1, 40)]
            params = SamplingParams(max_tokens=random.randint(1, 18))
            scheduler.add([Request(id=str(number), prompt=prompt, params=params)], now=0.0)
        if random.random() < 0.1:
            failures += 1
            simulator.fail(lambda _: random.randrange(5), advances=random.random() < 0.5)
        else:
            simulator.step(lambda _: random.randrange(5))
    while scheduler.has_work or simulator.under_way:
        simulator.step(lambda _: random.randrange(5))
    simulator.finish()
    assert failures > 30
    assert simulator.num_saved > 0
    assert scheduler.stats.prefix_hits_total > 0
