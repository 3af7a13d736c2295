"""The class `SamplingRow`: what the sampler must know about a sequence to sample one token of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jamba_server.engine.types import SamplingParams


class SamplingRow(NamedTuple):
    """What the sampler must know to sample one token. The field `tokens` has the `num_prompt` tokens of the prompt,
    then the generated tokens that the host knows. This array belongs to the sequence and grows later, so the sampler
    keeps no reference to it. If a prompt gets several replies, `choice` is the number of the reply that gets the token,
    counted from 0 (`Request.index`). Between the last of `tokens` and the token to sample there are `num_pending`
    tokens that the device has not reported to the host yet. `num_pending` is 0 for requests with penalties or with bad
    words of several tokens. If `num_pending` is a negative number -k, the token is sampled after an earlier position, k
    tokens before the end of `tokens`."""

    params: SamplingParams
    tokens: Sequence[int]
    num_prompt: int
    choice: int
    num_pending: int = 0

    @property
    def position(self) -> int:
        """Returns the position of the token to sample, which is the number of tokens before this token."""
        return len(self.tokens) + self.num_pending

    @property
    def num_generated(self) -> int:
        return self.position - self.num_prompt
