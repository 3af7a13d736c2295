"""Adapters to optional packages, by fakes of their functions: the real parameters, checks of what the real ones check,
and the documented formulas."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from inspect import Signature, signature
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jamba_server.kernels import external, table
from jamba_server.kernels.ops import KernelUnavailable, Pages, ScanInputs, ScanWeights
from jamba_server.kernels.reference.attention import attention_decode, attention_prefill
from jamba_server.kernels.reference.conv import causal_conv1d, causal_conv1d_update
from jamba_server.kernels.reference.scan import selective_state_update
from tests.kernels.cases import assert_close, assert_same, double, layer_storage, random, segments
from tests.kernels.on_device import OnDevice
from tests.kernels.test_attention import SCALE, keys_and_values, paged, query_start

CHANNELS = 24
Install = Callable[[Callable[[], Any], str, str, "Fake"], Any]
without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


class Fake:
    """A stand-in for a package's function, with the same parameters. It computes its result from its arguments."""

    def __init__(self, parameters: str | Signature, compute: Callable[[Any], Tensor]) -> None:
        known = isinstance(parameters, Signature)
        self.__signature__ = parameters if known else signature(eval(f"lambda {parameters}: 0"))
        self._compute = compute

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        return self._compute(SimpleNamespace(**bound.arguments))


@pytest.fixture(params=["fake", pytest.param("real", marks=[pytest.mark.cuda, without_gpu])])
def install(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Returns a function that loads an adapter to the function `name` of the package `module`. The adapter calls a
    stand-in for this function or, on a GPU where the package is installed, the real one."""

    def load(adapter: Callable[[], Any], module: str, name: str, fake: Fake) -> Any:
        if request.param == "real":
            try:
                return OnDevice(adapter(), torch.device("cuda"))
            except (KernelUnavailable, ImportError) as error:
                pytest.skip(str(error))
        for full in {module.partition(".")[0], module}:
            found = ModuleType(full)
            found.__spec__ = ModuleSpec(full, None)
            monkeypatch.setitem(sys.modules, full, found)
        setattr(sys.modules[module], name, fake)
        return adapter()

    return load


# causal-conv1d ------------------------------------------------------------------------------------------------------


def conv1d_update(a: Any) -> Tensor:
    """x [batch, dim], conv_state [slots, dim, state_len], weight [dim, width]."""
    assert a.conv_state_indices.dtype == torch.int32 and a.activation == "silu" and a.cache_seqlens is None
    assert a.conv_state.shape[1:] == (a.x.shape[1], a.weight.shape[1] - 1) and a.weight.shape[0] == a.x.shape[1]
    line = torch.cat([a.conv_state[a.conv_state_indices], a.x[:, :, None]], dim=2)
    a.conv_state[a.conv_state_indices] = line[:, :, 1:]
    out = (line.float() * a.weight.float()).sum(2)
    return F.silu(out if a.bias is None else out + a.bias.float()).to(a.x.dtype)


def conv1d(a: Any) -> Tensor:
    """x [batch, dim, length], weight [dim, width], seq_idx [batch, length]."""
    assert a.initial_states is None and not a.return_final_states and a.final_states_out is None, "not with seq_idx"
    assert a.seq_idx.dtype == torch.int32 and a.seq_idx.is_contiguous() and a.activation == "silu"
    assert a.seq_idx.shape == (a.x.shape[0], a.x.shape[2])
    assert a.x.stride(1) == 1 and a.x.stride(2) > 1, "channels last"
    assert a.x.shape[1] % 8 == a.x.stride(0) % 8 == a.x.stride(2) % 8 == 0
    out = torch.empty_like(a.x)
    bias = None if a.bias is None else a.bias.float()
    for number in a.seq_idx[0].unique():
        own = a.seq_idx[0] == number
        padded = F.pad(a.x[:, :, own].float(), (a.weight.shape[1] - 1, 0))
        out[:, :, own] = F.silu(F.conv1d(padded, a.weight.float()[:, None], bias, groups=a.x.shape[1])).to(a.x.dtype)
    return out


CONV1D_UPDATE = Fake(
    "x, conv_state, weight, bias=None, activation=None, cache_seqlens=None, conv_state_indices=None", conv1d_update
)
CONV1D = Fake(
    "x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None, "
    "activation=None",
    conv1d,
)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution_of_one_token(install: Install, with_bias: bool, width: int) -> None:
    update = install(external.CausalConv1dUpdate, "causal_conv1d", "causal_conv1d_update", CONV1D_UPDATE)
    x = random(3, 2 * CHANNELS, dtype=torch.bfloat16)[:, :CHANNELS]
    weight = random(width, CHANNELS, dtype=torch.bfloat16, seed=1)
    bias = random(CHANNELS, dtype=torch.bfloat16, seed=2) if with_bias else None
    state = layer_storage(6, width - 1, CHANNELS, dtype=torch.bfloat16)
    slots = torch.tensor([5, 1, 2], dtype=torch.int32)
    state[slots] = random(3, width - 1, CHANNELS, dtype=torch.bfloat16, seed=3)
    expected_state = state.clone()
    expected = causal_conv1d_update(x, weight, bias, expected_state, slots)
    assert_close(update(x, weight, bias, state, slots), double(expected), roundings=2)
    assert_same(state, expected_state)


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution_of_packed_sequences_with_states(
    install: Install, dtype: torch.dtype, with_bias: bool, width: int
) -> None:
    convolve = install(external.CausalConv1d, "causal_conv1d", "causal_conv1d_fn", CONV1D)
    lengths, slots = (1, 7, 2, 3, 1, 9), (4, 1, 6, 3, 2, 9)
    saves = [(), ((1, 7), (5, 8)), ((1, 0),), (), (), ((2, 5),)]
    x = random(sum(lengths), 2 * CHANNELS, dtype=dtype)[:, CHANNELS:]
    weight = random(width, CHANNELS, dtype=dtype, seed=1)
    bias = random(CHANNELS, dtype=dtype, seed=2) if with_bias else None
    ragged = segments(lengths, slots, (True, False, True, False, False, True), saves)
    state = layer_storage(10, width - 1, CHANNELS, dtype=dtype)
    for slot in (4, 6, 9):
        state[slot] = random(width - 1, CHANNELS, dtype=dtype, seed=slot)
    expected_state = state.clone()
    expected = causal_conv1d(x, weight, bias, expected_state, ragged)
    assert_close(convolve(x, weight, bias, state, ragged), double(expected), roundings=2)
    assert_same(state, expected_state)


def test_states_too_large_for_its_index_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "_function", lambda *_: refuse)
    update = external.CausalConv1dUpdate()
    state = torch.empty_strided((4, 3, CHANNELS), (2**30 + 8, CHANNELS, 1), device="meta")
    x, weight, ids = random(1, CHANNELS), random(4, CHANNELS), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="32 bits"):
        update(x, weight, None, state, ids)


# mamba-ssm ----------------------------------------------------------------------------------------------------------


def state_update(a: Any) -> Tensor:
    """state [slots, dim, dstate], x, dt, z [batch, dim], A [dim, dstate], B, C [batch, dstate], D, dt_bias [dim]."""
    assert a.dt_softplus and a.state_batch_indices.shape == (len(a.x),)
    assert a.state_batch_indices.dtype == torch.int64, "or the kernel's offsets overflow"
    assert a.x.shape == a.dt.shape == a.z.shape and a.B.shape == a.C.shape == (len(a.x), a.A.shape[1])
    step = F.softplus(a.dt.float() + a.dt_bias)
    h = a.state[a.state_batch_indices] * torch.exp(step[:, :, None] * a.A)
    h = h + (step * a.x.float())[:, :, None] * a.B.float()[:, None, :]
    a.state[a.state_batch_indices] = h
    return (((h * a.C.float()[:, None, :]).sum(2) + a.x.float() * a.D) * F.silu(a.z.float())).to(a.x.dtype)


STATE_UPDATE = Fake(
    "state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, state_batch_indices=None", state_update
)


def test_state_update(install: Install) -> None:
    module = "mamba_ssm.ops.triton.selective_state_update"
    update = install(external.SelectiveStateUpdate, module, "selective_state_update", STATE_UPDATE)
    rows, states = 3, 8
    wide = random(rows, 2 * CHANNELS, seed=1)
    dt, b, c = (random(rows, size, seed=seed) for seed, size in ((2, CHANNELS), (3, states), (4, states)))
    inputs = ScanInputs(wide[:, :CHANNELS], dt, b, c, wide[:, CHANNELS:])
    weights = ScanWeights(-random(CHANNELS, states, seed=5).exp(), random(CHANNELS, seed=6), random(CHANNELS, seed=7))
    state = layer_storage(6, CHANNELS, states, dtype=torch.float32)
    slots = torch.tensor([4, 0, 2], dtype=torch.int32)
    state[slots] = random(rows, CHANNELS, states, seed=8)
    expected_state = state.clone()
    expected = selective_state_update(inputs, weights, expected_state, slots)
    assert_close(update(inputs, weights, state, slots), double(expected))
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5, equal_nan=True)


# flash-attn ---------------------------------------------------------------------------------------------------------


def varlen(a: Any) -> Tensor:
    """q [total, heads, size], k and v pages."""
    assert a.block_table.dtype == a.cu_seqlens_q.dtype == a.cu_seqlens_k.dtype == torch.int32
    assert a.causal and not a.dropout_p and a.k.shape[1] % 256 == 0
    lengths = a.cu_seqlens_k.diff()
    assert (a.max_seqlen_q, a.max_seqlen_k) == (a.cu_seqlens_q.diff().max(), lengths.max()) and a.cu_seqlens_k[0] == 0
    pages = Pages(a.k, a.v, a.block_table, lengths, a.max_seqlen_k)
    return attention_prefill(a.q, pages, a.cu_seqlens_q, a.max_seqlen_q, a.softmax_scale)


def kvcache(a: Any) -> Tensor:
    """q [batch, 1, heads, size], k_cache and v_cache pages."""
    assert a.k is a.v is a.rotary_cos is a.rotary_sin is a.cache_batch_idx is a.cache_leftpad is None
    assert a.cache_seqlens.dtype == a.block_table.dtype == torch.int32
    assert a.causal and a.q.shape[1] == 1 and a.k_cache.shape[1] % 256 == 0 and not a.return_softmax_lse
    pages = Pages(a.k_cache, a.v_cache, a.block_table, a.cache_seqlens, int(a.cache_seqlens.max()))
    return attention_decode(a.q[:, 0], pages, a.softmax_scale)[:, None]


VARLEN = Fake(
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, "
    "block_table=None",
    varlen,
)
KVCACHE = Fake(
    "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, "
    "cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
    kvcache,
)


def test_attention(install: Install) -> None:
    contexts, lengths = (300, 5, 256), (40, 5, 1)
    pages = paged([keys_and_values(n, 2, 8, torch.bfloat16, n) for n in contexts], 256)
    q, starts = random(sum(lengths), 4, 8, dtype=torch.bfloat16, seed=1), query_start(lengths)
    prefill = install(external.AttentionPrefill, "flash_attn", "flash_attn_varlen_func", VARLEN)
    expected = attention_prefill(q, pages, starts, 40, SCALE)
    assert_close(prefill(q, pages, starts, 40, SCALE), double(expected), atol=5e-3)
    decode = install(external.AttentionDecode, "flash_attn", "flash_attn_with_kvcache", KVCACHE)
    assert_close(decode(q[:3], pages, SCALE), double(attention_decode(q[:3], pages, SCALE)), atol=5e-3)


# Reasons ------------------------------------------------------------------------------------------------------------


def refuse(_: Any) -> Tensor:
    raise AssertionError("not to be called")


def test_the_table_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "find_spec", lambda name: None)
    rows = {(row.op, row.implementation): row.status for row in table.describe("cuda")}
    for op, name in (
        ("causal_conv1d", "causal-conv1d"),
        ("causal_conv1d_update", "causal-conv1d"),
        ("selective_state_update", "mamba-ssm"),
        ("attention_prefill", "flash-attn"),
        ("attention_decode", "flash-attn"),
    ):
        assert rows[op, name] == f"the package {name} is not installed"
    assert "neither an initial state nor packed sequences" in rows["selective_scan", "mamba-ssm"]


def test_none_is_preferred_to_our_own() -> None:
    packages = ("causal-conv1d", "mamba-ssm", "flash-attn")
    for op in table.OPS:
        entries = table.implementations(op, "cuda")
        names = [entry.name for entry in entries]
        for entry in entries:
            if entry.name in packages:
                assert not entry.batch_invariant
                assert names.index("triton") < names.index(entry.name)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "find_spec", lambda name: object())
    monkeypatch.setattr(external, "import_module", lambda name: SimpleNamespace(selective_state_update=refuse))
    with pytest.raises(KernelUnavailable, match="mamba-ssm has a selective_state_update without state_batch_indices"):
        external.SelectiveStateUpdate()


def test_a_package_whose_compiled_part_is_missing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `import causal_conv1d` does where only its Python files are installed."""
    monkeypatch.setattr(external, "find_spec", lambda name: object())

    def fail(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'causal_conv1d_cuda'")

    monkeypatch.setattr(external, "import_module", fail)
    with pytest.raises(table.KernelError, match=r"causal_conv1d=causal-conv1d cannot run.*causal_conv1d_cuda"):
        table.select("cuda", {"all": "reference", "causal_conv1d": "causal-conv1d"})
