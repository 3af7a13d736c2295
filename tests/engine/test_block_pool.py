"""Which cached block `BlockPool` evicts first."""

from __future__ import annotations

import pytest

from jamba_server.engine.cache.block_pool import BlockPool


def fill(pool: BlockPool, worths: dict[bytes, float]) -> None:
    for key, worth in worths.items():
        ids = pool.allocate(1)
        assert ids is not None
        pool.publish(ids[0], key, worth=worth)
        pool.release(ids)


def survivors(pool: BlockPool, keys: list[bytes]) -> list[bytes]:
    return [key for key in keys if pool.lookup(key) is not None]


def test_of_equal_worth_the_least_recently_used_goes_first() -> None:
    pool = BlockPool(4)
    fill(pool, {b"a": 1, b"b": 1, b"c": 1})
    found = pool.lookup(b"a")
    assert found is not None
    pool.retain([found])
    pool.release([found])
    fill(pool, {b"d": 1})
    assert survivors(pool, [b"a", b"b", b"c", b"d"]) == [b"a", b"c", b"d"]
    assert pool.was_evicted(b"b")


def test_what_is_worth_more_stays_longer_but_not_for_ever() -> None:
    pool = BlockPool(3)
    fill(pool, {b"dear": 100})
    num_fills = 0
    while pool.lookup(b"dear") is not None:
        fill(pool, {b"cheap%d" % num_fills: 3})
        num_fills += 1
    assert 30 < num_fills < 40, "each eviction of a cheap unit ages the dear one by 3"


def test_units_without_a_key_go_before_cached_ones() -> None:
    pool = BlockPool(4)
    fill(pool, {b"a": 1})
    assert pool.allocate(3, evict=False) is None
    ids = pool.allocate(2, evict=False)
    assert ids is not None
    assert pool.lookup(b"a") is not None
    assert pool.allocate(2) is None
    assert pool.num_free == 1


def test_a_unit_has_one_key_and_a_key_one_unit() -> None:
    pool = BlockPool(3)
    ids = pool.allocate(2)
    assert ids is not None
    first, second = ids
    assert pool.publish(first, b"a")
    assert not pool.publish(first, b"b")
    assert not pool.publish(second, b"a")
    assert pool.lookup(b"a") == first
    assert pool.lookup(b"b") is None


def test_the_queue_does_not_grow_with_use() -> None:
    pool = BlockPool(8)
    fill(pool, {b"a": 1})
    found = pool.lookup(b"a")
    assert found is not None
    for _ in range(1000):
        pool.retain([found])
        pool.release([found])
    assert len(pool._queue) <= 16  # pyright: ignore[reportPrivateUsage]


def test_a_double_release_is_caught() -> None:
    pool = BlockPool(2)
    ids = pool.allocate(1)
    assert ids is not None
    pool.release(ids)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(ids)
