"""What each stage of a pipeline needs, for `jamba plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jamba_server.engine.cache.spec import CacheSpec
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_cache import wanted_layout
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.parallel.shards import Parts
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.start.machine import format_bytes
from jamba_server.engine.start.memory_plan import MemoryPlan, plan_memory, smallest_plan
from jamba_server.engine.start.rank_options import check_options, shard_of, stages_of
from jamba_server.engine.weight_sizes import rank_weight_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What the rank of a stage owns that has most weights, and the sizes of its caches."""

    parts: Parts
    weight_bytes: int
    spec: CacheSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class StageReport:
    """What a rank of a stage needs: of the stage's ranks, the one with most weights. `kv_bytes` and `state_bytes` are
    the sizes of all pages and states that the server would allocate, or None if it would not start. For each token of a
    step, the rank sends `bytes_to_next_stage`."""

    first_layer: int
    last_layer: int
    weight_bytes: int
    kv_bytes_per_token: int
    state_bytes_per_sequence: int
    kv_bytes: int | None
    state_bytes: int | None
    bytes_to_next_stage: int


def shares(model: JambaConfig, engine: EngineConfig, policy: QuantizationPolicy, dtype_bytes: int) -> list[Share]:
    """Returns what one rank of each stage owns. Raises ConfigError if the model cannot be divided."""
    check_options(engine)
    found: list[Share] = []
    for stage in stages_of(engine, model):
        shards = [shard_of(engine, rank) for rank in range(engine.tensor_parallel_size)]
        owned = [Parts.of(model, shard, policy, stage) for shard in shards]
        sizes = [rank_weight_bytes(model, dtype_bytes, parts=parts, policy=policy) for parts in owned]
        parts = owned[sizes.index(max(sizes))]
        spec = CacheSpec.of(wanted_layout(model, engine, parts))
        found.append(Share(parts=parts, weight_bytes=max(sizes), spec=spec))
    return found


def plans_or_refusal(
    model: JambaConfig, engine: EngineConfig, owned: Sequence[Share], available: int, device: str
) -> tuple[list[MemoryPlan] | None, str | None]:
    """Returns the memory plan of each stage, on a device of its own that has `available` bytes, with sizes that all
    stages can have. Returns the reason instead if the server would not start."""
    plans: list[MemoryPlan] = []
    for share in owned:
        layout = wanted_layout(model, engine, share.parts)
        sizes: dict[str, Any] = {"weight_bytes": share.weight_bytes, "available_bytes": available, "device": device}
        try:
            plans.append(plan_memory(model, engine, layout, **sizes))
        except ConfigError as error:
            return None, str(error) if len(owned) == 1 else f"{share.parts.stage}: {error}"
    if len(plans) == 1:
        return plans, None
    asked: list[list[int]] = []
    for plan in plans:
        smallest_plan(plan, lambda sizes: asked.append(sizes) or sizes)
    agreed = [min(sizes) for sizes in zip(*asked, strict=True)]
    return [smallest_plan(plan, lambda _: agreed) for plan in plans], None


def stage_reports(
    model: JambaConfig, owned: Sequence[Share], plans: Sequence[MemoryPlan] | None, dtype_bytes: int
) -> tuple[StageReport, ...]:
    return tuple(
        StageReport(
            first_layer=share.parts.stage.layers[0],
            last_layer=share.parts.stage.layers[-1],
            weight_bytes=share.weight_bytes,
            kv_bytes_per_token=share.spec.kv_bytes_per_token,
            state_bytes_per_sequence=share.spec.bytes_per_slot,
            kv_bytes=None if plans is None else plans[number].kv_bytes,
            state_bytes=None if plans is None else plans[number].state_bytes,
            bytes_to_next_stage=0 if share.parts.stage.is_last else model.hidden_size * dtype_bytes,
        )
        for number, share in enumerate(owned)
    )


def describe_stages(stages: Sequence[StageReport]) -> list[str]:
    """Returns a line for each of several stages."""
    if len(stages) == 1:
        return []
    return [
        f"stage {number}".ljust(24) + f"layers {stage.first_layer} to {stage.last_layer}: "
        f"weights {format_bytes(stage.weight_bytes)}, {stage.kv_bytes_per_token:,} bytes of KV per token, state "
        f"{format_bytes(stage.state_bytes_per_sequence)}"
        + (
            ""
            if stage.kv_bytes is None or stage.state_bytes is None
            else f"; KV pages {format_bytes(stage.kv_bytes)}, states {format_bytes(stage.state_bytes)}"
        )
        for number, stage in enumerate(stages, start=1)
    ]
