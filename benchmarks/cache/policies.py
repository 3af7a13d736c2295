"""The policies that the trace table compares: subclasses of the engine's `SavePolicy`, sizes of pages, and divisions of
the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from typing_extensions import override

from jamba_server.engine.cache.policy import SavePolicy
from jamba_server.engine.cache.reuse import Kind
from jamba_server.engine.sequence import Sequence


class LeastRecentlyUsed(SavePolicy):
    """Saves the same states as this server. The least recently used state is evicted first, and so is the least
    recently used page."""

    protects_pages = False

    @override
    def saved(self, key: bytes, position: int, kind: Kind) -> float:
        return 0.0

    @override
    def hit(self, key: bytes, position: int) -> float | None:
        return None


class PromptEnd(LeastRecentlyUsed):
    """Saves a state at the end of each prompt and nowhere else."""

    saves_answers = False

    @override
    def positions(self, seq: Sequence) -> Iterator[tuple[int, Kind]]:
        yield seq.num_prompt, Kind.PROMPT
        yield seq.num_prompt - 1, Kind.PROMPT


class BlockRule(LeastRecentlyUsed):
    """Saves states where vLLM 0.33 saves them by default: at the last border of a block before the last token of the
    prompt, and at the last border of a block before another request branched off. The manager rounds positions down to
    such a border. No state of a reply is saved."""

    saves_answers = False

    @override
    def positions(self, seq: Sequence) -> Iterator[tuple[int, Kind]]:
        yield seq.branch, Kind.BRANCH
        yield seq.num_prompt - 1, Kind.PROMPT


class Tokens(SavePolicy):
    """A state is worth the number of tokens that a hit saves, whatever its kind."""

    @override
    def saved(self, key: bytes, position: int, kind: Kind) -> float:
        return position

    @override
    def hit(self, key: bytes, position: int) -> float | None:
        return None


class WithoutPages(SavePolicy):
    """This server's policy, but pages are evicted in the order of their last use, and states whose pages are gone
    stay."""

    protects_pages = False


class WithoutTokens(SavePolicy):
    """This server's policy, but all hits count the same, however many tokens they save."""

    @override
    def saved(self, key: bytes, position: int, kind: Kind) -> float:
        return super().saved(key, 1, kind)

    @override
    def hit(self, key: bytes, position: int) -> float | None:
        return super().hit(key, 1)


class WithoutHits(SavePolicy):
    """This server's policy, but states that have been hit before are not counted apart from the others."""

    @override
    def hit(self, key: bytes, position: int) -> float | None:
        life = self._reuse.hit(key)
        return None if life is None else position * self._reuse.share(self._reuse.save(key, life.kind))


class WithoutKinds(SavePolicy):
    """This server's policy, but all kinds of states are counted together."""

    @override
    def saved(self, key: bytes, position: int, kind: Kind) -> float:
        return super().saved(key, position, Kind.PROMPT)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table. `block_size` is the number of tokens in a page. Saved states get a part of the cache memory;
    `shares` has the parts to try, of which the one with the best hit rate counts. With `regular`, a state is also saved
    at regular distances."""

    name: str
    policy: Callable[[int], SavePolicy] = SavePolicy
    block_size: int = 16
    shares: tuple[float, ...] = (0.25,)
    regular: bool = True
    enabled: bool = True


# vLLM's rule for the size of a block: the least multiple of 16 tokens whose keys and values in one attention layer have
# as many bytes as the state of one Mamba layer. For the shape `small`, as for Jamba Mini, that is 144 tokens. vLLM has
# one pool for states and pages, so that their shares follow the load; the best of several fixed shares stands for that.
ROWS = (
    Row("this server"),
    Row("LRU", LeastRecentlyUsed),
    Row("end of the prompt only, LRU", PromptEnd, regular=False),
    Row("vLLM's block rule, LRU", BlockRule, block_size=144, shares=(0.25, 0.5, 0.75), regular=False),
    Row("no cache", enabled=False),
)
PARTS = (
    Row("this server"),
    Row("without protecting pages", WithoutPages),
    Row("without the number of tokens", WithoutTokens),
    Row("without counting kinds apart", WithoutKinds),
    Row("without counting hit states apart", WithoutHits),
    Row("tokens only", Tokens),
    Row("half of the memory for states", shares=(0.5,)),
)
