"""The policies that the trace table compares. A policy is a subclass of the engine's `SavePolicy`, a size of pages, and a
division of the memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from typing_extensions import override

from jamba_server.engine.cache.policy import Kind, SavePolicy
from jamba_server.engine.sequence import Sequence

BLOCK_SIZE = 16


class LeastRecentlyUsed(SavePolicy):
    """Saves the same states as this server. The least recently used state is evicted first."""

    @override
    def worth(self, tokens: int, kind: Kind) -> float:
        return 0.0


class PromptEnd(LeastRecentlyUsed):
    """Saves a state at the end of each prompt and nowhere else."""

    saves_answers = False

    @override
    def positions(self, seq: Sequence) -> list[tuple[int, Kind]]:
        return [(seq.num_prompt, Kind.PROMPT), (seq.num_prompt - 1, Kind.PROMPT)]


class BlockRule(LeastRecentlyUsed):
    """Saves states where vLLM 0.33 saves them by default: at the last border of a block before the last token of the
    prompt, and at the last border of a block before another request branched off. The manager rounds positions down to
    such a border. vLLM's scheduler keeps no state of a reply."""

    saves_answers = False

    @override
    def positions(self, seq: Sequence) -> list[tuple[int, Kind]]:
        return [(seq.branch, Kind.BRANCH), (seq.num_prompt - 1, Kind.PROMPT)]


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the table. `blocks` is the number of tokens in a page. Of the cache memory, the share `states` holds
    saved states. If several shares are given, the one with the best hit rate counts."""

    name: str
    policy: type[SavePolicy] = SavePolicy
    block_size: int = BLOCK_SIZE
    shares: tuple[float, ...] = (0.25,)
    interval: bool = False
    enabled: bool = True
    options: dict[str, object] = field(default_factory=dict[str, object])
