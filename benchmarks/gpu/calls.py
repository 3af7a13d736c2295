"""Calls of every op of `kernels.triton` at the shapes of the 3B and Mini models, whose kernels `codegen` compiles.

The tensors have no numbers that matter: kernel launches are recorded, not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu.formats import FORMATS
from jamba_server.kernels.ops import (
    CompressedStates,
    MambaWeights,
    Pages,
    SampleInputs,
    ScanInputs,
    ScanWeights,
    Segments,
    StateSaves,
)
from jamba_server.kernels.triton import (
    attention,
    bitmask,
    conv,
    gated,
    linear,
    mamba,
    moe,
    norm,
    quantized,
    route,
    sample,
    scan,
    scan_chunked,
    slots,
)

GATED_FORMATS = ("", "int8", "Q4_K")  # The formats for which products with an activation are compiled too.
EXPERT_FORMATS = ("", "int8", "fp8", "int4", "Q8_0", "Q4_0", "Q4_K", "Q6_K")
"""The formats for which the products of experts are compiled too. They call the same function as other products."""


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    # nothing writes to the tensor, so the operating system assigns no physical memory to the tensor
    return torch.empty(shape, dtype=dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def mamba_calls(channels: int, states: int) -> Iterator[tuple[str, Callable[[], object]]]:
    wide = empty(512, 2 * channels)
    x, z, b = wide[:, :channels], wide[:, channels:], empty(512, states)
    inputs = ScanInputs(x, empty(512, channels), b, b, z)
    last = ScanInputs(*(rows[:1] for rows in inputs))
    a, d = empty(channels, states, dtype=torch.float32), empty(channels, dtype=torch.float32)
    weights, ssm = ScanWeights(a, d, d), empty(4, 26, channels, states, dtype=torch.float32)[:, 1]
    state, filters, bias = empty(4, 26, 3, channels)[:, 1], empty(4, channels), empty(channels)
    segments = Segments(ints(0, 512), 512, ints(1), torch.tensor([True]), StateSaves(ints(0, 1), ints(7), ints(2)))
    long = segments._replace(max_query_len=scan_chunked.MIN_CHUNKS * scan_chunked.CHUNK)
    yield "causal_conv1d", lambda: conv.causal_conv1d(x, filters, bias, state, segments)
    yield "causal_conv1d_update", lambda: conv.causal_conv1d_update(x[:1], filters, bias, state, ints(1))
    yield "selective_scan", lambda: scan.selective_scan(inputs, weights, ssm, segments)
    yield "selective_state_update", lambda: scan.selective_state_update(last, weights, ssm, ints(1))
    many = segments._replace(
        query_start=torch.arange(65, dtype=torch.int32), state_ids=torch.ones(64, dtype=torch.int32)
    )
    yield "selective_scan, 64", lambda: scan.selective_scan(inputs, weights, ssm, many)
    yield "selective_state_update, 64", lambda: scan.selective_state_update(inputs, weights, ssm, many.state_ids)
    yield "selective_scan, chunked", lambda: scan_chunked.selective_scan(inputs, weights, ssm, long)


def decode_calls(channels: int, states: int, rank: int, format: str = "") -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields calls of the op `mamba_decode`, the fused decode of a Mamba layer, with 1 and with 256 sequences. `format`
    is the format of x_proj and dt_proj."""
    a, d = empty(channels, states, dtype=torch.float32), empty(channels, dtype=torch.float32)
    weights = MambaWeights(
        conv_weight=empty(4, channels),
        conv_bias=empty(channels),
        x_proj=matrix(format, rank + 2 * states, channels),
        dt_norm=empty(rank),
        b_norm=empty(states),
        c_norm=empty(states),
        eps=1e-6,
        dt_proj=matrix(format, channels, rank),
        scan=ScanWeights(a, d, d),
    )
    parts = (conv.causal_conv1d_update, linear.Linear(), norm.rms_norm, scan.selective_state_update)
    decode = mamba.MambaDecode(*parts)
    for rows in (1, 256):
        ids, xz = torch.zeros(rows, dtype=torch.int32), empty(rows, 2 * channels)
        state, ssm = empty(rows, 26, 3, channels)[:, 1], empty(rows, 26, channels, states, dtype=torch.float32)[:, 1]
        args = (xz, decode.pack(weights), state, ssm, ids)
        yield f"mamba_decode, {f'{format}, ' if format else ''}{rows}", lambda args=args: decode(*args)


def attention_calls(
    heads: int, kv_heads: int, size: int, stored: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, Callable[[], object]]]:
    storage = empty(64, 2, 2, 16, kv_heads, size, dtype=stored)
    pages = Pages(storage[:, 0, 0], storage[:, 0, 1], torch.zeros(1, 64, dtype=torch.int32), ints(1024), 1024)
    wide = empty(512, (heads + 2 * kv_heads) * size)
    q, k, v = (
        part.unflatten(-1, (-1, size)) for part in wide.split([n * size for n in (heads, kv_heads, kv_heads)], 1)
    )
    yield "write_kv", lambda: slots.write_kv(k, v, pages.k, pages.v, torch.zeros(512, dtype=torch.int64))
    yield "attention_prefill", lambda: attention.attention_prefill(q, pages, ints(0, 512), 512, 0.125)
    yield "attention_decode", lambda: attention.attention_decode(q[:1], pages, 0.125)


def row_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    for size in (16, 256, 4096):
        x, weight = empty(64, size), empty(size)
        yield f"rms_norm {size}", lambda x=x, weight=weight: norm.rms_norm(x, weight, 1e-6, x)
    yield "silu_and_mul", lambda: gated.silu_and_mul(empty(64, 2 * 14336))
    yield "route_experts", lambda: route.route_experts(empty(64, 16), 2)
    state, pair = empty(4, 28, 8192, 16, dtype=torch.float32), torch.tensor([1])
    yield "copy_slots", lambda: slots.copy_slots((state,), pair, pair + 1)
    compressed = CompressedStates(empty(4, 28, 8192, 16, dtype=torch.int8), empty(4, 28, 8192, dtype=torch.float32))
    yield "compress_states", lambda: slots.compress_states(state, compressed, pair, pair)
    yield "restore_states", lambda: slots.restore_states(compressed, state, pair, pair)
    ones = torch.ones(2)
    inputs = SampleInputs(ones, ones, ones * 0, ones.int() * 0, ones.long())
    logits = empty(2, 65536, dtype=torch.float32)
    yield "sample", lambda: sample.sample(logits, inputs)
    masks = torch.empty(2, 2048, dtype=torch.int32)
    yield "apply_bitmask", lambda: bitmask.apply_bitmask(logits, masks, torch.tensor([1, 0]))


def matrix(format: str, *shape: int) -> Tensor | quantized.PackedWeight:
    """Returns an uninitialised weight array [..., N, K]. The array is quantised in the weight format `format`, or has
    the dtype bfloat16 if `format` is ''."""
    return quantized.pack(FORMATS[format].empty(*shape)) if format else empty(*shape)


def product_calls(format: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields calls of the ops `linear` and `run_experts`. The inputs' numbers of rows are chosen so that the kernels
    use every tile size."""
    weight = matrix(format, 16384, 4096)
    experts = moe.Experts(matrix(format, 16, 2 * 14336, 4096), matrix(format, 16, 4096, 14336))
    name = f", {format}" if format else ""
    for rows in (1, 32, 64, 4096) if format in EXPERT_FORMATS[1:] else (1, 64, 512, 4096):
        x = empty(rows, 4096)
        yield f"linear{name}, {rows}", lambda x=x: linear.Linear()(x, weight)
        if format in GATED_FORMATS and rows != 64:
            yield f"gated linear{name}, {rows}", lambda x=x: linear.Linear().gated(x, weight, gated.silu_and_mul)
    for rows in (1, 256, 4096) if format in EXPERT_FORMATS else ():
        x, weights, ids = empty(rows, 4096), torch.ones(rows, 2), torch.zeros(rows, 2, dtype=torch.int32)
        yield f"run_experts{name}, {rows}", lambda x=x, w=weights, i=ids: moe.RunExperts()(x, experts, w, i)


def format_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields calls that only some models make: a decode step of a Mamba layer whose x_proj and dt_proj are quantised,
    and rows of a quantised embedding."""
    for format in ("Q8_0", "Q4_K"):
        yield from decode_calls(5120, 16, 160, format)
        embedding = matrix(format, 65536, 4096)
        assert isinstance(embedding, quantized.PackedWeight)
        rows = torch.zeros(8, dtype=torch.int64)
        yield f"rows, {format}", lambda w=embedding, i=rows: linear.Linear().rows(w, i, torch.bfloat16)


def sectioned_calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yields calls of the matrix products x_proj and out_proj of the 3B model. The kernels of these products divide the
    inner dimension K into sections.

    With few rows the sections' sums are added through memory, with many rows by one program.
    """
    for outputs, formats in ((192, ("",)), (2560, ("", "int8", "Q4_K"))):
        for format in formats:
            weight = matrix(format, outputs, 5120)
            for rows in (64, 2048) if outputs == 192 else (1, 256, 2048):
                x = empty(rows, 5120)
                name = f"linear, sections{format and f', {format}'}, {rows} x {outputs}"
                yield name, lambda x=x, w=weight: linear.Linear()(x, w)
