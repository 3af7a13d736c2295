"""The random work of `test_scheduler_fuzz` finds planted faults in reading, writing, pinning and waiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest

from jamba_server.engine import joining
from jamba_server.engine.cache.block_pool import BlockPool
from jamba_server.engine.cache.manager import CacheManager
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.types import CacheUse
from tests.engine.test_scheduler_fuzz import run


def reads_always(patch: pytest.MonkeyPatch) -> None:
    def reads(seq: Sequence) -> bool:
        return seq.params.prompt_logprobs is None and seq.request.pooling != "mean"

    patch.setattr(Sequence, "reads_cache", property(reads))


def writes_at_the_end(patch: pytest.MonkeyPatch) -> None:
    free = CacheManager.free

    def faulty(self: CacheManager, seq: Sequence) -> None:
        request = seq.request
        seq.request = msgspec.structs.replace(request, cache=CacheUse())
        free(self, seq)
        seq.request = request

    patch.setattr(CacheManager, "free", faulty)


def evicts_pinned_blocks_like_others(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockPool, "_lowest", lambda self: min(self._ranks, key=self._ranks.__getitem__))


def pins_only_blocks_that_are_free(patch: pytest.MonkeyPatch) -> None:
    """A pinned block that is used and released again is forgotten."""
    release = BlockPool.release

    def faulty(self: BlockPool, ids: Iterable[int]) -> None:
        fields = vars(self)
        fields["_pins"], pins = Counter[bytes](), fields["_pins"]
        release(self, ids)
        fields["_pins"] = pins

    patch.setattr(BlockPool, "release", faulty)


def saves_evict_pinned_states(patch: pytest.MonkeyPatch) -> None:
    allocate = BlockPool.allocate

    def faulty(self: BlockPool, n: int, *, evict: bool = True, evict_pinned: bool = True) -> list[int] | None:
        return allocate(self, n, evict=evict)

    patch.setattr(BlockPool, "allocate", faulty)


def pins_take_all_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("jamba_server.engine.cache.pins.PINNED_PART", 1)


def waits_for_other_tokens(patch: pytest.MonkeyPatch) -> None:
    def faulty(ours: list[bytes], theirs: list[bytes], limit: int, *, at_least: int) -> int:
        return limit

    patch.setattr(joining, "_common", faulty)


def waits_for_what_nobody_writes(patch: pytest.MonkeyPatch) -> None:
    def faulty(self: joining.Joining, running: Iterable[Sequence], work: int) -> Callable[[Sequence], bool]:
        return lambda seq: not self.must_wait(seq, running, work)

    patch.setattr(joining.Joining, "gate", faulty)


FAULTS: list[tuple[Callable[[Any], None], str]] = [
    (reads_always, "must not read has read"),
    (writes_at_the_end, "must not write has left something"),
    (evicts_pinned_blocks_like_others, "before one that is not pinned"),
    (pins_only_blocks_that_are_free, "made room for another saved state|before one that is not pinned"),
    (saves_evict_pinned_states, "made room for another saved state|before one that is not pinned"),
    (pins_take_all_memory, "more than their share"),
    (waits_for_other_tokens, "waits for nothing"),
    (waits_for_what_nobody_writes, "waits for nothing"),
]


@pytest.mark.parametrize(("plant", "message"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_fuzz_finds_it(plant: Callable[[Any], None], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=message):
        for seed in range(100):
            run(seed, "slots", ahead=False)
