"""What the CPU kernels answer to tensors that the compiled library must not be given: one line of JSON for each.

    python -O -m tests.kernels.bad_arguments

Every tensor among an op's arguments is spoilt in turn, in each way of `SPOILT`. A process of its own, as `-O` is an
option of Python and as a kernel that takes what it should refuse may end it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from jamba_server.kernels.cpu import attention, bitmask, conv, linear, mamba, moe, norm, route, sample, scan, slots
from jamba_server.kernels.ops import CompressedStates, MambaWeights, Pages, SampleInputs, ScanInputs, ScanWeights
from tests.kernels.cases import random, segments

ROWS, HIDDEN, STATES, RANK, WIDTH, HEADS, SIZE = 3, 16, 8, 4, 4, 2, 8
OTHER_DTYPE = {torch.float32: torch.float64, torch.int32: torch.int64, torch.int64: torch.int32}
SPOILT: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda t: t.to(OTHER_DTYPE.get(t.dtype, torch.int32)),
    "shape": lambda t: t[..., :-1],
    "stride": lambda t: torch.stack([t, t], -1)[..., 0],
    "device": lambda t: t.to("meta"),
}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def mamba_weights() -> MambaWeights:
    pack, weights = linear.Packer(), scan_arguments()[1]
    return MambaWeights(
        conv_weight=random(WIDTH, HIDDEN),
        conv_bias=random(HIDDEN),
        x_proj=pack(random(RANK + 2 * STATES, HIDDEN)),
        dt_norm=random(RANK),
        b_norm=random(STATES),
        c_norm=random(STATES),
        eps=1e-6,
        dt_proj=pack(random(HIDDEN, RANK)),
        scan=weights,
    )


def scan_arguments() -> tuple[ScanInputs, ScanWeights, Tensor]:
    wide, narrow = random(ROWS, HIDDEN), random(ROWS, STATES)
    inputs = ScanInputs(u=wide, dt=wide.clone(), b=narrow, c=narrow.clone(), z=wide.clone())
    return inputs, ScanWeights(-random(HIDDEN, STATES).exp(), random(HIDDEN), random(HIDDEN)), states()


def states() -> Tensor:
    return torch.zeros(4, HIDDEN, STATES)


def conv_arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return random(ROWS, HIDDEN), random(WIDTH, HIDDEN), random(HIDDEN), torch.zeros(4, WIDTH - 1, HIDDEN)


def pages(sequences: int) -> Pages:
    k, v = random(3, 4, HEADS, SIZE), random(3, 4, HEADS, SIZE)
    return Pages(k, v, int32(*[1, 2] * sequences).view(sequences, 2), int32(*[5] * sequences), 5)


def calls() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """(name, op, arguments that are right)."""
    two = segments([1, 2], [1, 2], [True, False], [[(1, 3)], [(1, 0)]])
    one_each, pairs = int32(1, 2, 3), (torch.tensor([0, 1]), torch.tensor([2, 3]))
    compressed = CompressedStates(torch.zeros(4, 2, HIDDEN, STATES, dtype=torch.int8), torch.zeros(4, 2, HIDDEN))
    wide, q = random(ROWS, HIDDEN), random(ROWS, 2 * HEADS, SIZE)
    kv = (random(ROWS, HEADS, SIZE), random(ROWS, HEADS, SIZE), torch.zeros(3, 4, HEADS, SIZE))
    product, experts, decode = linear.Linear(), moe.RunExperts(), mamba.MambaDecode(*(k() for k in mamba_parts()))
    packed = product.pack(random(6, HIDDEN))
    chosen = random(ROWS, 2), torch.zeros(ROWS, 2, dtype=torch.int32)
    sampling = SampleInputs(torch.ones(ROWS), torch.ones(ROWS), torch.ones(ROWS), int32(0, 0, 0), torch.arange(ROWS))
    yield "rms_norm", norm.RmsNorm(), (wide, random(HIDDEN), 1e-6, wide.clone())
    yield "causal_conv1d", conv.CausalConv1d(), (*conv_arguments(), two)
    yield "causal_conv1d_update", conv.CausalConv1dUpdate(), (*conv_arguments(), one_each)
    yield "selective_scan", scan.SelectiveScan(), (*scan_arguments(), two)
    yield "selective_state_update", scan.SelectiveStateUpdate(), (*scan_arguments(), one_each)
    xz, weights = random(ROWS, 2 * HIDDEN), decode.pack(mamba_weights())
    yield "mamba_decode", decode, (xz, weights, conv_arguments()[3], states(), one_each)
    yield "mamba_decode.pack", decode.pack, (mamba_weights(),)
    yield "write_kv", slots.WriteKv(), (*kv, kv[2].clone(), torch.tensor([4, 5, 9]))
    yield "attention_prefill", attention.AttentionPrefill(), (q, pages(2), int32(0, 1, 3), 2, 1.0)
    yield "attention_decode", attention.AttentionDecode(), (q, pages(ROWS), 1.0)
    yield "copy_slots", slots.CopySlots(), ((states(), states()), *pairs)
    yield "compress_states", slots.CompressStates(), (torch.zeros(4, 2, HIDDEN, STATES), compressed, *pairs)
    yield "restore_states", slots.RestoreStates(), (compressed, torch.zeros(4, 2, HIDDEN, STATES), *pairs)
    yield "silu_and_mul", moe.SiluAndMul(), (wide,)
    yield "route_experts", route.RouteExperts(), (wide, 2)
    yield "run_experts", experts, (wide, experts.pack(random(4, 12, HIDDEN), random(4, HIDDEN, 6)), *chosen)
    yield "run_experts.pack", experts.pack, (random(4, 12, HIDDEN), random(4, HIDDEN, 6))
    yield "linear", product, (wide, packed, random(6))
    yield "linear.pack", product.pack, (random(6, HIDDEN),)
    yield "linear.rows", product.rows, (packed, torch.tensor([0, 5]))
    yield "linear.rows of a plain weight", product.rows, (random(6, HIDDEN), torch.tensor([0, 5]))
    yield "sample", sample.Sample(), (wide, sampling)
    masked = random(ROWS, 40), torch.zeros(2, 2, dtype=torch.int32), torch.tensor([2, 0])
    yield "apply_bitmask", bitmask.ApplyBitmask(), masked


def mamba_parts() -> tuple[type, ...]:
    return conv.CausalConv1dUpdate, linear.Linear, norm.RmsNorm, scan.SelectiveStateUpdate


def spoilt(value: Any, spoil: Callable[[Tensor], Tensor], path: str) -> Iterator[tuple[str, Any]]:
    """(which tensor, `value` with this one spoilt), for every tensor in it. What is packed stays whole."""
    if isinstance(value, Tensor):
        yield path, spoil(value)
    elif isinstance(value, tuple) and not isinstance(value, (moe.Experts, mamba.PackedMamba)):
        names = getattr(value, "_fields", range(len(value)))
        for i, (name, item) in enumerate(zip(names, value, strict=True)):
            for where, changed in spoilt(item, spoil, f"{path}.{name}"):
                items = (*value[:i], changed, *value[i + 1 :])
                yield where, type(value)(*items) if hasattr(value, "_fields") else items


def main() -> None:
    for name, op, arguments in calls():
        op(*arguments)  # what is right is taken
        for way, spoil in SPOILT.items():
            for where, changed in spoilt(arguments, spoil, name):
                said = ["", ""]
                try:
                    op(*changed)
                except Exception as error:  # noqa: BLE001 (its kind is told)
                    said = [type(error).__name__, str(error)]
                print(json.dumps([where, way, *said]), flush=True)


if __name__ == "__main__":
    main()
