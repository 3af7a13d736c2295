"""SamplingRow: what the sampler has to know about one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jamba_server.engine.types import SamplingParams


class SamplingRow(NamedTuple):
    """`tokens` are the prompt's `num_prompt` and those generated so far: the sequence's own list, read but never kept.
    `choice` is the number of the choice within its prompt (`Request.index`). `num_pending` tokens follow that are not
    known on the host yet; a request with penalties or with bad words of several tokens has none."""

    params: SamplingParams
    tokens: Sequence[int]
    num_prompt: int
    choice: int
    num_pending: int = 0

    @property
    def position(self) -> int:
        """Of the token to sample: how many stand before it."""
        return len(self.tokens) + self.num_pending

    @property
    def num_generated(self) -> int:
        return self.position - self.num_prompt
