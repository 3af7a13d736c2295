"""The class `Bucket` limits how many requests or tokens are used per minute."""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]

SECONDS_PER_MINUTE = 60.0


class Bucket:
    """A token bucket, the usual algorithm for rate limits. The level of the bucket says how many requests or tokens may
    be used now. The level rises at a constant rate.

    A full bucket holds the amount of one minute. The level may become negative, because the length of a reply is known
    only when the reply has ended; then nothing can be used until the level is above zero again. The function `clock`
    returns seconds.
    """

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._then = float(per_minute), clock()

    @property
    def level(self) -> float:
        """Returns the number of requests or tokens that may be used now."""
        now = self._clock()
        gained = (now - self._then) * self.per_minute / SECONDS_PER_MINUTE
        self._level, self._then = min(float(self.per_minute), self._level + gained), now
        return self._level

    def spend(self, amount: float) -> None:
        self._level = self.level - amount

    def seconds_until(self, amount: float) -> float:
        """Returns the number of seconds until the level reaches `amount`, if nothing is used meanwhile."""
        return max(0.0, amount - self.level) * SECONDS_PER_MINUTE / self.per_minute
