"""The decode of a whole Mamba layer against float64 and, to the bit, against its parts one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cpu.library import Library
from kernels.ops import Kernels, MambaWeights, ScanInputs, ScanWeights, Segments
from kernels.table import KernelError, select
from tests.kernels import oracle
from tests.kernels.cases import DTYPES, assert_close, assert_same, double, layer_storage, random, segments

SLOTS = 40


def make_weights(
    kernels: Kernels, channels: int, states: int, rank: int, dtype: torch.dtype, *, bias: bool = True
) -> MambaWeights:
    return MambaWeights(
        conv_weight=random(4, channels, dtype=dtype, seed=1),
        conv_bias=random(channels, dtype=dtype, seed=2) if bias else None,
        x_proj=kernels.linear.pack(random(rank + 2 * states, channels, dtype=dtype, seed=3, scale=channels**-0.5)),
        dt_norm=random(rank, dtype=dtype, seed=4),
        b_norm=random(states, dtype=dtype, seed=5),
        c_norm=random(states, dtype=dtype, seed=6),
        eps=1e-6,
        dt_proj=kernels.linear.pack(random(channels, rank, dtype=dtype, seed=7, scale=rank**-0.5)),
        scan=ScanWeights(
            a=-torch.exp(random(channels, states, seed=8)),
            d=random(channels, seed=9),
            dt_bias=random(channels, seed=10),
        ),
    )


def make_states(channels: int, states: int, slots: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    conv = layer_storage(SLOTS, 3, channels, dtype=dtype)
    ssm = layer_storage(SLOTS, channels, states, dtype=torch.float32)
    for slot in slots:
        conv[slot], ssm[slot] = random(3, channels, dtype=dtype, seed=slot), random(channels, states, seed=slot)
    return conv, ssm


def by_prefill(kernels: Kernels, xz: Tensor, w: MambaWeights, conv: Tensor, ssm: Tensor, rows: Segments) -> Tensor:
    """The parts one after the other, those that take several tokens."""
    x, z = xz.chunk(2, dim=1)
    u = kernels.causal_conv1d(x, w.conv_weight, w.conv_bias, conv, rows)
    dt, b, c = kernels.linear(u, w.x_proj).split([len(w.dt_norm), len(w.b_norm), len(w.c_norm)], dim=1)
    dt, b, c = (kernels.rms_norm(y, norm, w.eps)[0] for y, norm in ((dt, w.dt_norm), (b, w.b_norm), (c, w.c_norm)))
    return kernels.selective_scan(ScanInputs(u, kernels.linear(dt, w.dt_proj), b, c, z), w.scan, ssm, rows)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "states", "rank"), [(19, 3, 5), (160, 16, 10), (1, 1, 1)])
@pytest.mark.parametrize("rows", [1, 33])
def test_one_token_gives_the_bits_of_its_parts_in_prefill(
    name: str, rows: int, channels: int, states: int, rank: int, dtype: torch.dtype
) -> None:
    try:
        kernels = select("cpu", {"mamba_decode": name})
    except KernelError as error:
        pytest.skip(str(error))
    weights = make_weights(kernels, channels, states, rank, dtype, bias=rows > 1)
    slots = [(7 * i + 3) % SLOTS for i in range(rows)]
    conv, ssm = make_states(channels, states, slots, dtype)
    # a slice of wider rows, as a batch with prefills too has it
    xz = random(rows + 2, 2 * channels + 3, dtype=dtype, seed=11)[:rows, : 2 * channels]
    expected_conv, expected_ssm = conv.clone(), ssm.clone()
    expected = by_prefill(kernels, xz, weights, expected_conv, expected_ssm, segments([1] * rows, slots, [True] * rows))
    packed = kernels.mamba_decode.pack(weights)
    actual = kernels.mamba_decode(xz, packed, conv, ssm, torch.tensor(slots, dtype=torch.int32))
    assert not actual.isnan().any()
    assert_same(actual, expected)
    assert_same(conv, expected_conv)
    assert_same(ssm, expected_ssm)


@pytest.mark.parametrize("rows", [1, 7, 32])
def test_every_level_gives_a_row_the_same_bits_alone_and_among_others(native: Library, rows: int) -> None:
    kernels = select("cpu", {"mamba_decode": "cpu"})
    weights = make_weights(kernels, 528, 16, 33, torch.bfloat16)
    slots = [(7 * i + 3) % SLOTS for i in range(rows)]
    xz = random(rows, 2 * 528, dtype=torch.bfloat16, seed=11)
    conv, ssm = make_states(528, 16, slots, torch.bfloat16)
    packed = kernels.mamba_decode.pack(weights)
    ids = torch.tensor(slots, dtype=torch.int32)
    together = kernels.mamba_decode(xz, packed, conv, ssm, ids)
    alone_conv, alone_ssm = make_states(528, 16, slots, torch.bfloat16)
    native.set_threads(1)
    alone = [kernels.mamba_decode(xz[i : i + 1], packed, alone_conv, alone_ssm, ids[i : i + 1]) for i in range(rows)]
    assert_same(torch.cat(alone), together)
    assert_same(alone_conv, conv)
    assert_same(alone_ssm, ssm)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_it_equals_the_formula(name: str) -> None:
    try:
        kernels = select("cpu", {"mamba_decode": name})
    except KernelError as error:
        pytest.skip(str(error))
    channels, states, rank = 24, 5, 3
    w = make_weights(kernels, channels, states, rank, torch.float32)
    x_proj = random(rank + 2 * states, channels, seed=3, scale=channels**-0.5)
    dt_proj = random(channels, rank, seed=7, scale=rank**-0.5)
    conv, ssm = make_states(channels, states, [2], torch.float32)
    xz = random(1, 2 * channels, seed=11)
    bias = None if w.conv_bias is None else double(w.conv_bias)
    u, _ = oracle.causal_conv1d(double(xz[:, :channels]), double(w.conv_weight), bias, double(conv[2]))
    projected = u @ double(x_proj).T
    dt = oracle.rms_norm(projected[:, :rank], double(w.dt_norm), w.eps) @ double(dt_proj).T
    b = oracle.rms_norm(projected[:, rank : rank + states], double(w.b_norm), w.eps)
    c = oracle.rms_norm(projected[:, rank + states :], double(w.c_norm), w.eps)
    inputs = oracle.Scan(u, dt, b, c, double(xz[:, channels:]))
    expected, final = oracle.selective_scan(
        inputs, double(w.scan.a), double(w.scan.d), double(w.scan.dt_bias), double(ssm[2])
    )
    ids = torch.tensor([2], dtype=torch.int32)
    assert_close(kernels.mamba_decode(xz, kernels.mamba_decode.pack(w), conv, ssm, ids), expected, atol=1e-4)
    assert_close(ssm[2], final, atol=1e-4)


def test_a_wish_for_another_part_is_a_wish_against_the_whole() -> None:
    try:
        select("cpu", {"mamba_decode": "cpu"})
    except KernelError as error:
        pytest.skip(str(error))
    assert select("cpu", {"selective_state_update": "reference"}).names["mamba_decode"] == "reference"
    with pytest.raises(KernelError, match=r"mamba_decode=cpu.*SelectiveStateUpdate"):
        select("cpu", {"selective_state_update": "reference", "mamba_decode": "cpu"})
