"""Which states and pages go first, and what the fuzz says if the bookkeeping behind it has a fault."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from jamba_server.engine.cache.block_pool import BlockPool
from jamba_server.engine.cache.chains import Chains
from jamba_server.engine.cache.policy import SavePolicy
from jamba_server.engine.cache.reuse import Kind, Life, Reuse
from jamba_server.engine.types import Request, SamplingParams
from tests.engine.simulator import Simulator, make_scheduler
from tests.engine.test_scheduler_fuzz import run as fuzz


def names(text: str) -> list[bytes]:
    return [text[: end + 1].encode() for end in range(len(text))]


def test_chains_need_the_pages_before_each_state_and_no_others() -> None:
    """Random states come and go; the needed pages are counted anew each time."""
    random, chains, states = Random(0), Chains(), set[str]()
    for _ in range(2000):
        text = "".join(random.choices("ab", k=random.randint(1, 7)))
        before = set(chains)
        if text in states and random.random() < 0.7:
            states.discard(text)
            changed, expected = chains.remove(text.encode()), before - needed(states)
        else:
            states.add(text)
            changed, expected = chains.add(names(text)), needed(states) - before
        assert set(chains) == needed(states)
        assert sorted(changed) == sorted(expected)
        page = "".join(random.choices("ab", k=3))
        after = [state.encode() for state in states if state.startswith(page)]
        assert chains.states_after(page.encode()) == sorted(after)
    assert set(chains.restrict([])) == needed(states)
    assert not set(chains)


def needed(states: set[str]) -> set[bytes]:
    return {name for state in states for name in names(state)}


def test_chains_that_an_interrupt_left_half_built_are_built_anew() -> None:
    chains = Chains()
    chains.add(names("abc"))
    chains.add(names("abd"))
    chains._nodes[b"ab"].children.clear()
    chains.restrict([b"abc", b"abd"])
    assert chains.states_after(b"a") == [b"abc", b"abd"]
    chains.remove(b"abc")
    assert set(chains) == needed({"abd"})


def test_the_share_of_a_kind_follows_what_happens_to_it() -> None:
    reuse = Reuse(capacity=1000)
    lives = [reuse.save(b"answer%d" % number, Kind.ANSWER) for number in range(8)]
    assert reuse.share(lives[0]) == 1 / 10
    after = [reuse.hit(b"answer%d" % number) for number in range(4)]
    assert reuse.share(lives[0]) == 5 / 10
    assert after[0] is not None
    assert reuse.share(after[0]) == 1 / 6, "a state that was hit begins a life of another sort"
    system = reuse.save(b"system", Kind.MESSAGE)
    for _ in range(1000):
        reuse.hit(b"system")
        reuse.save(b"once", Kind.BRANCH)
    assert reuse.share(system._replace(was_hit=True)) > 0.99
    assert reuse.share(reuse.save(b"once", Kind.BRANCH)) < 0.01


def test_old_lives_weigh_less_and_old_keys_are_forgotten() -> None:
    reuse, life = Reuse(capacity=3), Life(Kind.ANSWER, was_hit=False)
    for number in range(2000):
        assert reuse.save(b"%d" % number, Kind.ANSWER) == life
    assert reuse.share(life) < 0.01
    assert reuse.hit(b"0") is None
    for number in range(2000, 4000):
        reuse.save(b"%d" % number, Kind.ANSWER)
        reuse.hit(b"%d" % number)
    assert reuse.share(life) > 0.9, "more recent lives outweigh the old ones"


def test_blocks_of_lower_worth_go_first_whatever_their_age() -> None:
    pool = BlockPool(4, ages=False)
    for key in (b"needed", b"new", b"newer"):
        [i] = pool.allocate(1) or []
        pool.publish(i, key)
        pool.release([i])
    pool.appraise(b"needed", 1.0)
    lost: list[bytes] = []
    pool.on_loss = lost.append
    assert pool.allocate(2)
    assert lost == [b"new", b"newer"]
    pool.appraise(b"needed", 0.0)
    pool.forget(b"needed")
    pool.forget(b"needed")
    assert lost[2:] == [b"needed"]
    assert pool.was_evicted(b"needed")
    assert pool.num_free == 1
    assert pool.allocate(1)


def test_a_block_that_is_forgotten_while_in_use_is_empty_afterwards() -> None:
    pool = BlockPool(3)
    [i] = pool.allocate(1) or []
    pool.publish(i, b"a", worth=5)
    pool.forget(b"a")
    assert pool.lookup(b"a") is None
    pool.release([i])
    assert pool.allocate(2, evict=False) is not None


def one_by_one(simulator: Simulator, prompts: list[list[int]], **fields: object) -> list[int]:
    """The cached tokens of requests that run one after the other."""
    scheduler, cached = simulator.scheduler, list[int]()
    for prompt in prompts:
        request = Request(
            id=str(scheduler.stats.num_steps_total),
            prompt=prompt,
            params=SamplingParams(max_tokens=1),
            **fields,  # type: ignore[arg-type]
        )
        scheduler.add([request], now=0.0)
        while scheduler.has_work:
            for update in simulator.step(lambda _: 9):
                cached += [] if update.num_cached is None else [update.num_cached]
    return cached


def test_pages_that_a_state_needs_outlive_newer_ones() -> None:
    """The state after the system prompt is hit often, so it stays while the states of other prompts come and go. Its
    pages must stay with it, although four other prompts together fill all pages."""
    simulator = Simulator(make_scheduler(num_pages=24, num_slots=5, block_size=4, max_num_seqs=1, max_model_len=60))
    system, cached = list(range(100, 116)), list[int]()
    for number in range(1, 30):
        one_by_one(simulator, [[1000 * number + 30 * other + i for i in range(24)] for other in range(4)])
        cached += one_by_one(simulator, [[*system, number, i] for i in range(4)], save_positions=(16,))
    assert cached[-40:] == [16] * 40, "after some time the kinds are known, and the system prompt always stays"


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a state is lost and its pages stay protected": lambda patch: patch.setattr(Chains, "remove", lambda *_: []),
    "the pages of a new state are not protected": lambda patch: patch.setattr(Chains, "add", lambda *_: []),
    "a page is lost and the states that need it stay": lambda patch: patch.setattr(
        Chains, "states_after", lambda *_: []
    ),
    "only the state right at the lost page is forgotten": lambda patch: patch.setattr(
        Chains, "states_after", lambda chains, page: [page] if page in chains._states else []
    ),
    "an evicted block is not reported": lambda patch: patch.setattr(BlockPool, "_lose", lose_silently),
    "a forgotten block stays in use": lambda patch: patch.setattr(BlockPool, "forget", forget_and_leak),
    "the pages before a protected page are taken for protected": lambda patch: patch.setattr(
        Chains, "add", add_only_the_last
    ),
}


def lose_silently(pool: BlockPool, i: int) -> None:
    key = pool._keys.pop(i)
    del pool._ids[key], pool._worth[i]
    pool._lost[key] = None


def forget_and_leak(pool: BlockPool, key: bytes) -> None:
    if (i := pool._ids.get(key)) is not None:
        pool._ranks.pop(i, None)
        pool._lose(i)


def add_only_the_last(chains: Chains, chain: list[bytes]) -> list[bytes]:
    add = Chains.__dict__["add"]
    assert add is add_only_the_last
    return GENUINE_ADD(chains, chain[-1:])


GENUINE_ADD = Chains.add


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fuzz_finds_a_planted_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(12):
            fuzz(seed, ("slots", "compressed")[seed % 2], ahead=seed % 3 == 0)


def test_the_same_requests_evict_the_same() -> None:
    def evicted() -> tuple[list[bytes], Counter[str]]:
        lost: list[bytes] = []
        with pytest.MonkeyPatch.context() as patch:
            lose = BlockPool._lose
            patch.setattr(BlockPool, "_lose", lambda pool, i: (lost.append(pool._keys[i]), lose(pool, i)))
            return lost, fuzz(7, "slots", ahead=False)

    first = evicted()
    assert first == evicted()
    assert first[0]


def test_a_policy_says_what_is_saved() -> None:
    class Nothing(SavePolicy):
        saves_answers = False

        def positions(self, seq: object):  # noqa: ANN202
            del seq
            return iter(())

    scheduler = make_scheduler(block_size=4)
    scheduler.cache.policy = Nothing(10)
    simulator = Simulator(scheduler)
    assert one_by_one(simulator, [list(range(30))] * 2) == [0, 0]
    assert scheduler.stats.saved_states == 0
