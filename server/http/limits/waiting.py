"""Limits the number of prompt tokens that wait for the engine, and counts the tokens of each API key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

from jamba_server.engine.errors import Overloaded, RequestRejected
from jamba_server.engine.types import Request, TokenUpdate
from jamba_server.server.http.limits.account import Account

# Tokens per second that a refused client is told to wait for. The engine's rate is not known here; a CPU is this slow.
ASSUMED_RATE = 1000
LONGEST_RETRY_SECONDS = 60


class WaitingTokens:
    """Counts the choices that have no token yet, and the tokens of their prompts.

    At most `limit` tokens may wait; a limit of 0 does not apply.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.total = self.num_choices = 0

    @property
    def retry_after(self) -> int:
        """The number of seconds that a refused client is told to wait."""
        return min(LONGEST_RETRY_SECONDS, 1 + self.total // ASSUMED_RATE)

    def enter(self, num_tokens: int, num_choices: int) -> None:
        """Counts the tokens of one request's prompts, and its choices.

        Raises Overloaded if they exceed the limit together with those of other requests, and RequestRejected if they
        exceed it alone, because then the client could never succeed.
        """
        limit = self._limit
        if limit and num_tokens > limit:
            raise RequestRejected(
                f"The prompts have {num_tokens} tokens together; the limit (--max-queue-tokens) is {limit}."
            )
        if limit and self.total + num_tokens > limit:
            raise Overloaded(
                f"Requests with {self.total} prompt tokens are waiting, and the prompts have {num_tokens}; the limit "
                f"(--max-queue-tokens) is {limit}.",
                retry_after=self.retry_after,
            )
        self.total += num_tokens
        self.num_choices += num_choices

    def leave(self, num_tokens: int, num_choices: int) -> None:
        self.total -= num_tokens
        self.num_choices -= num_choices


class Admission:
    """Admits the engine requests of one HTTP request, and counts their tokens until the end of the `with` block.

    The choices of one prompt share its computation, so the prompt counts once. Entering the block raises Overloaded,
    RateLimited or RequestRejected. `account` is that of the client's API key, or None if the server requires no key.
    """

    def __init__(self, requests: Iterable[Request], waiting: WaitingTokens, account: Account | None) -> None:
        self._waiting, self._account = waiting, account
        # The number of prompt tokens that count for each choice, by the id of the engine's request
        self._lengths: Mapping[str, int] = {r.id: 0 if r.index else len(r.prompt) for r in requests}
        self._without_token: dict[str, int] = {}

    def __enter__(self) -> Self:
        total = sum(self._lengths.values())
        self._waiting.enter(total, len(self._lengths))
        try:
            if self._account is not None:
                self._account.take_prompt(total)
        except BaseException:
            self._waiting.leave(total, len(self._lengths))
            raise
        self._without_token = dict(self._lengths)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.leave(sum(self._without_token.values()), len(self._without_token))
        self._without_token.clear()

    def count(self, update: TokenUpdate) -> None:
        """Counts the tokens of one update of the engine."""
        if not update.token_ids and update.finish_reason is None:
            return
        if (num_tokens := self._without_token.pop(update.request_id, None)) is not None:
            self._waiting.leave(num_tokens, 1)
        if self._account is not None:
            self._account.take_reply(len(update.token_ids))
