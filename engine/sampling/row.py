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

    def early_ends(self, eos_token_ids: tuple[int, ...]) -> set[int]:
        """Returns the end tokens and stop tokens that are forbidden as the next token. Until the reply has `min_tokens`
        tokens, all of them are forbidden. That also holds with `ignore_eos`, because an end token in the text would
        make the reply look finished. If the request has a grammar, `ignore_eos` forbids the end tokens at every
        position."""
        early = set[int]()
        if self.num_generated < self.params.min_tokens:
            early.update(eos_token_ids, self.params.stop_token_ids)
        if self.params.ignore_eos and self.params.grammar:
            early.update(eos_token_ids)
        return early

    def ends_of_bad_words(self) -> set[int]:
        """Returns the tokens that would complete one of the request's `bad_words`: the last token of each bad word
        whose other tokens are at the end of the reply."""
        return {word[-1] for word in self.params.bad_words if self._ends_with(word[:-1])}

    def _ends_with(self, beginning: tuple[int, ...]) -> bool:
        """Returns whether the generated tokens end with `beginning`. Tokens of the prompt do not count, as in vLLM."""
        size = len(beginning)
        return size == 0 or (self.num_generated >= size and tuple(self.tokens[-size:]) == beginning)
