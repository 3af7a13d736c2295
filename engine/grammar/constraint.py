"""Constraint: what may follow in the reply of one sequence, after the tokens that the reply has.

Everything here depends on the tokens of the reply only. So a reply is the same in any batch, after a preemption, and
in a restarted engine, which gives the tokens of the reply to a new constraint one by one.
"""

from __future__ import annotations

from collections.abc import Iterable

from llguidance import LLMatcher

from jamba_server.engine.types import SamplingParams

_MAX_ERROR_CHARS = 500


class Constraint:
    """The grammar and the budget of thinking tokens of one sequence.

    `forced` are the tokens that must come next, in this order; it is empty if there is a choice. After the tokens of
    `forced`, the constraint finds the next ones. They are found at once and not token by token, because the text that a
    grammar forces has more than one sequence of tokens, and llguidance finds the one that the tokenizer would make of
    the text. `is_over` says that the reply has the end token that ends the grammar. `error` is the message of the error
    that ends the request, or "".
    """

    def __init__(self, params: SamplingParams, matcher: LLMatcher | None, eos_token_ids: Iterable[int]) -> None:
        self.matcher, self.is_over, self.error = matcher, False, ""
        self._eos = frozenset(eos_token_ids)
        self._end = params.thinking_end
        self._budget = params.thinking_token_budget
        self._count = 0  # number of tokens of the reply
        self._matched = 0  # number of tokens at the end of the reply that are the first tokens of `thinking_end`
        # `bad_words` and `allowed_token_ids` may forbid a token of a forced text. Then the mask of this token is empty,
        # which ends the request with an error.
        self._follows_text = matcher is not None and not (params.bad_words or params.allowed_token_ids)
        self.forced = self._next_forced()

    @classmethod
    def without_grammar(cls, params: SamplingParams) -> Constraint | None:
        """Returns the constraint of a request that has no grammar, or None if nothing constrains the request."""
        return None if params.thinking_token_budget is None else cls(params, None, ())

    @property
    def restricts(self) -> bool:
        """Whether some tokens must not come next."""
        return bool(self.forced) or self.matcher is not None

    def take(self, token_id: int) -> None:
        """Records the next token of the reply."""
        self._count += 1
        self._find_end_of_thoughts(token_id)
        if self.matcher is not None and not self.matcher.consume_token(token_id):
            self.fail()
            return
        self.is_over = self.matcher is not None and token_id in self._eos
        self.forced = self.forced[1:] if self.forced else self.forced
        if not (self.forced or self.is_over):
            self.forced = self._next_forced()

    def take_all(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self.take(token_id)

    def waits(self, num_generated: int) -> bool:
        """Returns whether the token after `num_generated` tokens of the reply depends on all tokens before it. The
        reply may have more tokens than this object was told."""
        return self.matcher is not None or (self._budget is not None and num_generated >= self._budget)

    def fail(self) -> None:
        """Ends the request with the error that the matcher reports."""
        assert self.matcher is not None
        problem = self.matcher.get_error().strip() or "the grammar does not allow the token"
        self.error, self.forced = f"The grammar of this reply failed: {problem[:_MAX_ERROR_CHARS]}", ()

    def _find_end_of_thoughts(self, token_id: int) -> None:
        """Looks for the mark `thinking_end` in the reply, which gets the token `token_id`. Once the mark has appeared,
        the budget has no effect."""
        if self._budget is None:
            return
        tail = (*self._end[: self._matched], token_id)
        self._matched = next(n for n in range(len(tail), -1, -1) if tail[len(tail) - n :] == self._end[:n])
        if self._matched == len(self._end):
            self._budget = None

    def _next_forced(self) -> tuple[int, ...]:
        if self._budget is not None and self._count >= self._budget:
            mark = self._end[self._matched :]
            if self.matcher is None or self.matcher.validate_tokens(list(mark)) == len(mark):
                return mark
        if self.matcher is None or not self._follows_text:
            return ()
        found = tuple(self.matcher.compute_ff_tokens())
        if self.matcher.is_error():
            self.fail()
            return ()
        return found
