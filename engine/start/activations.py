"""Decides which matrix products of a model use activations of 8 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import torch

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.quantization import FORMATS, QuantizationPolicy
from jamba_server.kernels.activations import without_int8
from jamba_server.kernels.cpu.a8 import units_of
from jamba_server.kernels.cpu.library import library
from jamba_server.kernels.int8_activations import ALL_KINDS, BLOCK, Kind

_FINE_OR_FOUR_BITS = frozenset({Kind(4, is_fine=False), Kind(4, is_fine=True), Kind(8, is_fine=True)})
INT8_BY_DEFAULT: Final[Mapping[tuple[str, str], frozenset[Kind]]] = {
    ("avx2", "avx2"): _FINE_OR_FOUR_BITS,
    ("avx512", "avx512_vnni"): ALL_KINDS,
    ("avx512_bf16", "avx512_vnni"): _FINE_OR_FOUR_BITS,
}
"""Maps an instruction set of the CPU kernels, and the instruction set of their products with 8-bit activations, to the
kinds of weights whose products use 8-bit activations by default.

An entry is here if the products are faster for 16 to 256 rows and, beyond what the measurement varies, not slower for
fewer rows, and if the loss is at most 0.001 bits per byte (activation-products-avx2.md, activation-products-avx512.md
and activation-loss.md in benchmarks/results). A single row of weights of 8 bits takes about as long as with activations
of 16 bits: 0.93 to 1.08 times as long. Weights of 8 bits with a scale for a row take 1.06 to 1.12 times as long with
AVX-512 BF16, so they are not in that entry; with AVX-512 alone they take 1.03 to 1.08 times as long, and a third of the
time from 16 rows on. The products for AVX-VNNI were not measured: they do in one instruction what those for AVX2 do in
two.
"""


def int8_activations(
    config: EngineConfig,
    policy: QuantizationPolicy,
    dtype: torch.dtype,
    device: torch.device,
    names: Mapping[str, str],
) -> frozenset[Kind]:
    """Returns the kinds of weights that are multiplied by 8-bit activations. Other products have activations of the
    model's dtype. `names` maps each operation to the name of its kernel.

    Raises ConfigError if the options ask for 8-bit activations where there are none.
    """
    kinds, wanted = frozenset(_whole_number_kinds(policy)), config.activation_quantization
    if wanted == "int8":
        _check(policy, dtype, device, names, kinds)
        return frozenset(kind for kind in ALL_KINDS if kind.bits in {found.bits for found in kinds})
    if wanted == "none" or device.type != "cpu" or dtype == torch.float32 or names["linear"] != "cpu":
        return frozenset()
    if without_int8(names):
        return frozenset()
    level = config.kernels.get("linear", "").partition(":")[2] or library().level()
    return kinds & INT8_BY_DEFAULT.get((level, units_of(level)), frozenset())


def _whole_number_kinds(policy: QuantizationPolicy) -> Iterator[Kind]:
    """Yields the kinds of the weights that can be multiplied by 8-bit activations, as
    `kernels.int8_activations.takes_int8` decides for the weights themselves."""
    for form in policy.blocks.values():
        is_whole = form != FORMATS["fp8"] and all(number == int(number) for number in form.table or ())
        if is_whole and (form.group_size is None or form.group_size == BLOCK // 2 or form.group_size % BLOCK == 0):
            yield Kind.of(form.bits, form.group_size)
    if policy.quantization is not None and policy.quantization != "fp8":
        yield Kind.of(FORMATS[policy.quantization].bits, FORMATS[policy.quantization].group_size)


def _check(
    policy: QuantizationPolicy,
    dtype: torch.dtype,
    device: torch.device,
    names: Mapping[str, str],
    kinds: frozenset[Kind],
) -> None:
    if device.type != "cpu":
        raise ConfigError(
            f"activation_quantization 'int8' is for CPUs; the model runs on {device.type}, where activations keep the "
            "model's dtype. Leave the option out."
        )
    if dtype == torch.float32:
        raise ConfigError(
            "activation_quantization 'int8' and dtype 'float32' exclude each other: 8-bit activations are less precise "
            "than bfloat16."
        )
    if not kinds:
        weights = "plain" if policy.quantization is None else policy.quantization
        raise ConfigError(
            f"activation_quantization 'int8' needs weights that are whole numbers of 4 or 8 bits; this model's weights "
            f"are {weights}. Add --quantization int4 or int8, or leave the option out."
        )
    if missing := without_int8(names):
        raise ConfigError(f"activation_quantization 'int8' is not supported by the kernels {', '.join(missing)}.")
