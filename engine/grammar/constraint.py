"""The class `Constraint` says which tokens may come next in the reply of one sequence, given the tokens that the reply
already has.

A constraint depends only on the parameters of the request and on the tokens of the reply. Therefore a reply is the same
in any batch and after a preemption. It is also the same in a restarted engine, which makes a new constraint and passes
the tokens of the reply to it one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from llguidance import LLMatcher

from jamba_server.engine.types import SamplingParams

logger = logging.getLogger(__name__)

_MAX_ERROR_CHARS = 500


class Constraint:
    """Applies to one sequence its grammar, and the limit on the number of its reasoning tokens
    (`thinking_token_budget`).

    `forced` has the tokens that must come next, in this order. It is empty if several tokens are allowed. All forced
    tokens are determined together and not one by one: the same text can be written with different tokens, and
    llguidance chooses those that the tokenizer would make from the whole text. `is_over` is true after the end token
    with which the grammar ends. `error` is the message of the error that ends the request, or "" if there is no error.
    `contradictory` is true if the error was raised because other parameters of the request forbid all tokens that the
    grammar allows.
    """

    def __init__(self, params: SamplingParams, matcher: LLMatcher | None, eos_token_ids: Iterable[int]) -> None:
        self.matcher, self.is_over, self.error, self.contradictory = matcher, False, "", False
        self._eos = frozenset(eos_token_ids)
        self._end = params.thinking_end
        self._budget = params.thinking_token_budget
        self._count = 0  # counts the tokens that the reply has so far
        # The last tokens of the reply, as many as this number says, are equal to the first tokens of `thinking_end`.
        self._matched = 0
        # Forced tokens are computed only without `bad_words` and `allowed_token_ids`, because these parameters may
        # forbid a token of the forced text. With these parameters every token is sampled under a mask. A mask that
        # allows no token ends the request with an error.
        self._follows_text = matcher is not None and not (params.bad_words or params.allowed_token_ids)
        self.forced = self._next_forced()

    @classmethod
    def without_grammar(cls, params: SamplingParams) -> Constraint | None:
        """Returns the constraint of a request that has no grammar, or None if nothing constrains the request."""
        return None if params.thinking_token_budget is None else cls(params, None, ())

    @property
    def restricts(self) -> bool:
        """Returns whether some tokens are forbidden at the next position of the reply."""
        return bool(self.forced) or self.matcher is not None

    def take(self, token_id: int) -> None:
        """Records the next token of the reply. If that fails, `error` is set."""
        try:
            self._take(token_id)
        except BaseException as error:  # noqa: BLE001 - `break_off` logs the error
            self.break_off(error)

    def _take(self, token_id: int) -> None:
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
        """Returns whether the choice of the next token needs the values of all earlier tokens of the reply.
        `num_generated` is the number of these earlier tokens, including those that have been sampled but not yet passed
        to `take`."""
        return self.matcher is not None or (self._budget is not None and num_generated >= self._budget)

    def fail(self) -> None:
        """Ends the request with the error that llguidance's matcher for the grammar reports."""
        assert self.matcher is not None
        problem = self.matcher.get_error().strip() or "the grammar does not allow the token"
        self.error, self.forced = f"The grammar of this reply failed: {problem[:_MAX_ERROR_CHARS]}", ()

    def break_off(self, error: BaseException) -> None:
        """Ends the request because llguidance has raised an exception. Raises the exception again if it is an interrupt
        from the keyboard or the end of the program. A panic of llguidance, which is written in Rust, is an exception
        that is no subclass of Exception."""
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        logger.error("the grammar of a request failed", exc_info=error)
        self.error, self.forced = f"The grammar of this reply failed: {error!r}"[:_MAX_ERROR_CHARS], ()

    def _find_end_of_thoughts(self, token_id: int) -> None:
        """Updates the search for the token sequence `thinking_end`, which ends the model's reasoning, after the token
        `token_id` was added to the reply. Once this sequence is complete, the limit on reasoning tokens has no
        effect."""
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
