"""This module lists the implementations of every op, and selects one implementation for each op.

To add an implementation, add one line to the constant `TABLE`. Of two implementations of one op, the implementation
further up in `TABLE` is preferred.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Final

from jamba_server.kernels import external, torch_ops
from jamba_server.kernels.cpu import attention as cpu_attention
from jamba_server.kernels.cpu import bitmask as cpu_bitmask
from jamba_server.kernels.cpu import conv as cpu_conv
from jamba_server.kernels.cpu import linear as cpu_linear
from jamba_server.kernels.cpu import mamba as cpu_mamba
from jamba_server.kernels.cpu import moe as cpu_moe
from jamba_server.kernels.cpu import norm as cpu_norm
from jamba_server.kernels.cpu import route as cpu_route
from jamba_server.kernels.cpu import sample as cpu_sample
from jamba_server.kernels.cpu import scan as cpu_scan
from jamba_server.kernels.cpu import slots as cpu_slots
from jamba_server.kernels.ops import Kernels, KernelUnavailable
from jamba_server.kernels.reference import attention, bitmask, conv, linear, mamba, moe, norm, sample, scan, slots
from jamba_server.kernels.triton import ensure_available

logger = logging.getLogger(__name__)


class KernelError(ValueError):
    """This error says that the kernels cannot be selected as requested. The message gives the reason."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """Names one implementation of an op and the devices ("cpu", "cuda") on which the implementation runs.

    The function `load` returns a callable that implements the op's protocol in `kernels.ops`. If the implementation
    cannot run, `load` raises KernelUnavailable, ImportError (a package is missing) or OSError (a shared library is
    missing). `parts` names the ops that a fused op replaces; they come before the fused op in the constant `OPS`.
    `load` receives the chosen implementation of each part. If `batch_invariant` is true, a row's bits depend neither on
    the other rows of the batch nor on chunked prefill.
    """

    op: str
    name: str
    devices: tuple[str, ...]
    load: Callable[..., Any]
    parts: tuple[str, ...] = ()
    batch_invariant: bool = True


@dataclass(frozen=True, slots=True)
class TableRow:
    """Contains the status of one implementation of an op, for the report that `python -m jamba_server.kernels` prints.

    `status` is "selected", "available", or the reason why the implementation cannot run.
    """

    op: str
    implementation: str
    status: str
    batch_invariant: bool = True


def _triton(module: str, name: str) -> Callable[[], Any]:
    """Returns a function that loads the op `name` from a module of `kernels.triton`.

    The module can be imported only where triton is installed, so the returned function imports the module when called.
    """

    def load(*parts: Any) -> Any:
        ensure_available()
        op = getattr(import_module(f"jamba_server.kernels.triton.{module}"), name)
        return op(*parts) if isinstance(op, type) else op

    return load


def _torch_attention() -> torch_ops.AttentionPrefill:
    return torch_ops.AttentionPrefill(_triton("attention", "attention_prefill")())


def _torch_linear() -> torch_ops.Linear:
    return torch_ops.Linear(_triton("linear", "Linear")())


def _torch_experts(silu_and_mul: Any) -> torch_ops.RunExperts:
    return torch_ops.RunExperts(silu_and_mul, _triton("moe", "RunExperts")())


# Some reference kernels in `TABLE` have batch_invariant=False. These kernels use sums of torch, and torch chooses the
# order of a sum by the tensor's shape.
_BOTH = ("cpu", "cuda")
_MAMBA_PARTS = ("causal_conv1d_update", "linear", "rms_norm", "selective_state_update")

TABLE: tuple[Implementation, ...] = (
    Implementation("rms_norm", "cpu", ("cpu",), cpu_norm.RmsNorm),
    Implementation("rms_norm", "triton", ("cuda",), _triton("norm", "rms_norm")),
    Implementation("rms_norm", "reference", _BOTH, lambda: norm.rms_norm),
    Implementation("causal_conv1d", "cpu", ("cpu",), cpu_conv.CausalConv1d),
    Implementation("causal_conv1d", "triton", ("cuda",), _triton("conv", "causal_conv1d")),
    Implementation("causal_conv1d", "causal-conv1d", ("cuda",), external.CausalConv1d, batch_invariant=False),
    Implementation("causal_conv1d", "reference", _BOTH, lambda: conv.causal_conv1d),
    Implementation("causal_conv1d_update", "cpu", ("cpu",), cpu_conv.CausalConv1dUpdate),
    Implementation("causal_conv1d_update", "triton", ("cuda",), _triton("conv", "causal_conv1d_update")),
    Implementation(
        "causal_conv1d_update", "causal-conv1d", ("cuda",), external.CausalConv1dUpdate, batch_invariant=False
    ),
    Implementation("causal_conv1d_update", "reference", _BOTH, lambda: conv.causal_conv1d_update),
    Implementation("selective_scan", "cpu", ("cpu",), cpu_scan.SelectiveScan),
    Implementation(
        "selective_scan", "triton-chunked", ("cuda",), _triton("scan_chunked", "selective_scan"), batch_invariant=False
    ),
    Implementation("selective_scan", "triton", ("cuda",), _triton("scan", "selective_scan")),
    Implementation("selective_scan", "mamba-ssm", ("cuda",), external.selective_scan, batch_invariant=False),
    Implementation("selective_scan", "reference", _BOTH, lambda: scan.selective_scan),
    Implementation("selective_state_update", "cpu", ("cpu",), cpu_scan.SelectiveStateUpdate),
    Implementation("selective_state_update", "triton", ("cuda",), _triton("scan", "selective_state_update")),
    Implementation(
        "selective_state_update", "mamba-ssm", ("cuda",), external.SelectiveStateUpdate, batch_invariant=False
    ),
    Implementation("selective_state_update", "reference", _BOTH, lambda: scan.selective_state_update),
    Implementation("write_kv", "cpu", ("cpu",), cpu_slots.WriteKv),
    Implementation("write_kv", "triton", ("cuda",), _triton("slots", "write_kv")),
    Implementation("write_kv", "reference", _BOTH, lambda: slots.write_kv),
    Implementation("attention_prefill", "cpu", ("cpu",), cpu_attention.AttentionPrefill),
    Implementation("attention_prefill", "torch", ("cuda",), _torch_attention, batch_invariant=False),
    Implementation("attention_prefill", "triton", ("cuda",), _triton("attention", "attention_prefill")),
    Implementation("attention_prefill", "flash-attn", ("cuda",), external.AttentionPrefill, batch_invariant=False),
    Implementation("attention_prefill", "reference", ("cpu",), lambda: attention.attention_prefill),
    Implementation(
        "attention_prefill", "reference", ("cuda",), lambda: attention.attention_prefill, batch_invariant=False
    ),
    Implementation("attention_decode", "cpu", ("cpu",), cpu_attention.AttentionDecode),
    Implementation("attention_decode", "triton", ("cuda",), _triton("attention", "attention_decode")),
    Implementation("attention_decode", "flash-attn", ("cuda",), external.AttentionDecode, batch_invariant=False),
    Implementation("attention_decode", "reference", ("cpu",), lambda: attention.attention_decode),
    Implementation(
        "attention_decode", "reference", ("cuda",), lambda: attention.attention_decode, batch_invariant=False
    ),
    Implementation("copy_slots", "cpu", ("cpu",), cpu_slots.CopySlots),
    Implementation("copy_slots", "triton", ("cuda",), _triton("slots", "copy_slots")),
    Implementation("copy_slots", "reference", _BOTH, lambda: slots.copy_slots),
    Implementation("compress_states", "cpu", ("cpu",), cpu_slots.CompressStates),
    Implementation("compress_states", "triton", ("cuda",), _triton("slots", "compress_states")),
    Implementation("compress_states", "reference", _BOTH, lambda: slots.compress_states),
    Implementation("restore_states", "cpu", ("cpu",), cpu_slots.RestoreStates),
    Implementation("restore_states", "triton", ("cuda",), _triton("slots", "restore_states")),
    Implementation("restore_states", "reference", _BOTH, lambda: slots.restore_states),
    Implementation("silu_and_mul", "cpu", ("cpu",), cpu_moe.SiluAndMul),
    Implementation("silu_and_mul", "triton", ("cuda",), _triton("gated", "silu_and_mul")),
    Implementation("silu_and_mul", "reference", _BOTH, lambda: moe.silu_and_mul),
    Implementation("route_experts", "cpu", ("cpu",), cpu_route.RouteExperts),
    Implementation("route_experts", "triton", ("cuda",), _triton("route", "route_experts")),
    Implementation("route_experts", "reference", _BOTH, lambda: moe.route_experts),
    Implementation("run_experts", "cpu", ("cpu",), cpu_moe.RunExperts),
    Implementation("run_experts", "torch", ("cuda",), _torch_experts, ("silu_and_mul",), batch_invariant=False),
    Implementation("run_experts", "triton", ("cuda",), _triton("moe", "RunExperts")),
    Implementation("run_experts", "reference", _BOTH, moe.RunExperts, batch_invariant=False),
    Implementation("linear", "cpu", ("cpu",), cpu_linear.Linear),
    Implementation("linear", "torch", ("cuda",), _torch_linear, batch_invariant=False),
    Implementation("linear", "triton", ("cuda",), _triton("linear", "Linear")),
    Implementation("linear", "reference", _BOTH, linear.Linear, batch_invariant=False),
    Implementation("sample", "cpu", ("cpu",), cpu_sample.Sample),
    Implementation("sample", "triton", ("cuda",), _triton("sample", "sample")),
    Implementation("sample", "reference", ("cpu",), lambda: sample.sample),
    Implementation("sample", "reference", ("cuda",), lambda: sample.sample, batch_invariant=False),
    Implementation("apply_bitmask", "cpu", ("cpu",), cpu_bitmask.ApplyBitmask),
    Implementation("apply_bitmask", "triton", ("cuda",), _triton("bitmask", "apply_bitmask")),
    Implementation("apply_bitmask", "reference", _BOTH, lambda: bitmask.apply_bitmask),
    Implementation("mamba_decode", "cpu", ("cpu",), cpu_mamba.MambaDecode, _MAMBA_PARTS),
    Implementation("mamba_decode", "triton", ("cuda",), _triton("mamba", "MambaDecode"), _MAMBA_PARTS),
    Implementation("mamba_decode", "reference", _BOTH, mamba.MambaDecode, _MAMBA_PARTS),
)

LEVEL_OPS: Final = ("linear", "run_experts", "attention_prefill", "attention_decode")
"""The ops that multiply matrices. All of them use the same instruction set, so that they agree in their bits.

The implementation "cpu" of these ops can be held to one instruction set ("linear=cpu:avx2").
"""

OPS: tuple[str, ...] = tuple(
    field.name for field in fields(Kernels) if field.name not in ("names", "batch_dependent_ops")
)

# Maps the name of a family of ops to the names of its ops. Users request an implementation for a family or for a single
# op. If two requested families contain the same op, the family further down in this table decides. A request for a
# single op overrides all requests for families.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "all": OPS,
    "mamba": ("causal_conv1d", "causal_conv1d_update", "selective_scan", "selective_state_update", "mamba_decode"),
    "attention": ("write_kv", "attention_prefill", "attention_decode"),
    "moe": ("route_experts", "run_experts"),
}


def implementations(op: str, device: str) -> tuple[Implementation, ...]:
    """Returns the implementations of an op for a device ("cpu" or "cuda"), the preferred implementation first."""
    return tuple(entry for entry in TABLE if entry.op == op and device in entry.devices)


def select(device: str, requested: Mapping[str, str], batch_invariant: bool | None = None) -> Kernels:
    """Returns the kernels for a device.

    For each op this is the requested implementation. For an op without a request, the first implementation that loads
    is chosen.

    `requested` maps an op or a family ("mamba", "attention", "moe", "all") to the name of an implementation. For the op
    "linear" the name may be "cpu:LEVEL": the ops `LEVEL_OPS` then use this instruction set. For an op
    that is not requested, an implementation that cannot load is skipped with a warning, and `batch_invariant` sets the
    order: True tries batch-invariant implementations only, None tries them before all others, False tries all in the
    table's order. Raises KernelError if a device, op, family or implementation is unknown, if a requested
    implementation cannot load, or if no implementation of an op can.
    """
    requested, level = _split_level(requested)
    by_op = _expand(device, requested)
    chosen: dict[str, tuple[Implementation, Any]] = {}
    skipped: dict[tuple[str, str], list[str]] = {}
    for op in OPS:
        reasons: dict[str, str] = {}
        for entry in by_op.get(op) or _candidates(op, device, batch_invariant):
            loaded, reason = _try_load(entry, {op: loaded for op, (_, loaded) in chosen.items()}, level)
            if not reason:
                chosen[op] = (entry, loaded)
                break
            if op in by_op:
                raise KernelError(f"kernels: {op}={entry.name} cannot run on this machine: {reason}")
            reasons[entry.name] = reason
        if op not in chosen:
            kind = "batch-invariant implementation" if batch_invariant else "implementation"
            raise KernelError(f"kernels: no {kind} of {op} runs on this {device} device: {reasons}")
        for name, reason in reasons.items():
            skipped.setdefault((name, reason), []).append(op)
    for (name, reason), ops in skipped.items():
        logger.warning("kernels: the implementation %s of %s is skipped: %s", name, ", ".join(ops), reason)
    entries = {op: entry for op, (entry, _) in chosen.items()}
    return Kernels(
        **{op: loaded for op, (_, loaded) in chosen.items()},
        names={op: entry.name for op, entry in entries.items()},
        batch_dependent_ops=tuple(op for op, entry in entries.items() if not _is_batch_invariant(entry, entries)),
    )


def describe(device: str) -> list[TableRow]:
    """Returns one row for each implementation of each op on a device.

    The implementations that `select(device, {})` chooses have the status "selected".
    """
    rows: list[TableRow] = []
    selected: dict[str, tuple[Implementation, Any]] = {}
    for op in OPS:
        for entry in _candidates(op, device, batch_invariant=None):
            loaded, reason = _try_load(entry, {op: loaded for op, (_, loaded) in selected.items()})
            status = reason or ("available" if op in selected else "selected")
            if not reason:
                selected.setdefault(op, (entry, loaded))
            rows.append(
                TableRow(op, entry.name, status, _is_batch_invariant(entry, {op: e for op, (e, _) in selected.items()}))
            )
    return rows


def _candidates(op: str, device: str, batch_invariant: bool | None) -> list[Implementation]:
    """Returns the implementations of an op in the order in which `select` tries them if the user requests none."""
    entries = implementations(op, device)
    if batch_invariant is None:
        return sorted(entries, key=lambda entry: not entry.batch_invariant)
    return [entry for entry in entries if entry.batch_invariant or not batch_invariant]


def _is_batch_invariant(entry: Implementation, chosen: Mapping[str, Implementation]) -> bool:
    """Returns whether an implementation is batch-invariant and so are its parts, which are the ops that it replaces.

    `chosen` maps each part's name to the chosen implementation. Parts have no parts of their own.
    """
    return entry.batch_invariant and all(chosen[part].batch_invariant for part in entry.parts)


def _split_level(requested: Mapping[str, str]) -> tuple[Mapping[str, str], str | None]:
    """Returns the requested implementations without the instruction set of "linear", and this instruction set.

    Raises KernelError if an instruction set is requested for anything else.
    """
    level = None
    plain = dict(requested)
    for op, name in requested.items():
        implementation, colon, wanted = name.partition(":")
        if not colon:
            continue
        if op != "linear" or implementation != "cpu":
            raise KernelError(
                f"kernels: {op}={name} asks for a level; only linear=cpu:LEVEL may, and the level then holds for "
                f"{', '.join(LEVEL_OPS)}"
            )
        plain[op], level = implementation, wanted
    return plain, level


def _try_load(entry: Implementation, chosen: Mapping[str, Any], level: str | None = None) -> tuple[Any, str]:
    """Returns (the loaded implementation, ""), or (None, the reason) if the implementation cannot be loaded.

    `chosen` maps names of ops to their loaded implementations. `level` is the instruction set that was requested for
    the ops `LEVEL_OPS`.
    """
    try:
        if level is not None and entry.op in LEVEL_OPS and entry.name == "cpu":
            return entry.load(level=level), ""
        return entry.load(*(chosen[part] for part in entry.parts)), ""
    except (KernelUnavailable, ImportError, OSError) as error:
        return None, str(error) or type(error).__name__


def _expand(device: str, requested: Mapping[str, str]) -> dict[str, tuple[Implementation]]:
    """Maps each op that the user requests, by its own name or by the name of a family, to the implementation."""
    devices = sorted({device for entry in TABLE for device in entry.devices})
    if device not in devices:
        raise KernelError(f"kernels: no implementations for device {device!r}; there are some for {', '.join(devices)}")
    for key in requested:
        if key not in FAMILIES and key not in OPS:
            known = f"the ops {', '.join(OPS)} and the families {', '.join(FAMILIES)}"
            raise KernelError(f"kernels: {key!r} is neither an op nor a family; there are {known}")
    by_op = {op: requested[family] for family, ops in FAMILIES.items() if family in requested for op in ops}
    by_op |= {op: name for op, name in requested.items() if op in OPS}
    return {op: (_named(op, device, name),) for op, name in by_op.items()}


def _named(op: str, device: str, name: str) -> Implementation:
    entries = {entry.name: entry for entry in implementations(op, device)}
    if name not in entries:
        raise KernelError(f"kernels: {op} has no implementation {name!r} for {device}; there are {', '.join(entries)}")
    return entries[name]
