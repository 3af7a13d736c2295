"""Chooses how many prompt tokens a step computes on a CPU, from the time that a step may take."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import msgspec
import torch

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.quantization import FORMATS, Format, QuantizationPolicy
from jamba_server.engine.quantization.stored import empty
from jamba_server.engine.start.memory_plan import DEFAULT_BATCHED_TOKENS
from jamba_server.engine.weight_sizes import step_bytes, weight_matrices
from jamba_server.kernels.cpu.library import library, read_bandwidth
from jamba_server.kernels.cpu.linear import Packer
from jamba_server.kernels.ops import (
    Kernels,
    KernelUnavailable,
    QuantizedWeight,
    ScanInputs,
    ScanWeights,
    Segments,
    StateSaves,
)

DEFAULT_STEP_MS: Final = 24
"""The default of `max_step_ms`: the time of a step whose prompt has few computed tokens before it. After 30,000
tokens, attention makes a step several times as long. With 24 ms the first token of a short request comes within three
times its time without other load, plus one step, beside prompts of 30,000 tokens (benchmarks/results/latency-amx.md).
With 40 ms it comes 1.6 times as late, and a long prompt is a tenth faster."""
SMALLEST, LARGEST = 32, 512
"""The smallest and the largest number of prompt tokens that is chosen. Each choice is a multiple of `SMALLEST`. Steps
of fewer tokens would read the weights too often: with the 3B shape, a prompt takes a tenth longer in steps of 32 tokens
than in steps of 128, and a third longer in steps of 16. Steps of more tokens would hardly be faster per token."""
DECODE_STEPS: Final = 4
"""A step may take as long as this number of decode steps, because a step of a large model cannot be shorter than the
time in which it reads the weights. With the 3B shape on a processor with AMX, a limit of two decode steps gives steps
of 32 prompt tokens, with which prefill reaches half of its highest speed. A limit of four gives steps of 128 tokens,
with which it reaches nine tenths."""
FACTOR_WITHOUT_REPLIES: Final = 4
"""A step without replies may take this many times as long as `max_step_ms`, because no reply waits for it. Only a
request that arrives during the step waits for its end. With the shape `small` on a processor with AVX2, prefill is 1.1
to 1.2 times as fast in steps of 128 tokens as in steps of 32 tokens. A model that needs longer for four decode steps
would gain 4 %."""
MEASURING_SECONDS: Final = 0.025
"""The time for which the products are measured, and then again the bandwidth."""
_SLOWEST: Final = 2e10
"""The rate of matrix products, in operations per second, that every machine is assumed to reach. A model whose steps
are short enough at this rate is not measured."""
_SHARE: Final = 0.5
"""The share of a step's time that products take on such a machine."""
_OTHERS: Final = 4
"""All that a step computes beside the products takes about this many times as long as its selective scans. The factor
was measured with the shapes `small`, `moe` and `3b` on a processor with AMX, where that part is largest."""
_LEAST: Final = 0.1
"""The least share of a model's operations for which products with the weights of a format are measured."""
_ROWS, _INPUTS, _OUTPUTS, _SCAN_ROWS = 128, 1024, 1024, 32
_LEAST_BYTES, _MOST_BYTES = 1 << 26, 1 << 28
"""The bandwidth is that of reading as much memory as the weights have, within these bounds: caches may hold a part of
it, as they may hold a part of the weights."""


class Rates(NamedTuple):
    """The measured rates of the machine: operations of matrix products per second, bytes read per second, and the
    seconds for a prompt token in which a step computes something else than products."""

    operations: float
    bandwidth: float
    others: float = 0.0


class StepSize(NamedTuple):
    """The largest number of prompt tokens in a step with replies, and in a step without replies, and a sentence that
    gives the reason for these numbers."""

    mixed: int
    alone: int
    reason: str

    def applied_to(self, config: EngineConfig) -> EngineConfig:
        """Returns the options with these two numbers instead of `max_step_ms`."""
        tokens = {"max_num_batched_tokens": self.alone, "max_num_mixed_tokens": self.mixed}
        return msgspec.structs.replace(config, **tokens, max_step_ms=None)


def choose_step_size(
    config: EngineConfig,
    model: JambaConfig,
    policy: QuantizationPolicy,
    dtype: torch.dtype,
    measure: Callable[[], Rates],
) -> StepSize | None:
    """Returns the numbers of prompt tokens in a step on a CPU, or None if the options or the default decide.

    The numbers are chosen so that a step with replies takes about `max_step_ms`, or the time of `DECODE_STEPS` decode
    steps if that is longer. If even `SMALLEST` tokens take longer, the number is `SMALLEST`.
    """
    for name in ("max_num_batched_tokens", "max_num_mixed_tokens"):
        if config.max_step_ms is not None and (tokens := getattr(config, name)) is not None:
            raise ConfigError(
                f"max_step_ms is {config.max_step_ms} and {name} is {tokens}; they exclude each other, because both "
                "limit a step."
            )
    if config.max_num_batched_tokens is not None:
        return None
    target = (DEFAULT_STEP_MS if config.max_step_ms is None else config.max_step_ms) / 1000
    operations = 2 * active_parameters(model)
    if config.max_step_ms is None and operations * DEFAULT_BATCHED_TOKENS["cpu"] < target * _SLOWEST * _SHARE:
        return None
    rates = measure()
    # The smallest step already reads nearly all experts, as a decode step of as many sequences does.
    reading = step_bytes(model, dtype.itemsize, num_sequences=SMALLEST, policy=policy) / rates.bandwidth
    limit, longer = max(target, DECODE_STEPS * reading), max(FACTOR_WITHOUT_REPLIES * target, DECODE_STEPS * reading)
    of_token = operations / rates.operations + rates.others

    def fitting(seconds: float) -> int:
        return max(SMALLEST, min(LARGEST, round((seconds - reading) / of_token / SMALLEST) * SMALLEST))

    mixed, alone = config.max_num_mixed_tokens or fitting(limit), fitting(longer)
    ms = [1000 * (reading + tokens * of_token) for tokens in (mixed, max(mixed, alone))]
    return StepSize(
        mixed,
        max(mixed, alone),
        f"{mixed} prompt tokens beside replies take about {ms[0]:.0f} ms (limit {1000 * limit:.0f}), "
        f"{max(mixed, alone)} without replies take {ms[1]:.0f} ms (limit {1000 * longer:.0f}), at "
        f"{rates.operations / 1e12:.2f} TFLOP/s and {rates.bandwidth / 1e9:.0f} GB/s measured at the start",
    )


def active_parameters(model: JambaConfig) -> float:
    """Returns the number of parameters with which one prompt token is multiplied."""
    return step_bytes(model, 4) / 4 - model.vocab_size * model.hidden_size


def format_shares(model: JambaConfig, policy: QuantizationPolicy) -> Mapping[Format | None, float]:
    """Returns the formats of the weights with which a prompt token is multiplied, each with its share of the
    operations. None stands for weights in the model's dtype. Formats with a small share are left out, and the shares
    of the others add up to 1."""
    operations = Counter[Format | None]()
    for name, role, rows, inputs in weight_matrices(model):
        if role in ("head", "other"):
            continue  # Only the last token of a prompt is multiplied by the head, and the other matrices are small.
        quantization = policy.quantization_of(role)
        form = policy.blocks.get(name) or (None if quantization is None else FORMATS[quantization])
        chosen = model.num_experts_per_tok / model.num_experts if role == "experts" else 1.0
        operations[form] += rows * inputs * chosen
    total = operations.total()
    large = {form: count for form, count in operations.items() if count >= _LEAST * total}
    return {form: count / sum(large.values()) for form, count in large.items()}


def measure_rates(
    kernels: Kernels, dtype: torch.dtype, shares: Mapping[Format | None, float], model: JambaConfig, weight_bytes: int
) -> Rates:
    """Measures the rates of this machine with the kernels that were chosen. The measurement takes about 50 ms. For a
    large model it takes about 0.2 s, because the memory to read must be allocated and filled. `shares` has the formats
    of the weights, as `format_shares` returns them."""
    x = torch.ones(_ROWS, _INPUTS, dtype=dtype)
    seconds = 0.0
    for form, share in shares.items():
        weight = kernels.linear.pack(_zeros(form, dtype))
        seconds += share * _shortest(lambda weight=weight: kernels.linear(x, weight), MEASURING_SECONDS / len(shares))
    size = min(max(weight_bytes, _LEAST_BYTES), _MOST_BYTES) >> 20 << 20
    try:
        reading = read_bandwidth(library(), Packer().memory(size).zero_(), MEASURING_SECONDS)
    except KernelUnavailable:
        memory = torch.zeros(size // 8, dtype=torch.int64)
        reading = size / _shortest(memory.sum, MEASURING_SECONDS)
    return Rates(2 * _ROWS * _INPUTS * _OUTPUTS / seconds, reading, _OTHERS * _scan_seconds(kernels, dtype, model))


def _scan_seconds(kernels: Kernels, dtype: torch.dtype, model: JambaConfig) -> float:
    """Measures the seconds that the selective scans of all layers take for a prompt token."""
    channels, states = model.d_inner, model.mamba_d_state
    rows, group = torch.zeros(_SCAN_ROWS, channels, dtype=dtype), torch.zeros(_SCAN_ROWS, states, dtype=dtype)
    inputs = ScanInputs(rows, rows, group, group, rows)
    weights = ScanWeights(-torch.ones(channels, states), torch.ones(channels), torch.zeros(channels))
    state, none = torch.zeros(1, channels, states), torch.empty(0, dtype=torch.int32)
    saves = StateSaves(torch.zeros(2, dtype=torch.int32), none, none)
    starts, slot = torch.tensor([0, _SCAN_ROWS], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    segments = Segments(starts, _SCAN_ROWS, slot, torch.tensor([False]), saves)
    seconds = _shortest(lambda: kernels.selective_scan(inputs, weights, state, segments), MEASURING_SECONDS / 5)
    return seconds / _SCAN_ROWS * len(model.mamba_layers)


def _zeros(form: Format | None, dtype: torch.dtype) -> torch.Tensor | QuantizedWeight:
    """Returns a weight [_OUTPUTS, _INPUTS] of zeros in a format, or in the dtype `dtype`."""
    shape = (_OUTPUTS, _INPUTS)
    if form is None:
        return torch.zeros(shape, dtype=dtype)
    weight = empty(form, shape, torch.device("cpu")).each(torch.zero_)
    return weight._replace(values=weight.values.view(torch.float8_e4m3fn)) if form == FORMATS["fp8"] else weight


def _shortest(run: Callable[[], object], within: float) -> float:
    """Returns the shortest time in seconds of the calls of `run` within `within` seconds, and at least of three."""
    run()
    taken = list[float]()
    end = time.perf_counter() + within
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)
