"""Which engine gets a request: known prefixes, work, and both against each other."""

from __future__ import annotations

import random

import pytest

from jamba_server.engine.errors import Overloaded, RequestRejected
from jamba_server.engine.process.queue_limit import Load, check_queue
from jamba_server.engine.replicas.known_prefixes import BLOCK_TOKENS, KnownPrefixes, prefix_keys
from jamba_server.engine.replicas.routing import MISSING_WEIGHT, TOKENS_PER_REPLY, Route, Router, Work

IDLE = Work(0, 0)


def prompt(*parts: int) -> list[int]:
    """Blocks of tokens, one for each number."""
    return [token for part in parts for token in [part] * BLOCK_TOKENS]


def test_keys_are_those_of_whole_prefixes() -> None:
    keys = prefix_keys(prompt(1, 2, 3), "")
    assert len(keys) == 2, "the last token is computed in any case, so the last block cannot be a hit"
    assert prefix_keys([*prompt(1, 2, 3), 7], "")[:2] == keys
    assert len(prefix_keys([*prompt(1, 2, 3), 7], "")) == 3
    assert prefix_keys(prompt(1, 4, 3), "")[0] == keys[0]
    assert prefix_keys(prompt(1, 4, 3), "")[1] != keys[1]
    assert not {*prefix_keys(prompt(2, 2, 3), "")} & {*keys}, "a later block depends on the first"
    assert not {*prefix_keys(prompt(1, 2, 3), "salt")} & {*keys}
    assert prefix_keys([], "") == prefix_keys([5], "") == []


def test_the_longest_known_prefix_is_that_of_a_plain_search() -> None:
    """Against a list of all prompts, with so little room that most is forgotten again."""
    draw = random.Random(1)
    known, order = KnownPrefixes(max_blocks=40), list[int]()
    for _ in range(500):
        keys = prefix_keys(prompt(*(draw.randrange(3) for _ in range(draw.randrange(1, 12)))), "")
        leading = next((i for i, key in enumerate(keys) if key not in order), len(keys))
        assert known.longest(keys) == leading * BLOCK_TOKENS
        known.add(keys)
        order = [*(key for key in order if key not in keys), *reversed(keys)][-40:]
        assert len(known) == len(order)


def test_an_idle_engine_with_the_longest_prefix_is_chosen() -> None:
    router = Router(3)
    router.sent(1, prefix_keys(prompt(1, 2, 3, 4), ""))
    router.sent(2, prefix_keys(prompt(1, 2), ""))
    keys = prefix_keys(prompt(1, 2, 3, 9), "")
    assert router.route(4 * BLOCK_TOKENS, keys, [IDLE] * 3, [0, 1, 2]) == Route(1, "prefix", BLOCK_TOKENS)
    router.forget(1)
    assert router.route(4 * BLOCK_TOKENS, keys, [IDLE] * 3, [0, 1, 2]) == Route(2, "prefix", 3 * BLOCK_TOKENS)
    assert router.route(4 * BLOCK_TOKENS, [], [IDLE] * 3, [0, 1, 2]) == Route(0, "load", 4 * BLOCK_TOKENS)


def test_a_prefix_is_left_where_computing_it_again_is_quicker() -> None:
    router = Router(2)
    long = prompt(*range(TOKENS_PER_REPLY // 4))
    known = len(long) - BLOCK_TOKENS
    router.sent(0, prefix_keys(long, ""))
    keys, replies = prefix_keys(long, ""), MISSING_WEIGHT * known // TOKENS_PER_REPLY
    busy = [[Work(0, replies), IDLE], [Work(0, replies + 1), IDLE], [Work(MISSING_WEIGHT * known + 1, 0), IDLE]]
    routes = [router.route(len(long), keys, work, [0, 1]) for work in busy]
    assert [(route.engine, route.reason) for route in routes] == [(0, "prefix"), (1, "load"), (1, "load")]


def test_equal_engines_take_turns_by_their_replies() -> None:
    router, replies = Router(3), [0, 0, 0]
    for _ in range(9):
        route = router.route(100, [], [Work(0, n) for n in replies], [0, 1, 2])
        replies[route.engine] += 1
    assert replies == [3, 3, 3]


def test_an_engine_that_is_not_ready_is_not_chosen() -> None:
    router = Router(2)
    router.sent(0, prefix_keys(prompt(1, 2), ""))
    assert router.route(32, prefix_keys(prompt(1, 2), ""), [IDLE] * 2, [1]) == Route(1, "only", 32)


def test_one_shared_prefix_does_not_keep_all_requests_on_one_engine() -> None:
    router, work = Router(2), [0, 0]
    for i in range(40):  # none of these requests ends
        keys = prefix_keys(prompt(0, 0, 0, 100 + i), "")
        route = router.route(4 * BLOCK_TOKENS, keys, [Work(0, n) for n in work], [0, 1])
        router.sent(route.engine, keys)
        work[route.engine] += 1
    assert min(work) >= 16


def test_the_queue_is_that_of_all_engines() -> None:
    full, free = Load(waiting=3, started=8, places=8), Load(waiting=0, started=6, places=8)
    check_queue(4, 3, [full, free])  # 3 + 3 waiting, of which 2 find a place
    with pytest.raises(Overloaded, match="3 choices are waiting and the request has 4; 2 places are free"):
        check_queue(4, 4, [full, free])
    with pytest.raises(RequestRejected):
        check_queue(4, 5, [free])
    check_queue(0, 100, [full])
