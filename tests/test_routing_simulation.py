"""The simulation of several engines behind one front end (benchmarks/routing)."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.cache.policies import ROWS as CACHES
from benchmarks.cache.replay import Costs, Replay, Simulated, summarize
from benchmarks.cache.traces import MIB, TOKENS, make_scheduler, sizes_of_small
from benchmarks.routing.costs import CONTEXT, MODELS, Replica, config_of, replica, sizes_of
from benchmarks.routing.costs import to_markdown as costs_page
from benchmarks.routing.fleet import Fleet
from benchmarks.routing.policies import OTHERS, ROWS, LongestPrefix, Shortest
from benchmarks.routing.simulate import to_markdown
from jamba_server.server.cli.bench.sessions import Session
from jamba_server.server.cli.bench.trees import ChatTrees, Row

COSTS = Costs(step=2.0, prompt_token=0.2, decode=0.3)
SPEC = sizes_of_small()


def sessions(count: int, seconds: float) -> list[Session]:
    """Chats of requests that come `seconds` apart on average."""
    rng = np.random.default_rng(3)
    times = np.cumsum(rng.exponential(seconds, count)).tolist()
    lengths = rng.integers(50, 1500, count).tolist()
    rows = [Row(time, length, 20) for time, length in zip(times, lengths, strict=True)]
    return ChatTrees(think=1.0).grow(rows, rng, TOKENS)


def engines(number: int) -> list[Simulated]:
    return [
        Simulated(make_scheduler(SPEC, CACHES[0], 64 * MIB, 0.25), COSTS, first_token=1 << (20 + i))
        for i in range(number)
    ]


def test_one_engine_does_what_a_replay_without_a_front_end_does() -> None:
    chats = sessions(60, 0.1)
    expected = Replay(chats).run(engines(1)[0])
    for policy in (LongestPrefix(1), Shortest(1)):
        assert Fleet(engines(1), policy).run(Replay(chats)) == expected


@pytest.mark.parametrize("row", [*ROWS, *OTHERS], ids=lambda row: row.name)
def test_every_request_is_answered_and_the_result_repeats(row: object) -> None:
    assert isinstance(row, type(ROWS[0]))
    chats = sessions(60, 0.05)
    runs = [(fleet := Fleet(engines(3), row.make(3))).run(Replay(chats)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]) == sum(len(chat.turns) for chat in chats)
    assert sum(fleet.prompt_tokens) == sum(outcome.prompt_tokens for outcome in runs[0])
    assert min(fleet.prompt_tokens) > 0


def test_following_prefixes_saves_work() -> None:
    chats = sessions(150, 0.05)
    found = {row.name: summarize(Fleet(engines(3), row.make(3)).run(Replay(chats))) for row in ROWS}
    assert found["this server"].hit_rate > 1.2 * found["random"].hit_rate
    assert found["longest prefix"].hit_rate > 1.2 * found["least loaded"].hit_rate
    assert found["this server"].p95 < found["random"].p95


def test_the_page_names_its_model_and_its_seed() -> None:
    row = {"trace": "conv", "engines": 2, "policy": "random", "hit_rate": 0.5, "p50": 1, "p95": 2, "imbalance": 1}
    page = to_markdown("x", {"arguments": "-a", "commit": "c", "date": "d", "requests": 1, "rows": [row]})
    assert "with seed 1: 75% of the requests continue" in page
    assert "| chats | 2 | random | 50.0 | 1.00 | 2.00 | 1.00 |" in page


def test_the_price_of_a_million_tokens() -> None:
    """By hand: 2 GPUs at 3.60 dollars an hour are 0.2 cents a second, in which 1,000 tokens come."""
    assert Replica("any", "bf16", 2, 1, 0.0, 0.0).dollars(1000, 3.6) == pytest.approx(2.0)


def test_the_sizes_of_the_models() -> None:
    sizes = {name: sizes_of(config_of(name)) for name in MODELS}
    # Keys and values of KV heads with 128 numbers of 2 bytes each, in every attention layer.
    assert {name: spec.kv_bytes_per_token for name, spec in sizes.items()} == {
        "3B": 2 * 2 * 1 * 128 * 2,
        "Mini": 4 * 2 * 8 * 128 * 2,
        "Large": 9 * 2 * 8 * 128 * 2,
    }
    assert config_of("Large").num_parameters() / 1e9 == pytest.approx(398.6, abs=0.1)


def test_what_fits_beside_the_weights_decides_the_number_of_sequences() -> None:
    one, two = replica("Mini", "int8", 1), replica("Mini", "bf16", 2)
    spec = sizes_of(config_of("Mini"))
    each = spec.bytes_per_slot + CONTEXT * spec.kv_bytes_per_token
    weights = 51.1 * 2**30  # docs/scale.md
    assert one.sequences == pytest.approx((0.92 * 80e9 - 2e9 - weights) / each, abs=1)
    assert two.sequences == 256
    assert two.decode_rate > one.decode_rate
    assert "**Nothing here was measured.**" in costs_page("x", 3.0)
