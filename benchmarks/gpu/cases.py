"""Builds test cases for every op of the module `kernels.ops`. A test case consists of random arguments for one call of
the op, the number of bytes that this call reads and writes, and the number of arithmetic operations in this call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from jamba_server.engine.config import Quantization
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.quantization import FORMATS
from jamba_server.engine.quantization.quantize import quantize
from jamba_server.kernels.ops import (
    CompressedStates,
    Kernels,
    MambaWeights,
    Pages,
    SampleInputs,
    ScanInputs,
    ScanWeights,
    Segments,
    StateSaves,
)

BLOCK_SIZE = 16
TOP_K = 2  # number of experts that the MoE router chooses for each token


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The sizes of a model. Each field is named by the letter that the module `kernels.ops` uses for this size."""

    name: str
    h: int
    f: int
    d: int
    heads: int
    kv_heads: int
    z: int
    experts: int
    r: int
    v: int = 65536
    s: int = 16
    w: int = 4

    @classmethod
    def of(cls, name: str, config: JambaConfig) -> Shape:
        return cls(
            name=name,
            h=config.hidden_size,
            f=config.intermediate_size,
            d=config.d_inner,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            z=config.head_dim,
            experts=config.num_experts if config.num_experts > 1 else 0,
            r=config.mamba_dt_rank,
            v=config.vocab_size,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A test case: the arguments of one call of an op, the number of bytes that this call reads and writes, and the
    number of arithmetic operations in this call.

    `method` is the method of the op that is called, if it is not the op itself.
    `args` are the arguments without the packed weights, which `arguments` inserts as the second argument. `pack` makes
    the packed weights from `weights`, quantised if `quantization` is set, for an implementation of the op.
    `moved` and `operations` are the bytes and operations of a call; if `moved` is None, `bytes_moved` computes it.
    `written` is the number of bytes that a call writes into its arguments.
    """

    op: str
    label: str
    args: tuple[Any, ...]
    method: str = ""
    weights: tuple[Any, ...] = ()
    quantization: Quantization | None = None
    pack: Callable[[Any, Kernels, tuple[Any, ...]], Any] = lambda op, kernels, weights: op.pack(*weights)
    moved: int | None = None
    written: int = 0
    operations: int = 0
    # largest allowed relative difference (a fraction) between a bfloat16 result and the float32 reference
    tolerance: float = 1e-2
    # true if the op is allowed to overwrite its first argument with arbitrary values; the first argument is then not
    # checked
    scratch: bool = False

    def called(self, kernels: Kernels) -> Callable[..., Any]:
        """Returns what the call calls, in the kernel set `kernels`."""
        op = getattr(kernels, self.op)
        return getattr(op, self.method) if self.method else op

    def prepare(self, kernels: Kernels, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        """Returns new copies of all arguments for a call of the op by its implementation in the kernel set `kernels`.

        If `dtype` is set, bfloat16 tensors are converted to `dtype`.
        """
        return self.arguments(self.packed(kernels, dtype), dtype)

    def packed(self, kernels: Kernels, dtype: torch.dtype | None = None) -> Any:
        """Returns a copy of the case's weights in the packed form that the kernel set `kernels` needs, or None if the
        op takes no weights."""
        if not self.weights:
            return None
        weights: tuple[Any, ...] = copy(self.weights, dtype)
        if self.quantization is not None:
            weights = tuple(quantize(weight, self.quantization) for weight in weights)
        return self.pack(getattr(kernels, self.op), kernels, weights)

    def arguments(self, packed: Any, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        """Returns a copy of the arguments in the field `args`. Unless `packed` is None, the packed weights `packed` are
        inserted as the second argument."""
        args = tuple(copy(value, dtype) for value in self.args)
        return args if packed is None else (args[0], packed, *args[1:])

    def bytes_moved(self, result: Any) -> int:
        """Returns the number of bytes that a call of the op reads plus the number of bytes that it writes.

        If `moved` is set, this is the number. Otherwise, every argument is read once and every result is written once.
        """
        if self.moved is not None:
            return self.moved
        return sum(tensor.nbytes for tensor in flatten((self.args, self.weights, result))) + self.written


def _expert_bytes(shape: Shape, quantization: Quantization) -> int:
    stored = FORMATS[quantization]
    return stored.num_bytes(2 * shape.f, shape.h) + stored.num_bytes(shape.h, shape.f)


def flatten(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in flatten(item)] if isinstance(value, tuple) else []


def copy(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, tuple):
        copied = [copy(item, dtype) for item in value]
        return type(value)(*copied) if hasattr(value, "_fields") else tuple(copied)
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype, copy=True) if dtype and value.dtype == torch.bfloat16 else value.clone()


class Maker:
    """Creates random tensors and test cases on one device. On torch's device `meta`, the tensors have shapes but no
    data."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.shape, self.device = shape, device
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

    def floats(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self.generator, device=self.device)

    def random(self, *size: int) -> Tensor:
        return self.floats(*size).to(torch.bfloat16)

    def matrix(self, *size: int) -> Tensor:
        """Returns a random weight matrix, scaled so that its product with an input has the same variance as this
        input."""
        return self.random(*size).mul_(size[-1] ** -0.5)

    def ints(self, values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(self.device)

    def rows(self, rows: int) -> Iterator[Case]:
        """Yields cases of the ops that compute each row of the input separately: norm, activation and matrix
        products."""
        m = self.shape
        x, weight, gate_up = self.random(rows, m.h), self.random(m.h), self.random(rows, 2 * m.f)
        yield Case(op="rms_norm", label=f"{rows} rows", args=(x, weight, 1e-6, self.random(rows, m.h)))
        yield Case(op="silu_and_mul", label=f"{rows} rows", args=(gate_up,))
        yield self.linear(f"out_proj, {rows} rows", rows, self.matrix(m.h, m.d), None)
        yield self.linear(f"in_proj, {rows} rows", rows, self.matrix(2 * m.d, m.h), None)
        weight = self.matrix(2 * m.f, m.h)
        for quantization in (None, *FORMATS):
            name = " ".join(filter(None, ("gate_up", quantization)))
            yield self.linear(f"{name}, {rows} rows", rows, weight, quantization)

    def linear(self, label: str, rows: int, weight: Tensor, quantization: Quantization | None) -> Case:
        outputs, inputs = weight.shape
        case = Case(
            op="linear",
            label=label,
            args=(self.random(rows, inputs),),
            weights=(weight,),
            operations=2 * rows * outputs * inputs,
        )
        if quantization is None:
            return case
        moved = FORMATS[quantization].num_bytes(outputs, inputs) + 2 * rows * (outputs + inputs)
        return replace(case, quantization=quantization, moved=moved)

    def experts(self, rows: int) -> Iterator[Case]:
        """Yields cases of the MoE router and of the experts, or nothing if the model has no experts."""
        m = self.shape
        if not m.experts:
            return
        yield Case(op="route_experts", label=f"{rows} rows", args=(self.random(rows, m.experts), TOP_K))
        weights = self.expert_weights()
        for quantization in (None, *FORMATS):
            yield self.expert_case(rows, weights, quantization)

    def expert_weights(self) -> tuple[Tensor, Tensor]:
        m = self.shape
        return self.matrix(m.experts, 2 * m.f, m.h), self.matrix(m.experts, m.h, m.f)

    def expert_case(self, rows: int, weights: tuple[Tensor, Tensor], quantization: Quantization | None) -> Case:
        """Returns a case of the op `run_experts` in which the experts of each token are chosen at random. The weights
        of experts that no token has chosen are not counted as bytes read."""
        m, choice = self.shape, torch.Generator().manual_seed(rows)
        chosen = torch.rand(rows, m.experts, generator=choice).topk(TOP_K).indices.int()
        each = 6 * m.f * m.h if quantization is None else _expert_bytes(m, quantization)
        return Case(
            op="run_experts",
            label=", ".join(filter(None, (quantization, f"{rows} rows"))),
            args=(self.random(rows, m.h), self.floats(rows, TOP_K).fill_(0.5), self.ints(chosen)),
            weights=weights,
            quantization=quantization,
            moved=len(chosen.unique()) * each + 4 * rows * m.h,
            operations=2 * rows * TOP_K * 3 * m.f * m.h,
        )

    def recurrence(self, sequences: int, tokens: int) -> Iterator[Case]:
        """Yields cases of Mamba's convolution and scan ops, for `sequences` sequences of `tokens` tokens each.

        If `tokens` is 1, these are the ops that decode uses, otherwise the ops that prefill uses.
        """
        m, rows = self.shape, sequences * tokens
        label = f"{sequences} x {tokens} tokens"
        u, dt, z = (self.random(rows, m.d) for _ in range(3))
        b, c = self.random(rows, m.s), self.random(rows, m.s)
        weights = ScanWeights(-self.floats(m.d, m.s).exp(), self.floats(m.d), self.floats(m.d) - 3)
        inputs, ssm = ScanInputs(u, dt, b, c, z), self.floats(sequences, m.d, m.s)
        conv, taps, bias = self.random(sequences, m.w - 1, m.d), self.random(m.w, m.d), self.random(m.d)
        ids = self.ints(range(sequences))
        none = StateSaves(self.ints([0] * (sequences + 1)), ids[:0], ids[:0])
        known = torch.ones(sequences, dtype=torch.bool, device=self.device)
        starts = self.ints([i * tokens for i in range(sequences + 1)])
        where: Any = ids if tokens == 1 else Segments(starts, tokens, ids, known, none)
        convolve, scan = (
            ("causal_conv1d_update", "selective_state_update") if tokens == 1 else ("causal_conv1d", "selective_scan")
        )
        yield Case(op=convolve, label=label, args=(u, taps, bias, conv, where), written=conv.nbytes)
        yield Case(op=scan, label=label, args=(inputs, weights, ssm, where), written=ssm.nbytes)
        if tokens == 1:
            yield self._mamba_decode(label, weights, conv, ssm, ids)

    def _mamba_decode(self, label: str, scan: ScanWeights, conv: Tensor, ssm: Tensor, ids: Tensor) -> Case:
        """Returns the case of the fused op `mamba_decode`. In a decode step, this op computes the part of a Mamba layer
        that lies between the projections in_proj and out_proj."""
        m = self.shape
        x_proj, dt_proj = self.matrix(m.r + 2 * m.s, m.d), self.matrix(m.d, m.r)
        norms = tuple(1 + 0.1 * self.random(size) for size in (m.r, m.s, m.s))
        between = (self.random(m.w, m.d), self.random(m.d), x_proj, *norms, dt_proj, scan)

        def pack(op: Any, kernels: Kernels, weights: tuple[Any, ...]) -> Any:
            conv_weight, conv_bias, x_proj, dt_norm, b_norm, c_norm, dt_proj, scan = weights
            return op.pack(
                MambaWeights(
                    conv_weight=conv_weight,
                    conv_bias=conv_bias,
                    x_proj=kernels.linear.pack(x_proj),
                    dt_norm=dt_norm,
                    b_norm=b_norm,
                    c_norm=c_norm,
                    eps=1e-6,
                    dt_proj=kernels.linear.pack(dt_proj),
                    scan=scan,
                )
            )

        # The fused op rounds intermediate results to bfloat16 several times, so this case allows a larger error than
        # the cases of other ops.
        return Case(
            op="mamba_decode",
            label=label,
            args=(self.random(len(ids), 2 * m.d), conv, ssm, ids),
            weights=between,
            pack=pack,
            written=conv.nbytes + ssm.nbytes,
            tolerance=2e-2,
        )

    def attention(self, sequences: int, tokens: int, context: int) -> Iterator[Case]:
        """Yields cases of attention for `sequences` sequences of `context` tokens each.

        In each sequence, the queries of the last `tokens` tokens attend to all keys that the causal mask admits.
        """
        m, blocks = self.shape, -(-context // BLOCK_SIZE)
        k, v = (self.random(sequences * blocks, BLOCK_SIZE, m.kv_heads, m.z) for _ in range(2))
        order = torch.randperm(sequences * blocks, generator=self.generator, device=self.device)
        lens = self.ints([context] * sequences)
        pages = Pages(k, v, order.view(sequences, blocks).int(), lens, context)
        q = self.random(sequences * tokens, m.heads, m.z)
        operations = 4 * sequences * m.heads * m.z * sum(range(context - tokens + 1, context + 1))
        label, scale = f"{sequences} x {tokens} of {context} keys", m.z**-0.5
        if tokens == 1:
            yield Case(op="attention_decode", label=label, args=(q, pages, scale), operations=operations)
            return
        starts = self.ints([i * tokens for i in range(sequences + 1)])
        args = (q, pages, starts, tokens, scale)
        yield Case(op="attention_prefill", label=label, args=args, operations=operations)

    def storage(self, tokens: int, pairs: int) -> Iterator[Case]:
        m = self.shape
        k, v = (self.random(tokens, m.kv_heads, m.z) for _ in range(2))
        k_pages, v_pages = (self.random(tokens // BLOCK_SIZE, BLOCK_SIZE, m.kv_heads, m.z) for _ in range(2))
        places = torch.randperm(tokens, generator=self.generator, device=self.device)
        yield Case(op="write_kv", label=f"{tokens} tokens", args=(k, v, k_pages, v_pages, places))
        slots, first = self.floats(2 * pairs, 4, m.d, m.s), self.ints(range(pairs), torch.int64)
        yield Case(op="copy_slots", label=f"{pairs} pairs", args=((slots,), first, first + pairs))
        scales = self.floats(2 * pairs, 4, m.d).abs()
        values = self.ints(
            torch.randint(-127, 128, slots.shape, generator=torch.Generator().manual_seed(0)), torch.int8
        )
        compressed, places = CompressedStates(values, scales), (first, first + pairs)
        half = (slots.nbytes + values.nbytes + scales.nbytes) // 2
        label = f"{pairs} pairs"
        yield Case(op="compress_states", label=label, args=(slots, compressed, *places), moved=half)
        yield Case(op="restore_states", label=label, args=(compressed, slots, *places), moved=half)

    def sampling(self, rows: int) -> Iterator[Case]:
        """Yields one case of sampling for each of several sets of sampling parameters. In the case `mixed`, the
        parameters differ from row to row."""
        ones, zeros = torch.ones(rows, device=self.device), torch.zeros(rows, device=self.device)
        keys = self.ints(range(rows), torch.int64) * 0x2545F4914F6CDD1D
        plain = SampleInputs(ones, ones, zeros, zeros.int(), keys)
        kinds = {
            "all tokens": plain,
            "greedy": plain._replace(temperature=zeros),
            "top-k 50": plain._replace(top_k=zeros.int() + 50),
            "top-p 0.9": plain._replace(top_p=ones * 0.9),
            "min-p 0.05": plain._replace(min_p=ones * 0.05),
        }
        kinds["top-k, top-p, min-p"] = SampleInputs(ones, ones * 0.95, ones * 0.02, zeros.int() + 40, keys)
        turn = torch.arange(rows, device=self.device) % len(kinds)
        fields = zip(*kinds.values(), strict=True)
        kinds["mixed"] = SampleInputs(*(torch.stack(field).gather(0, turn[None])[0] for field in fields))
        for kind, inputs in kinds.items():
            logits = self.floats(rows, self.shape.v) * 3
            # The op `sample` overwrites the logits with scores. When a timed call is repeated, the repeated call
            # therefore samples from scores instead of logits. At temperature 1, sampling from scores chooses the same
            # tokens as sampling from logits.
            yield Case(op="sample", label=f"{kind}, {rows} rows", args=(logits, inputs), scratch=True)
        generator, words = torch.Generator().manual_seed(0), -(-self.shape.v // 32)
        masks = self.ints(torch.randint(-(2**31), 2**31, (rows, words), generator=generator))
        args = (self.floats(rows, self.shape.v), masks, self.ints(range(rows), torch.int64))
        yield Case(op="apply_bitmask", label=f"{rows} rows", args=args)


def check(case: Case, ours: Kernels, reference: Kernels) -> float:
    """Runs a case twice: with the kernel set `ours`, and in float32 with the kernel set `reference`. Returns the
    largest relative error among the results of the kernel set `ours`.

    The error of a result, or of an argument that is written in place, is ||ours - reference|| / ||reference||. The
    error of a tensor of integers is the fraction of its elements that differ. If an error is NaN, NaN is returned.
    """
    args, wide_args = case.prepare(ours), case.prepare(reference, torch.float32)
    results = getattr(ours, case.op)(*args), getattr(reference, case.op)(*wide_args)
    if case.weights:  # packed weights are not compared, because each implementation packs the weights in its own layout
        args, wide_args = args[:1] + args[2:], wide_args[:1] + wide_args[2:]
    if case.scratch:
        args, wide_args = args[1:], wide_args[1:]
    found, expected = flatten((results[0], args)), flatten((results[1], wide_args))
    return max((_difference(a, b) for a, b in zip(found, expected, strict=True)), key=lambda e: (e != e, e))


def _difference(a: Tensor, b: Tensor) -> float:
    if not a.is_floating_point():
        return (a != b).float().mean().item() if a.numel() else 0.0
    a, wide = a.double(), b.double()
    infinite = wide.isinf()  # minus infinity is the logit of a forbidden token
    if not torch.equal(a[infinite], wide[infinite]):
        return math.inf
    return (a - wide)[~infinite].norm().item() / (wide[~infinite].norm().item() or 1.0)


def groups(maker: Maker) -> Iterator[Iterator[Case]]:
    """Yields the test cases in groups. The memory of a group can be freed before the next group is created."""
    for rows in (1, 64, 256, 2048):
        yield maker.rows(rows)
        yield maker.experts(rows)
    for sequences, tokens in ((1, 1), (64, 1), (256, 1), (1, 2048), (16, 512)):
        yield maker.recurrence(sequences, tokens)
    for sequences, tokens, context in ((1, 1, 32768), (64, 1, 4096), (1, 2048, 2048), (1, 2048, 32768)):
        yield maker.attention(sequences, tokens, context)
    yield maker.storage(8192, 8)
    for rows in (1, 64, 256):
        yield maker.sampling(rows)
