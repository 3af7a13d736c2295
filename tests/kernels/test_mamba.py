"""The decode of a whole Mamba layer against float64 and, to the bit, against its parts one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from jamba_server.kernels.cpu.library import Library
from jamba_server.kernels.ops import Kernels, MambaWeights, ScanInputs, ScanWeights, Segments
from jamba_server.kernels.table import KernelError, select
from jamba_server.kernels.triton import interpreted
from tests.kernels import oracle
from tests.kernels.cases import DTYPES, EXACT_DTYPES, assert_close, assert_same, double, layer_storage, random, segments
from tests.kernels.test_formats import weight_of

SLOTS = 40
MANY = 9 if interpreted() else 33  # rows
CPU = torch.device("cpu")
NAMES = ("triton",) if interpreted() else ("cpu", "reference", *(["triton"] if torch.cuda.is_available() else ()))


def kernels_for(name: str) -> tuple[Kernels, torch.device]:
    """Returns the kernels with one name, and the device on which they run."""
    try:
        if name == "triton":
            return select("cuda", {"all": "triton"}), CPU if interpreted() else torch.device("cuda")
        return select("cpu", {"mamba_decode": name}), CPU
    except KernelError as error:
        pytest.skip(str(error))


def move(value: Any, device: torch.device) -> Any:
    """Copies tensors, or those of a tuple, to `device`. A view of a storage becomes a view of the storage's copy."""
    if isinstance(value, tuple):
        moved = [move(item, device) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value.to(device) if isinstance(value, Tensor) else value


def pack(kernels: Kernels, weights: MambaWeights) -> MambaWeights:
    """Returns a layer's weights in packed form."""
    products = (weights.x_proj, weights.dt_proj)
    x_proj, dt_proj = map(kernels.linear.pack, products)
    return weights._replace(x_proj=x_proj, dt_proj=dt_proj)


def make_weights(channels: int, states: int, rank: int, dtype: torch.dtype, *, bias: bool = True) -> MambaWeights:
    return MambaWeights(
        conv_weight=random(4, channels, dtype=dtype, seed=1),
        conv_bias=random(channels, dtype=dtype, seed=2) if bias else None,
        x_proj=random(rank + 2 * states, channels, dtype=dtype, seed=3, scale=channels**-0.5),
        dt_norm=random(rank, dtype=dtype, seed=4),
        b_norm=random(states, dtype=dtype, seed=5),
        c_norm=random(states, dtype=dtype, seed=6),
        eps=1e-6,
        dt_proj=random(channels, rank, dtype=dtype, seed=7, scale=rank**-0.5),
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
    """Computes the parts of a layer one after the other, with the ops that take several tokens."""
    x, z = xz.chunk(2, dim=1)
    u = kernels.causal_conv1d(x, w.conv_weight, w.conv_bias, conv, rows)
    dt, b, c = kernels.linear(u, w.x_proj).split([len(w.dt_norm), len(w.b_norm), len(w.c_norm)], dim=1)
    dt, b, c = (kernels.rms_norm(y, norm, w.eps)[0] for y, norm in ((dt, w.dt_norm), (b, w.b_norm), (c, w.c_norm)))
    return kernels.selective_scan(ScanInputs(u, kernels.linear(dt, w.dt_proj), b, c, z), w.scan, ssm, rows)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", EXACT_DTYPES if interpreted() else DTYPES)
@pytest.mark.parametrize(
    ("rows", "channels", "states", "rank"),
    [
        *((rows, *sizes) for rows in (1, MANY) for sizes in ((19, 3, 5), (160, 16, 10), (1, 1, 1))),
        (3, 560, 5, 10),  # x_proj is narrow enough for triton's product in sections
    ],
)
def test_one_token_gives_the_bits_of_its_parts_in_prefill(
    name: str, rows: int, channels: int, states: int, rank: int, dtype: torch.dtype
) -> None:
    kernels, device = kernels_for(name)
    weights = pack(kernels, move(make_weights(channels, states, rank, dtype, bias=rows > 1), device))
    slots = [(7 * i + 3) % SLOTS for i in range(rows)]
    conv, ssm = move(make_states(channels, states, slots, dtype), device)
    # a slice of wider rows, as a batch with prefills too has it
    xz = random(rows + 2, 2 * channels + 3, dtype=dtype, seed=11).to(device)[:rows, : 2 * channels]
    expected_conv, expected_ssm = conv.clone(), ssm.clone()
    known = move(segments([1] * rows, slots, [True] * rows), device)
    expected = by_prefill(kernels, xz, weights, expected_conv, expected_ssm, known)
    packed = kernels.mamba_decode.pack(weights)
    actual = kernels.mamba_decode(xz, packed, conv, ssm, known.state_ids)
    assert not actual.isnan().any()
    assert_same(actual, expected)
    assert_same(conv, expected_conv)
    assert_same(ssm, expected_ssm)


@pytest.mark.parametrize("rows", [1, 7, 32])
def test_every_level_gives_a_row_the_same_bits_alone_and_among_others(native: Library, rows: int) -> None:
    kernels = select("cpu", {"mamba_decode": "cpu"})
    weights = pack(kernels, make_weights(528, 16, 33, torch.bfloat16))
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


@pytest.mark.parametrize("formats", [("Q4_K", "Q5_0"), ("Q6_K", "Q8_0"), ("MLX", "MLX")])
def test_quantised_projections_give_the_bits_of_the_parts(native: Library, formats: tuple[str, str]) -> None:
    kernels, rows, slots = select("cpu", {"mamba_decode": "cpu"}), 5, [4, 0, 9, 3, 7]
    x_proj, dt_proj = weight_of(formats[0], 160 + 32, 512), weight_of(formats[1], 512, 160, seed=1)
    dense = make_weights(512, 16, 160, torch.bfloat16)
    weights = pack(kernels, dense._replace(x_proj=x_proj, dt_proj=dt_proj))
    conv, ssm = make_states(512, 16, slots, torch.bfloat16)
    expected_conv, expected_ssm = conv.clone(), ssm.clone()
    xz, known = random(rows, 2 * 512, dtype=torch.bfloat16, seed=11), segments([1] * rows, slots, [True] * rows)
    expected = by_prefill(kernels, xz, weights, expected_conv, expected_ssm, known)
    actual = kernels.mamba_decode(xz, kernels.mamba_decode.pack(weights), conv, ssm, known.state_ids)
    assert not actual.isnan().any()
    assert_same(actual, expected)
    assert_same(ssm, expected_ssm)
    assert native.level()


@pytest.mark.parametrize("name", NAMES)
def test_it_equals_the_formula(name: str) -> None:
    kernels, device = kernels_for(name)
    channels, states, rank = 24, 5, 3
    w = make_weights(channels, states, rank, torch.float32)
    conv, ssm = make_states(channels, states, [2], torch.float32)
    xz = random(1, 2 * channels, seed=11)
    bias = None if w.conv_bias is None else double(w.conv_bias)
    u, _ = oracle.causal_conv1d(double(xz[:, :channels]), double(w.conv_weight), bias, double(conv[2]))
    projected = u @ double(w.x_proj).T
    dt = oracle.rms_norm(projected[:, :rank], double(w.dt_norm), w.eps) @ double(w.dt_proj).T
    b = oracle.rms_norm(projected[:, rank : rank + states], double(w.b_norm), w.eps)
    c = oracle.rms_norm(projected[:, rank + states :], double(w.c_norm), w.eps)
    inputs = oracle.Scan(u, dt, b, c, double(xz[:, channels:]))
    expected, final = oracle.selective_scan(
        inputs, double(w.scan.a), double(w.scan.d), double(w.scan.dt_bias), double(ssm[2])
    )
    conv, ssm, xz, ids = move((conv, ssm, xz, torch.tensor([2], dtype=torch.int32)), device)
    packed = kernels.mamba_decode.pack(pack(kernels, move(w, device)))
    assert_close(kernels.mamba_decode(xz, packed, conv, ssm, ids).cpu(), expected, atol=1e-4)
    assert_close(ssm[2].cpu(), final, atol=1e-4)


@pytest.mark.parametrize("programs", [20, 4])  # of 18 rows 4 share one, or 16
@pytest.mark.skipif("triton" not in NAMES, reason="neither triton's interpreter nor a GPU")
def test_triton_gives_a_row_the_same_bits_alone_and_in_one_program_with_others(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jamba_server.kernels.triton import mamba

    kernels, device = kernels_for("triton")
    weights = pack(kernels, move(make_weights(40, 5, 10, torch.bfloat16), device))
    slots = [(7 * i + 3) % SLOTS for i in range(18)]
    xz = random(18, 2 * 40, dtype=torch.bfloat16, seed=11).to(device)
    ids = torch.tensor(slots, dtype=torch.int32).to(device)
    packed = kernels.mamba_decode.pack(weights)
    conv, ssm = move(make_states(40, 5, slots, torch.bfloat16), device)
    alone = [kernels.mamba_decode(xz[i : i + 1], packed, conv, ssm, ids[i : i + 1]) for i in range(18)]
    monkeypatch.setattr(mamba, "PROGRAMS", programs)
    more_conv, more_ssm = move(make_states(40, 5, slots, torch.bfloat16), device)
    together = kernels.mamba_decode(xz, packed, more_conv, more_ssm, ids)
    assert not together.isnan().any()
    assert_same(together, torch.cat(alone))
    assert_same(more_conv, conv)
    assert_same(more_ssm, ssm)


@pytest.mark.skipif(not interpreted(), reason="not in triton's interpreter")
def test_triton_stands_for_its_own_parts_only() -> None:
    assert select("cuda", {"selective_state_update": "reference"}).names["mamba_decode"] == "reference"
    with pytest.raises(KernelError, match=r"mamba_decode=triton.*kernels.triton's Linear"):
        select("cuda", {"linear": "reference", "mamba_decode": "triton"})
    # the scan of whole prompts is none of them, and torch's product leaves few rows to Triton's
    fastest = select("cuda", {}, batch_invariant=False)
    assert [fastest.names[op] for op in ("selective_scan", "linear", "mamba_decode")] == [
        *("triton-chunked", "torch", "triton")
    ]
    assert fastest.batch_dependent_ops == ("selective_scan", "linear", "mamba_decode")
    assert select("cuda", {}).batch_dependent_ops == ()


def test_a_wish_for_another_part_is_a_wish_against_the_whole() -> None:
    try:
        select("cpu", {"mamba_decode": "cpu"})
    except KernelError as error:
        pytest.skip(str(error))
    assert select("cpu", {"selective_state_update": "reference"}).names["mamba_decode"] == "reference"
    with pytest.raises(KernelError, match=r"mamba_decode=cpu.*SelectiveStateUpdate"):
        select("cpu", {"selective_state_update": "reference", "mamba_decode": "cpu"})
