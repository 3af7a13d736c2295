"""SamplingRow: the facts about one sequence that the sampler needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jamba_server.engine.types import SamplingParams


class SamplingRow(NamedTuple):
    """One token to sample. `tokens` are the `num_prompt` tokens of the prompt and those generated so far. They are the
    sequence's own array, and the sampler keeps no reference to it. `choice` is the number of the reply among those to
    the same prompt (`Request.index`). `num_pending` more tokens have been sampled but are not known on the host yet; it
    is 0 for requests with penalties or with bad words of several tokens. A negative number -k means that the
    token is sampled after an earlier position, k tokens before the end of `tokens`."""

    params: SamplingParams
    tokens: Sequence[int]
    num_prompt: int
    choice: int
    num_pending: int = 0

    @property
    def position(self) -> int:
        """Returns the position of the token to sample, which is the number of tokens before it."""
        return len(self.tokens) + self.num_pending

    @property
    def num_generated(self) -> int:
        return self.position - self.num_prompt
