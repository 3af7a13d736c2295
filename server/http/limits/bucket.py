"""The class `Bucket` limits a rate: so many requests or tokens a minute."""

from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]

SECONDS_PER_MINUTE = 60.0


class Bucket:
    """A token bucket. It holds what may be spent at once, and fills up at a constant rate.

    A full bucket holds the amount of one minute. The level may become negative, because the length of a reply is only
    known afterwards; then nothing can be spent until the level is above zero again. The function `clock` returns
    seconds.
    """

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._level, self._then = float(per_minute), clock()

    @property
    def level(self) -> float:
        """What may be spent now."""
        now = self._clock()
        gained = (now - self._then) * self.per_minute / SECONDS_PER_MINUTE
        self._level, self._then = min(float(self.per_minute), self._level + gained), now
        return self._level

    def spend(self, amount: float) -> None:
        self._level = self.level - amount

    def seconds_until(self, amount: float) -> float:
        """Returns the number of seconds until the level reaches `amount`, if nothing is spent meanwhile."""
        return max(0.0, amount - self.level) * SECONDS_PER_MINUTE / self.per_minute
