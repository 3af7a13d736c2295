"""Adds up the counters of an engine's statistics over restarts of the engine process."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from jamba_server.engine.types import EngineStats, TierStats


def continued(base: EngineStats, now: EngineStats) -> EngineStats:
    """Returns the statistics `now` of the current engine process, with the counters of all earlier engine processes
    added to the counters in `now`. The argument `base` has the counters of all earlier engine processes."""
    totals = {f: getattr(base, f) + getattr(now, f) for f in EngineStats.__struct_fields__ if f.endswith("_total")}
    return msgspec.structs.replace(now, **totals, tiers=continued_tiers(base.tiers, now.tiers))


def continued_tiers(base: TierStats | None, now: TierStats | None) -> TierStats | None:
    """Does the same for the statistics of the prefix cache's tiers. They are None for an engine without tiers."""
    if base is None or now is None:
        return now or base
    totals = {
        field: _sum(getattr(base, field), getattr(now, field))
        for field in TierStats.__struct_fields__
        if field.endswith("_total")
    }
    return msgspec.structs.replace(now, **totals)


def _sum(earlier: Any, later: Any) -> Any:
    if isinstance(later, dict):
        return {key: earlier.get(key, 0) + value for key, value in cast("dict[str, float]", later).items()}
    return earlier + later
