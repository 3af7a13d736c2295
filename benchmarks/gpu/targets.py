"""Lists the kernel calls that the part `tune` of the GPU check times. The arguments of these calls have the sizes that
occur in decode steps and in the prefill of prompts.

They are a model's matrix products, attention, scan and Mamba decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Maker, Shape
from benchmarks.gpu.predict import Work
from benchmarks.gpu.sweep import config_of
from benchmarks.gpu.variants import (
    Variant,
    attention_variants,
    gated_variants,
    mamba_decode_variants,
    narrow_variants,
    product_variants,
    scan_variants,
    sectioned_variants,
)
from jamba_server.engine.config import Quantization
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.quantization import FORMATS
from jamba_server.kernels.ops import Kernels
from jamba_server.kernels.table import select

MOST_OUTPUTS = 4096  # The kernels may split the sums of a weight with at most this number of rows into sections.


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The numbers of rows, sequences and tokens for which kernels are tuned.

    `decode_rows` and `prefill_rows` are numbers of rows of matrix products. `contexts` are for decode attention:
    (number of sequences, number of tokens in each). `prompts` are for prefill attention: (number of queries, number of
    keys). `scans` are for the selective scan: (number of sequences, number of tokens in each).
    """

    decode_rows: tuple[int, ...] = (1, 8, 64, 256)
    prefill_rows: tuple[int, ...] = (2048, 8192)
    contexts: tuple[tuple[int, int], ...] = ((1, 32768), (8, 8192), (64, 2048), (256, 512))
    prompts: tuple[tuple[int, int], ...] = ((2048, 2048), (8192, 8192), (2048, 32768))
    scans: tuple[tuple[int, int], ...] = ((1, 2048), (1, 8192), (16, 512), (64, 128))
    variants: int | None = None  # largest number of variants to try for each kernel call, or None to try all variants


TINY = Sizes(decode_rows=(2,), prefill_rows=(70,), contexts=((2, 40),), prompts=((5, 40),), scans=((2, 9),), variants=2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A kernel call to tune. The fields contain the arguments of the call, the number of times that one step of the
    model makes this call, and the variants to try."""

    case: Case
    label: str
    count: int
    variants: Sequence[Variant]
    implementation: str = "triton"

    def work(self) -> Work:
        """Returns the least number of bytes that this call must read and write, and the number of operations that it
        must do.

        The sizes of the call's results are derived from its arguments. The call need not run, so the arguments may be
        `meta` tensors, which have no data.
        """
        case = self.case
        results = case.args[0] if case.op in ("attention_decode", "attention_prefill") else ()
        if case.op == "selective_scan":
            results = case.args[0].u
        if case.op == "mamba_decode":
            results = case.args[0][:, : case.args[0].shape[1] // 2]
        if case.op == "linear":
            outputs = len(case.weights[0]) // (2 if case.method else 1)
            results = case.args[0].new_empty(len(case.args[0]), outputs, device="meta")
        return Work(bytes=case.bytes_moved(results), operations=case.operations)

    def kernels(self) -> Kernels:
        return select("cuda", {"all": "triton", self.case.op: self.implementation})


class Targets:
    """The kernel calls of a model that are tuned, in groups. All calls of a group use the same weights."""

    def __init__(self, maker: Maker, config: JambaConfig, sizes: Sizes) -> None:
        self.maker, self.config, self.sizes = maker, config, sizes
        self.rows = (*sizes.decode_rows, *sizes.prefill_rows)

    def groups(self) -> Iterator[list[Target]]:
        for group in self._all_groups():
            yield [replace(target, variants=target.variants[: self.sizes.variants]) for target in group]

    def labels(self) -> list[str]:
        """Returns the labels of all tuned calls in order. The calls are built with tensors on the device `meta`, which
        take no memory."""
        alone = Targets(Maker(self.maker.shape, torch.device("meta")), self.config, self.sizes)
        return [target.label for group in alone.groups() for target in group]

    def _all_groups(self) -> Iterator[list[Target]]:
        yield from self._plain()
        yield from self._mamba()
        yield from self._attention()
        for quantization in FORMATS:
            yield from self._feed_forward(quantization)

    def _plain(self) -> Iterator[list[Target]]:
        m, config = self.maker.shape, self.config
        mamba, attention = len(config.mamba_layers), len(config.attention_layers)
        yield self._linear("in_proj", 2 * m.d, m.h, mamba)
        yield self._linear("out_proj", m.h, m.d, mamba)
        yield from self._feed_forward(None)
        yield self._linear("qkv_proj", (m.heads + 2 * m.kv_heads) * m.z, m.h, attention)
        yield self._linear("lm_head", m.v, m.h, 1)
        yield self._linear("x_proj", m.r + 2 * m.s, m.d, mamba)

    def _feed_forward(self, quantization: Quantization | None) -> Iterator[list[Target]]:
        m, layers = self.maker.shape, range(self.config.num_hidden_layers)
        experts = sum(self.config.is_moe(layer) for layer in layers)
        if dense := len(layers) - experts:
            yield self._linear("gate_up", 2 * m.f, m.h, dense, quantization)
            yield self._gated(dense, quantization)
            yield self._linear("down", m.h, m.f, dense, quantization)
        if experts:
            weights = self.maker.expert_weights()
            yield [self._experts(rows, weights, experts, quantization) for rows in self.rows]

    def _linear(
        self, name: str, outputs: int, inputs: int, count: int, quantization: Quantization | None = None
    ) -> list[Target]:
        weight = self.maker.matrix(outputs, inputs)
        targets: list[Target] = []
        for rows in self.sizes.decode_rows if name == "lm_head" else self.rows:
            label = " ".join(filter(None, (name, quantization)))
            case = self.maker.linear(f"{label}, {rows} rows", rows, weight, quantization)
            variants = product_variants("linear", rows, quantized=quantization is not None)
            if name == "x_proj":
                variants = narrow_variants(rows)
            elif outputs <= MOST_OUTPUTS:
                variants = sectioned_variants(rows, quantized=quantization is not None)
            targets.append(Target(case=case, label=case.label, count=count, variants=variants))
        return targets

    def _gated(self, count: int, quantization: Quantization | None) -> list[Target]:
        """Returns calls of the product gate_up with its activation, which a model makes in place of `gate_up`."""
        from jamba_server.kernels.triton.gated import silu_and_mul

        m, targets = self.maker.shape, list[Target]()
        weight = self.maker.matrix(2 * m.f, m.h)
        for rows in self.rows:
            label = " ".join(filter(None, ("gated gate_up", quantization)))
            case = self.maker.linear(f"{label}, {rows} rows", rows, weight, quantization)
            case = replace(case, method="gated", args=(*case.args, silu_and_mul))
            variants = gated_variants(rows, quantized=quantization is not None)
            targets.append(Target(case=case, label=case.label, count=count, variants=variants))
        return targets

    def _experts(self, rows: int, weights: Any, count: int, quantization: Quantization | None) -> Target:
        case = self.maker.expert_case(rows, weights, quantization)
        variants = product_variants("run_experts", 2 * rows, quantized=quantization is not None)
        return Target(case=case, label=f"experts, {case.label}", count=count, variants=variants)

    def _mamba(self) -> Iterator[list[Target]]:
        count = len(self.config.mamba_layers)
        for rows in self.sizes.decode_rows:
            case = next(case for case in self.maker.recurrence(rows, 1) if case.op == "mamba_decode")
            label = f"mamba decode, {rows} rows"
            yield [Target(case=case, label=label, count=count, variants=mamba_decode_variants())]
        for sequences, tokens in self.sizes.scans:
            case = next(case for case in self.maker.recurrence(sequences, tokens) if case.op == "selective_scan")
            for name in ("triton", "triton-chunked"):
                label, variants = f"scan, {name}, {case.label}", scan_variants(name)
                yield [Target(case=case, label=label, count=count, variants=variants, implementation=name)]

    def _attention(self) -> Iterator[list[Target]]:
        runs = [(sequences, 1, context) for sequences, context in self.sizes.contexts]
        for sequences, tokens, context in [*runs, *((1, *run) for run in self.sizes.prompts)]:
            [case] = self.maker.attention(sequences, tokens, context)
            variants = attention_variants(decode=tokens == 1)
            count = len(self.config.attention_layers)
            yield [Target(case=case, label=f"attention, {case.label}", count=count, variants=variants)]


def targets_of(shape: str, device: str) -> Targets:
    config = config_of(shape)
    maker = Maker(Shape.of(shape, config), torch.device(device))
    return Targets(maker, config, TINY if shape == "tiny" else Sizes())
