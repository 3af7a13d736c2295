"""PyTorch's fast kernels: grouped_mm, which runs on a CPU too, and a fake of varlen_attn, which does not."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from jamba_server.kernels import table, torch_ops
from jamba_server.kernels.ops import KernelUnavailable, Pages, QuantizedWeight
from jamba_server.kernels.reference import linear, moe
from jamba_server.kernels.reference.attention import attention_prefill
from tests.kernels import oracle
from tests.kernels.cases import assert_close, assert_same, double, random
from tests.kernels.on_device import OnDevice
from tests.kernels.test_attention import SCALE, keys_and_values, paged, query_start
from tests.kernels.test_external import Fake

LONG = torch_ops.MIN_QUERY_LEN


def refuse(*_: Any, **__: Any) -> Tensor:
    raise AssertionError("the other's work")


def packed_attention(a: Any) -> Tensor:
    """query [rows, Q, Z], key and value [tokens, G, Z], packed."""
    assert a.cu_seq_q.dtype == a.cu_seq_k.dtype == torch.int32 and a.window_size == (-1, 0) and a.return_aux is None
    assert getattr(a, "enable_gqa", True) or a.query.shape[1] == a.key.shape[1]
    assert a.query.dtype == a.key.dtype == a.value.dtype != torch.float32
    assert (a.max_q, a.max_k) == (a.cu_seq_q.diff().max(), a.cu_seq_k.diff().max()) and a.cu_seq_k[-1] <= len(a.key)
    out = torch.empty_like(a.query)
    for rows, keys in zip(a.cu_seq_q.unfold(0, 2, 1).tolist(), a.cu_seq_k.unfold(0, 2, 1).tolist(), strict=True):
        q, k, v = a.query[slice(*rows)], a.key[slice(*keys)], a.value[slice(*keys)]
        out[slice(*rows)] = torch.from_numpy(oracle.attention(double(q), double(k), double(v), a.scale))
    return out


@pytest.fixture
def _flash(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(varlen, "varlen_attn", Fake(signature(varlen.varlen_attn), packed_attention))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)


def batch(contexts: tuple[int, ...], kv_heads: int, size: int, dtype: torch.dtype) -> Pages:
    return paged([keys_and_values(n, kv_heads, size, dtype, seed) for seed, n in enumerate(contexts)], 16)


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_of_new_and_continued_prompts(dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    """Whole prompts, chunks on an earlier context, a single token."""
    contexts, lengths = (LONG, LONG + 21, 150, 37, 1), (LONG, 3, 90, 1, 1)
    pages, starts = batch(contexts, kv_heads, 16, dtype), query_start(lengths)
    q = random(sum(lengths), heads, 16, dtype=dtype, seed=9)
    out = torch_ops.AttentionPrefill(refuse)(q, pages, starts, max(lengths), SCALE)
    assert out.dtype == dtype
    assert_close(out, double(attention_prefill(q, pages, starts, max(lengths), SCALE)), atol=1e-3)


@pytest.mark.usefixtures("_flash")
@pytest.mark.parametrize(
    ("dtype", "size", "length", "limit"),
    [
        (torch.float32, 16, LONG, 1 << 29),
        (torch.bfloat16, 12, LONG, 1 << 29),
        (torch.bfloat16, 264, LONG, 1 << 29),
        (torch.bfloat16, 16, LONG - 1, 1 << 29),
        # two contexts, padded to the longer one, K and V of two heads
        (torch.bfloat16, 16, LONG, 2 * 90 * 2 * 2 * 16 * 2 - 1),
    ],
)
def test_attention_that_flash_does_not_take(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: int, length: int, limit: int
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", refuse)
    monkeypatch.setattr(torch_ops, "MAX_GATHERED_BYTES", limit)
    pages, starts = batch((length, 90), 2, size, dtype), query_start((length, 5))
    q = random(length + 5, 2, size, dtype=dtype, seed=9)
    out = torch_ops.AttentionPrefill(attention_prefill)(q, pages, starts, length, SCALE)
    assert_same(out, attention_prefill(q, pages, starts, length, SCALE))


@pytest.mark.usefixtures("_flash")
def test_attention_at_the_limit_of_memory_is_still_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ops, "MAX_GATHERED_BYTES", 2 * 90 * 2 * 2 * 16 * 2)
    pages, starts = batch((LONG, 90), 2, 16, torch.bfloat16), query_start((LONG, 5))
    torch_ops.AttentionPrefill(refuse)(random(LONG + 5, 2, 16, dtype=torch.bfloat16), pages, starts, LONG, SCALE)


def test_a_torch_without_flash_attention_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with pytest.raises(KernelUnavailable, match="no flash attention"):
        torch_ops.AttentionPrefill(refuse)


class Other(moe.RunExperts):
    """The reference, which counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, experts: moe.Experts, weights: Tensor, ids: Tensor) -> Tensor:
        self.calls += 1
        return super().__call__(x, experts, weights, ids)


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_many_rows_by_the_grouped_product(top_k: int) -> None:
    """One expert is nobody's choice, one is nearly everybody's."""
    tokens, hidden, intermediate, count = 140, 24, 16, 4
    gate_up = random(count, 2 * intermediate, hidden, dtype=torch.bfloat16, seed=1, scale=0.3)
    down = random(count, hidden, intermediate, dtype=torch.bfloat16, seed=2, scale=0.3)
    x, weights = random(tokens, hidden, dtype=torch.bfloat16), torch.softmax(random(tokens, top_k, seed=3), dim=-1)
    ids = torch.tensor([[3, 0, 1] if t % 7 else [0, 3, 1] for t in range(tokens)], dtype=torch.int32)[:, :top_k]
    other = Other()
    ours = torch_ops.RunExperts(moe.silu_and_mul, other)
    packed = ours.pack(gate_up, down)
    enough = torch_ops.MIN_ROWS_PER_EXPERT * count // top_k + 1
    for rows, calls in ((tokens, 0), (enough, 0), (enough - 2, 1)):
        out = ours(x[:rows], packed, weights[:rows], ids[:rows])
        assert other.calls == calls
        chosen = ids[:rows].long().numpy()
        expected = oracle.run_experts(double(x[:rows]), double(gate_up), double(down), double(weights[:rows]), chosen)
        assert_close(out, expected, roundings=4, atol=2e-2)


def quantized(*shape: int) -> QuantizedWeight:
    values = (random(*shape, seed=len(shape)) * 40).clamp(-127, 127).to(torch.int8)
    return QuantizedWeight(values, torch.full((*shape[:-1], 1), 0.01), shape[-1], 8)


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize("kind", ["quantized", "float32", "odd"])
def test_weights_that_it_does_not_take_go_to_the_other(kind: str) -> None:
    tokens, hidden, intermediate, count = 80, 24, 12 if kind == "odd" else 16, 2
    shapes = (count, 2 * intermediate, hidden), (count, hidden, intermediate)
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    gate_up, down = (quantized(*s) if kind == "quantized" else random(*s, dtype=dtype, seed=len(s)) for s in shapes)
    x, weights = random(tokens, hidden, dtype=dtype), torch.full((tokens, 1), 0.5)
    ids = torch.arange(tokens, dtype=torch.int32)[:, None] % count
    other = Other()
    ours = torch_ops.RunExperts(refuse, other)
    out = ours(x, ours.pack(gate_up, down), weights, ids)
    assert other.calls == 1
    assert_same(out, other(x, other.pack(gate_up, down), weights, ids))


@pytest.mark.usefixtures("_hopper")
def test_packing_copies_nothing() -> None:
    gate_up, down = random(2, 32, 24, dtype=torch.bfloat16), random(2, 24, 16, dtype=torch.bfloat16)
    packed = torch_ops.RunExperts(refuse, Other()).pack(gate_up, down)
    assert packed.matrices is not None
    pointers = [matrix.data_ptr() for matrix in packed.matrices]
    assert pointers == [gate_up.data_ptr(), down.data_ptr()]
    assert pointers == [packed.packed.gate_up[0].data_ptr(), packed.packed.down[0].data_ptr()]


class OtherLinear(linear.Linear):
    """The reference, which counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().__call__(x, weight, bias)


@pytest.mark.parametrize("with_bias", [True, False])
def test_many_rows_by_torchs_product(with_bias: bool) -> None:
    raw, bias = random(12, 40, dtype=torch.bfloat16, seed=1), random(12, dtype=torch.bfloat16) if with_bias else None
    other = OtherLinear()
    ours = torch_ops.Linear(other)
    weight = ours.pack(raw)
    assert weight.data_ptr() == raw.data_ptr()
    assert_same(ours.rows(weight, torch.tensor([3, 0])), raw[[3, 0]])
    for rows, calls in ((torch_ops.MIN_ROWS, 0), (torch_ops.MIN_ROWS - 1, 1)):
        x = random(rows, 40, dtype=torch.bfloat16)
        expected = double(x) @ double(raw).T + (0 if bias is None else double(bias))
        assert_close(ours(x, weight, bias), expected, roundings=2, atol=1e-2)
        assert other.calls == calls


def test_a_quantised_product_goes_to_the_other() -> None:
    other = OtherLinear()
    ours, raw = torch_ops.Linear(other), quantized(12, 40)
    x = random(torch_ops.MIN_ROWS, 40)
    out = ours(x, ours.pack(raw))
    assert other.calls == 1
    assert_same(out, linear.Linear()(x, raw))


@pytest.mark.parametrize("gpu", [False, True])
def test_machines_without_the_grouped_kernel_are_refused(monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(KernelUnavailable, match=r"needs a GPU of compute capability 9\.0 or 10\.0"):
        torch_ops.RunExperts(refuse, Other())


def test_they_are_preferred_where_exactness_is_not_asked_for() -> None:
    for op in ("attention_prefill", "run_experts", "linear"):
        entries = {entry.name: entry for entry in table.implementations(op, "cuda")}
        assert not entries["torch"].batch_invariant
        assert entries["triton"].batch_invariant
        assert list(entries).index("torch") < list(entries).index("triton")


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@on_a_gpu
@pytest.mark.cuda
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(20, 1, 128), (32, 8, 128), (6, 2, 64)])
def test_attention_beside_triton(heads: int, kv_heads: int, size: int) -> None:
    entries = {entry.name: entry for entry in table.implementations("attention_prefill", "cuda")}
    contexts, lengths = (LONG, 900, 700, 37), (LONG, 300, 700, 1)
    pages, starts = batch(contexts, kv_heads, size, torch.bfloat16), query_start(lengths)
    q = random(sum(lengths), heads, size, dtype=torch.bfloat16, seed=9)
    ours, triton = (OnDevice(entries[name].load(), torch.device("cuda")) for name in ("torch", "triton"))
    args = q, pages, starts, max(lengths), size**-0.5
    torch.testing.assert_close(ours(*args), triton(*args), rtol=2e-2, atol=2e-2)


@on_a_gpu
@pytest.mark.cuda
def test_experts_beside_triton() -> None:
    entries = {entry.name: entry for entry in table.implementations("run_experts", "cuda")}
    tokens, hidden, intermediate, count = 700, 512, 256, 16
    silu_and_mul = table.implementations("silu_and_mul", "cuda")[0].load()
    x = random(tokens, hidden, dtype=torch.bfloat16).cuda()
    matrices = [
        (random(*shape, dtype=torch.bfloat16, seed=shape[1]) / shape[2] ** 0.5).cuda()
        for shape in ((count, 2 * intermediate, hidden), (count, hidden, intermediate))
    ]
    scores = random(tokens, count, seed=3).softmax(dim=-1).topk(2)
    results: list[Tensor] = []
    for op in (entries["torch"].load(silu_and_mul), entries["triton"].load()):
        results.append(op(x, op.pack(*matrices), scores.values.cuda(), scores.indices.int().cuda()))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
