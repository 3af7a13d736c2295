"""Adds up what several engines report, so that they look like one engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from jamba_server.engine.process.client import Health, SupervisionStats
from jamba_server.engine.process.step_times import StepHistogram
from jamba_server.engine.types import EngineInfo, EngineStats

# These sizes of an engine add up. Of all others, the smallest counts, or what the first engine says.
_ADDED = (
    "max_num_seqs", "num_kv_blocks", "num_state_slots", "num_saved_states", "weight_bytes", "kv_bytes", "state_bytes",
)  # fmt: skip
_SMALLEST = ("max_model_len", "max_num_batched_tokens", "max_num_mixed_tokens")


def total_info(infos: Sequence[EngineInfo | None]) -> EngineInfo:
    """Returns the properties of all engines together. An engine that has not loaded yet (None) counts like the first
    that has. At least one must have loaded."""
    loaded = [info for info in infos if info is not None]
    all_infos = [loaded[0] if info is None else info for info in infos]
    changes: dict[str, Any] = {name: sum(getattr(info, name) for info in all_infos) for name in _ADDED}
    changes |= {name: min(getattr(info, name) for info in all_infos) for name in _SMALLEST}
    changes["load_seconds"] = max(info.load_seconds for info in loaded)
    changes["warnings"] = tuple(dict.fromkeys(warning for info in loaded for warning in info.warnings))
    return msgspec.structs.replace(loaded[0], **changes)


def total_stats(stats: Sequence[EngineStats], infos: Sequence[EngineInfo | None]) -> EngineStats:
    """Returns the sums. Before its first step, an engine has not told its capacities, so `infos` tell them."""
    known = [_with_capacities(each, info) for each, info in zip(stats, infos, strict=True)]
    names = [name for name in EngineStats.__struct_fields__ if name != "tiers"]
    sums: dict[str, Any] = {name: sum(getattr(each, name) for each in known) for name in names}
    return EngineStats(**sums)


def _with_capacities(stats: EngineStats, info: EngineInfo | None) -> EngineStats:
    if stats.num_steps_total or info is None:
        return stats
    return msgspec.structs.replace(
        stats, kv_blocks_capacity=info.num_kv_blocks, state_slots_capacity=info.num_state_slots
    )


def total_supervision(parts: Sequence[SupervisionStats]) -> SupervisionStats:
    return SupervisionStats(
        restarts={reason: sum(part.restarts[reason] for part in parts) for reason in parts[0].restarts},
        replayed_requests=sum(part.replayed_requests for part in parts),
        pauses=sum(part.pauses for part in parts),
        backlog_bytes=sum(part.backlog_bytes for part in parts),
        step_times={
            kind: StepHistogram(
                tuple(map(sum, zip(*(part.step_times[kind].counts for part in parts), strict=True))),
                sum(part.step_times[kind].seconds for part in parts),
            )
            for kind in parts[0].step_times
        },
    )


def total_health(parts: Sequence[Health]) -> Health:
    """Returns the state of all engines together: they are alive and ready if one of them is, and loading until the
    first has loaded. `loading` is then the progress of the one that has come furthest."""
    alive = [part for part in parts if part.alive]
    loading = [part.loading for part in parts if part.loading is not None]
    reasons = [f"engine {i}: {part.reason}" for i, part in enumerate(parts) if part.reason]
    return Health(
        alive=bool(alive),
        ready=any(part.ready for part in alive),
        reason="; ".join(reasons),
        loading=max(loading, key=lambda progress: progress.fraction) if alive and len(loading) == len(alive) else None,
    )
