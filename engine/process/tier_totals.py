"""Adds up the counters of the prefix cache's tiers over restarts of the engine process."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from jamba_server.engine.types import TierStats


def continued(base: TierStats | None, now: TierStats | None) -> TierStats | None:
    """Returns the statistics `now` of the current engine process, with the counters of all earlier engine processes in
    `base` added."""
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
