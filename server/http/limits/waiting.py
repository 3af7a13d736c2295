"""Limits the number of prompt tokens that wait for the engine, and counts the tokens of each API key."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from jamba_server.engine.errors import Overloaded, RequestRejected
from jamba_server.engine.types import Request, TokenUpdate
from jamba_server.server.http.deadlines import TimeLimit
from jamba_server.server.http.limits.account import Account
from jamba_server.server.http.limits.forecast import Ahead, Forecast

# The prefill rate, in tokens per second, from which the header Retry-After of a refused request is computed. The
# engine's real rate is not known here; this is about the rate of a CPU.
ASSUMED_RATE = 1000
LONGEST_RETRY_SECONDS = 60


class WaitingTokens:
    """Counts the choices that have no token yet, and the tokens of their prompts.

    At most `limit` prompt tokens may wait. If `limit` is 0, there is no limit. With a `forecast`, requests are refused
    whose time limit would expire while they wait.
    """

    def __init__(self, limit: int, forecast: Forecast | None = None) -> None:
        self._limit, self._forecast = limit, forecast
        self.total = self.num_choices = 0
        self._admissions: set[Admission] = set()

    @property
    def retry_after(self) -> int:
        """Returns the number of seconds that a refused client is told to wait (the header Retry-After)."""
        return min(LONGEST_RETRY_SECONDS, 1 + self.total // ASSUMED_RATE)

    def enter(self, num_tokens: int, num_choices: int) -> None:
        """Counts the tokens of one request's prompts, and its choices.

        Raises Overloaded if these tokens and the tokens that already wait exceed the limit together. Raises
        RequestRejected if the tokens of this request alone exceed the limit, because the client could then never
        succeed.
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

    def admitted(self, admission: Admission) -> None:
        self._admissions.add(admission)

    def ended(self, admission: Admission) -> None:
        self._admissions.discard(admission)

    def first_token(self, num_tokens: int) -> None:
        """Records that a choice has got its first token. The arguments are those of `Forecast.first_token`."""
        self.leave(num_tokens, 1)
        if self._forecast is not None:
            self._forecast.first_token(num_tokens)

    def check_time(self, admission: Admission, seconds_left: float) -> None:
        """Raises DeadlineUnreachable if the time limit of a new request, which expires in `seconds_left` seconds, would
        clearly expire in the queue.

        Requests that the engine may run later than the new one do not count as ahead of it: those of other API keys, of
        a less urgent priority, and with a longer prompt. Of the new prompt, only an average share counts as not cached,
        because the engine prefers prompts that are mostly cached.
        """
        if self._forecast is None:
            return
        length = admission.longest * self._forecast.uncached_share
        num_choices = num_tokens = 0
        for other in self._admissions:
            if (other.tenant, other.longest <= length) == (
                admission.tenant,
                True,
            ) and other.priority <= admission.priority:
                num_choices += len(other.without_token)
                num_tokens += sum(other.without_token.values())
        self._forecast.check(Ahead(num_choices, num_tokens), seconds_left)


class Admission:
    """Context manager: checks the limits for one HTTP request, and counts its prompt tokens as waiting until each of
    its choices has its first token or the `with` block ends.

    A prompt with several choices is computed once, so it also counts once. Entering the block raises Overloaded,
    RateLimited or RequestRejected if a limit is exceeded, or if `time_limit` would expire in the queue. `account` is
    the account of the client's API key, or None if the server requires no key.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        waiting: WaitingTokens,
        account: Account | None,
        time_limit: TimeLimit | None = None,
    ) -> None:
        self._waiting, self._account, self._time_limit = waiting, account, time_limit
        self.tenant, self.priority = requests[0].tenant, requests[0].priority
        self.longest = max(len(request.prompt) for request in requests)
        # Maps the id of each choice's engine request to the number of prompt tokens that count for the choice.
        self._lengths: Mapping[str, int] = {r.id: 0 if r.index else len(r.prompt) for r in requests}
        self.without_token: dict[str, int] = {}  # the part of `_lengths` of those choices that have no token yet

    def __enter__(self) -> Self:
        if self._time_limit is not None:
            self._waiting.check_time(self, self._time_limit.end - asyncio.get_running_loop().time())
        total = sum(self._lengths.values())
        self._waiting.enter(total, len(self._lengths))
        try:
            if self._account is not None:
                self._account.take_prompt(total)
        except BaseException:
            self._waiting.leave(total, len(self._lengths))
            raise
        self.without_token = dict(self._lengths)
        self._waiting.admitted(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.leave(sum(self.without_token.values()), len(self.without_token))
        self.without_token.clear()
        self._waiting.ended(self)

    def count(self, update: TokenUpdate) -> None:
        """Counts the new tokens that one update of the engine brings. With the first token of a choice, its prompt no
        longer counts as waiting."""
        if not update.token_ids and update.finish_reason is None:
            return
        if (num_tokens := self.without_token.pop(update.request_id, None)) is not None:
            if not self.without_token:
                self._waiting.ended(self)
            if update.token_ids:
                self._waiting.first_token(num_tokens)
            else:
                self._waiting.leave(num_tokens, 1)
        if self._account is not None:
            self._account.take_reply(len(update.token_ids))
