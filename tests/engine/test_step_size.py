"""How many prompt tokens a step computes on a CPU, from given rates of the machine."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from benchmarks.shapes import write_config
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.start.step_size import Rates, StepSize, choose_step_size, measure_rates
from jamba_server.kernels.table import select

RATES = Rates(operations=0.4e12, bandwidth=30e9)


def choose(shape: str, rates: Rates = RATES, **settings: Any) -> StepSize | None:
    with TemporaryDirectory() as folder:
        write_config(shape, Path(folder))
        model = load_model_config(Path(folder))
    config = EngineConfig(model="x", **settings)
    return choose_step_size(config, model, QuantizationPolicy(None), torch.bfloat16, lambda: rates)


def test_a_large_model_gets_steps_of_twice_a_decode_step() -> None:
    """6 GB of weights take 0.2 s at 30 GB/s; 3 billion parameters take 30 ms a token at half of 0.4 TFLOP/s, so even
    the smallest step takes longer."""
    step = choose("3b")
    assert step is not None and step.tokens == 32
    assert "a step may take 4" in step.reason and "0.40 TFLOP/s and 30 GB/s" in step.reason
    faster = choose("3b", Rates(operations=4e12, bandwidth=30e9))
    assert faster is not None and faster.tokens == 128


def test_a_longer_step_has_more_tokens() -> None:
    short, long = choose("moe", max_step_ms=100), choose("moe", max_step_ms=2000)
    assert short is not None and long is not None and short.tokens < long.tokens


def test_a_tiny_model_keeps_the_default_without_a_measurement() -> None:
    assert choose("tiny", Rates(0.0, 0.0)) is None


def test_the_number_of_tokens_can_be_given_instead() -> None:
    assert choose("3b", Rates(0.0, 0.0), max_num_batched_tokens=7) is None
    with pytest.raises(ConfigError, match="exclude each other"):
        choose("3b", max_num_batched_tokens=7, max_step_ms=100)


def test_the_machine_has_rates() -> None:
    rates = measure_rates(select("cpu", {}), torch.bfloat16)
    assert rates.operations > 1e6 and rates.bandwidth > 1e6
