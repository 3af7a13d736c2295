"""Chooses how many prompt tokens a step computes on a CPU, from the time that a step may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple

import torch

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.start.memory_plan import DEFAULT_BATCHED_TOKENS
from jamba_server.engine.weight_sizes import step_bytes
from jamba_server.kernels.cpu.library import library, read_bandwidth
from jamba_server.kernels.ops import Kernels, KernelUnavailable

DEFAULT_STEP_MS: Final = 40
"""A step of this time keeps the first token of a short request within three times its time without other load, plus one
step, beside prompts of 30,000 tokens. With 150 ms a long prompt is 7 % faster, and short requests wait three times as
long (benchmarks/results/latency.md)."""
SMALLEST, LARGEST = 32, 512
"""The range of the numbers of prompt tokens that are chosen, and the distance between them. Steps of fewer tokens would
read the weights too often: with the 3B shape, a prompt takes a tenth longer in steps of 32 tokens than in steps of 128,
and a third longer in steps of 16. Steps of more tokens would hardly be faster per token."""
MEASURING_SECONDS: Final = 0.025
"""The time for each of the two measurements."""
_SLOWEST: Final = 2e10
"""The rate of matrix products, in operations per second, that every machine is assumed to reach. A model whose steps
are short enough at this rate is not measured."""
_SHARE: Final = 0.5
"""The share of the rate of matrix products that a whole step reaches. Measured shares are from 0.45 to 0.8."""
_ROWS, _INPUTS, _OUTPUTS = 64, 1024, 1024
_BANDWIDTH_BYTES: Final = 64 << 20


class Rates(NamedTuple):
    """The measured rates of the machine: operations of matrix products per second, and bytes read per second."""

    operations: float
    bandwidth: float


class StepSize(NamedTuple):
    """The largest number of prompt tokens in a step, and a sentence that gives the reason for this number."""

    tokens: int
    reason: str


def choose_step_size(
    config: EngineConfig,
    model: JambaConfig,
    policy: QuantizationPolicy,
    dtype: torch.dtype,
    measure: Callable[[], Rates],
) -> StepSize | None:
    """Returns the number of prompt tokens in a step on a CPU, or None if the options or the default decide.

    A step of this number of tokens takes at most the larger of `max_step_ms` and twice the time in which a decode step
    reads the weights. Where `SMALLEST` tokens take longer, the number is `SMALLEST`.
    """
    if config.max_num_batched_tokens is not None:
        if config.max_step_ms is not None:
            raise ConfigError("max_step_ms and max_num_batched_tokens exclude each other: both limit a step.")
        return None
    target = (DEFAULT_STEP_MS if config.max_step_ms is None else config.max_step_ms) / 1000
    operations = 2 * active_parameters(model)
    if config.max_step_ms is None and operations * DEFAULT_BATCHED_TOKENS["cpu"] < target * _SLOWEST * _SHARE:
        return None
    rates = measure()
    decode = step_bytes(model, dtype.itemsize, policy=policy) / rates.bandwidth
    limit = max(target, 2 * decode)
    fitting = limit * rates.operations * _SHARE / operations
    tokens = max(SMALLEST, min(LARGEST, int(fitting) // SMALLEST * SMALLEST))
    return StepSize(
        tokens,
        f"{tokens} prompt tokens take about {1000 * tokens * operations / (rates.operations * _SHARE):.0f} ms, and a "
        f"step may take {1000 * limit:.0f} ms, at {rates.operations / 1e12:.2f} TFLOP/s and "
        f"{rates.bandwidth / 1e9:.0f} GB/s measured at the start",
    )


def active_parameters(model: JambaConfig) -> float:
    """Returns the number of parameters with which one prompt token is multiplied."""
    return step_bytes(model, 4) / 4 - model.vocab_size * model.hidden_size


def measure_rates(kernels: Kernels, dtype: torch.dtype) -> Rates:
    """Measures the rates of this machine for about 50 ms, with the kernel for matrix products that was chosen."""
    x = torch.ones(_ROWS, _INPUTS, dtype=dtype)
    weight = kernels.linear.pack(torch.ones(_OUTPUTS, _INPUTS, dtype=dtype))
    seconds = _shortest(lambda: kernels.linear(x, weight))
    memory = torch.zeros(_BANDWIDTH_BYTES, dtype=torch.uint8)
    try:
        native = library()
    except KernelUnavailable:
        reading = _BANDWIDTH_BYTES / _shortest(lambda: memory.view(torch.int64).sum())
    else:
        reading = read_bandwidth(native, memory, MEASURING_SECONDS)
    return Rates(2 * _ROWS * _INPUTS * _OUTPUTS / seconds, reading)


def _shortest(run: Callable[[], object]) -> float:
    """Returns the shortest time in seconds of the calls of `run` within `MEASURING_SECONDS`, and at least of three."""
    run()
    taken = list[float]()
    end = time.perf_counter() + MEASURING_SECONDS
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)
