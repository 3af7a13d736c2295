"""SamplingRow: what the sampler has to know about one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from engine.types import SamplingParams


class SamplingRow(NamedTuple):
    """`tokens` are the prompt's `num_prompt` and those generated so far: the sequence's own list, read but never kept.
    `choice` is the number of the choice within its prompt (`Request.index`)."""

    params: SamplingParams
    tokens: Sequence[int]
    num_prompt: int
    choice: int

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt
