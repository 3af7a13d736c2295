"""Counts how long the engine's steps took, for each kind of step."""

from __future__ import annotations

from bisect import bisect_left
from typing import get_args

import msgspec

from jamba_server.engine.types import StepKind, StepTime

# Upper bounds of the buckets of the histograms, in seconds. The last bucket has all longer steps.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class StepHistogram(msgspec.Struct, frozen=True):
    """A histogram of the durations of steps. `counts` has the number of steps in each bucket: one for each of the
    BOUNDS, and one for longer steps. `seconds` is the sum of all durations."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    seconds: float = 0.0


class StepTimes:
    """Adds up the durations of steps. An object of this class counts on when the engine is restarted."""

    def __init__(self) -> None:
        self._counts: dict[StepKind, list[int]] = {kind: [0] * (len(BOUNDS) + 1) for kind in get_args(StepKind)}
        self._seconds: dict[StepKind, float] = dict.fromkeys(get_args(StepKind), 0.0)

    def add(self, step: StepTime) -> None:
        self._counts[step.kind][bisect_left(BOUNDS, step.seconds)] += 1
        self._seconds[step.kind] += step.seconds

    def histograms(self) -> dict[StepKind, StepHistogram]:
        return {kind: StepHistogram(tuple(self._counts[kind]), self._seconds[kind]) for kind in self._counts}


def empty_histograms() -> dict[StepKind, StepHistogram]:
    return StepTimes().histograms()
