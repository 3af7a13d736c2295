"""The class `Forecast` predicts how long a new request will wait for its first token, at the least. It serves to refuse
requests whose time limit would expire in the queue."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from jamba_server.engine.errors import Overloaded
from jamba_server.engine.types import EngineStats
from jamba_server.server.http.limits.bucket import Clock

# The rates are measured in windows of at least this number of seconds, during which choices wait all the time.
WINDOW_SECONDS = 1.0
# The forecast uses the fastest of the latest windows. Older windows do not count, because the load may have changed.
MAX_WINDOWS, MAX_AGE_SECONDS = 30, 60.0
MIN_WINDOWS = 3  # with fewer windows, nothing is predicted
# A request is refused only if the predicted time exceeds its time limit this number of times.
SAFETY = 2.0
LONGEST_RETRY_SECONDS = 60


class DeadlineUnreachable(Overloaded):
    """A request whose time limit would expire before the engine can begin its reply."""

    code = "deadline_unreachable"


class Ahead(NamedTuple):
    """The work that the engine does before a new request: `num_choices` choices that begin, whose prompts have
    `num_tokens` tokens together."""

    num_choices: int
    num_tokens: int


class _Window(NamedTuple):
    end: float  # time in seconds, by the clock of the forecast
    choices_per_second: float
    tokens_per_second: float


class Forecast:
    """Measures at which rate choices get their first tokens while other choices wait. `stats` returns the engine's
    latest statistics, and `clock` returns seconds.

    Only times with a queue count, because at other times the load limits the rate. The forecast depends only on the
    calls of `first_token` and on what these two functions return.
    """

    def __init__(self, stats: Callable[[], EngineStats], clock: Clock = time.monotonic) -> None:
        self._stats, self._clock = stats, clock
        self._windows: deque[_Window] = deque(maxlen=MAX_WINDOWS)
        self._begin: float | None = None  # the begin of the present window, or None if there is no queue
        self._num_choices = self._num_tokens = 0

    @property
    def uncached_share(self) -> float:
        """The share of all prompt tokens up to now that were not in the prefix cache."""
        stats = self._stats()
        return 1 - stats.prefix_hits_total / max(1, stats.prefix_queries_total)

    def first_token(self, num_tokens: int) -> None:
        """Records that a choice has got its first token. `num_tokens` is the length of its prompt, or 0 if the prompt
        counts for another choice."""
        now = self._clock()
        if not self._stats().num_waiting:
            self._begin = None
        elif self._begin is None:
            self._begin, self._num_choices, self._num_tokens = now, 0, 0
        else:
            self._num_choices += 1
            self._num_tokens += num_tokens
            if (seconds := now - self._begin) >= WINDOW_SECONDS:
                self._windows.append(_Window(now, self._num_choices / seconds, self._num_tokens / seconds))
                self._begin, self._num_choices, self._num_tokens = now, 0, 0

    def seconds(self, ahead: Ahead) -> float:
        """Returns the time in seconds that the work `ahead` takes at the fastest rates measured lately, or 0 if too
        little was measured or no choice waits now."""
        oldest = self._clock() - MAX_AGE_SECONDS
        recent = [window for window in self._windows if window.end >= oldest]
        waiting = min(ahead.num_choices, self._stats().num_waiting)
        if len(recent) < MIN_WINDOWS or waiting <= 0:
            return 0.0
        # Some choices without a token are not in the queue any more, because they run already.
        tokens = ahead.num_tokens * waiting / ahead.num_choices
        choice_rate = max(window.choices_per_second for window in recent)
        token_rate = max(window.tokens_per_second for window in recent)
        return max(waiting / choice_rate, tokens / token_rate if token_rate else 0.0)

    def check(self, ahead: Ahead, seconds_left: float) -> None:
        """Raises DeadlineUnreachable if a request that has `seconds_left` seconds clearly cannot begin in time after
        the work `ahead`."""
        needed = self.seconds(ahead)
        if needed <= SAFETY * seconds_left:
            return
        raise DeadlineUnreachable(
            f"{ahead.num_choices} choices are ahead of this request, which take about {needed:.1f} s. The request's "
            f"time limit expires in {max(0.0, seconds_left):.1f} s.",
            retry_after=min(LONGEST_RETRY_SECONDS, max(1, math.ceil(needed / SAFETY - seconds_left))),
        )
