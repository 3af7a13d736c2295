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
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.quantization import FORMATS, Format, QuantizationPolicy
from jamba_server.engine.start.step_size import Rates, StepSize, choose_step_size, format_shares, measure_rates
from jamba_server.engine.weight_sizes import weight_bytes, weight_matrices
from jamba_server.kernels.activations import with_int8_activations
from jamba_server.kernels.int8_activations import ALL_KINDS
from jamba_server.kernels.table import select

RATES = Rates(operations=0.4e12, bandwidth=30e9)
PLAIN = select("cpu", {})


def configuration(shape: str) -> JambaConfig:
    with TemporaryDirectory() as folder:
        write_config(shape, Path(folder))
        return load_model_config(Path(folder))


def choose(shape: str, rates: Rates = RATES, **settings: Any) -> StepSize | None:
    model = configuration(shape)
    config = EngineConfig(model="x", **settings)
    return choose_step_size(config, model, QuantizationPolicy(None), torch.bfloat16, lambda: rates)


def test_a_large_model_gets_steps_of_four_decode_steps() -> None:
    """6 GB of weights take 0.2 s at 30 GB/s, and 3 billion parameters take 15 ms a token at 0.4 TFLOP/s. So 0.6 s of
    0.8 s are left for 41 tokens."""
    step = choose("3b")
    assert step is not None and step.mixed == 32
    assert "ms (limit 8" in step.reason and "0.40 TFLOP/s and 30 GB/s" in step.reason
    faster = choose("3b", Rates(operations=2e12, bandwidth=30e9))
    assert faster is not None and faster.mixed == 224
    slower = choose("3b", Rates(operations=2e12, bandwidth=30e9, others=2e-3))
    assert slower is not None and slower.mixed == 128


def test_a_step_reads_all_experts() -> None:
    """A decode step of one sequence reads two of 16 experts in every second layer; a step of 32 tokens reads all."""
    few = Rates(operations=2e12, bandwidth=1e9)
    step = choose("moe", few)
    assert step is not None
    reading = float(step.reason.split("limit ")[1].split(")")[0]) / 4000
    assert reading == pytest.approx(weight_bytes(configuration("moe"), 2) / 1e9, rel=0.1)


def test_a_longer_step_has_more_tokens() -> None:
    short, long = choose("moe", max_step_ms=100), choose("moe", max_step_ms=2000)
    assert short is not None and long is not None and short.mixed < long.mixed


def test_a_step_without_replies_has_more_tokens() -> None:
    """24 ms are the limit for replies, and four times as much is the limit for prompts alone. Where four decode steps
    take longer than that, they are the limit of both."""
    small, large = choose("small"), choose("3b", Rates(operations=2e12, bandwidth=30e9))
    assert small is not None and large is not None
    assert 3.5 * small.mixed <= small.alone <= 6 * small.mixed
    assert (large.mixed, large.alone) == (224, 224)


def test_the_tokens_beside_replies_can_be_given() -> None:
    step = choose("3b", max_num_mixed_tokens=20)
    assert step is not None and (step.mixed, step.alone) == (20, 32)
    large = choose("3b", max_num_mixed_tokens=2000)
    assert large is not None and (large.mixed, large.alone) == (2000, 2000)
    with pytest.raises(ConfigError, match="max_step_ms is 100 and max_num_mixed_tokens is 7; they exclude each other"):
        choose("3b", max_num_mixed_tokens=7, max_step_ms=100)


def test_a_tiny_model_keeps_the_default_without_a_measurement() -> None:
    assert choose("tiny", Rates(0.0, 0.0)) is None


def test_the_number_of_tokens_can_be_given_instead() -> None:
    assert choose("3b", Rates(0.0, 0.0), max_num_batched_tokens=7) is None
    with pytest.raises(
        ConfigError, match="max_step_ms is 100 and max_num_batched_tokens is 7; they exclude each other"
    ):
        choose("3b", max_num_batched_tokens=7, max_step_ms=100)


def test_the_shares_of_the_formats_are_those_of_the_operations() -> None:
    """With int8, the matrices of the Mamba layers stay in the model's dtype. In the 3B shape, a Mamba layer has the
    matrices in_proj [4 h, h] and out_proj [h, 2 h], attention q and o [h, h], k and v [128, h], and an MLP three
    [f, h]."""
    h, f, mamba, attention = 2560, 8192, 26, 2
    plain, total = 6 * h * mamba, (6 * h * mamba) + (2 * h + 2 * 128) * attention + 3 * f * 28
    shares = format_shares(configuration("3b"), QuantizationPolicy("int8"))
    assert shares == pytest.approx({None: plain / total, FORMATS["int8"]: 1 - plain / total})
    assert format_shares(configuration("3b"), QuantizationPolicy("int8", mamba=True)) == {FORMATS["int8"]: 1.0}


def test_a_format_with_a_small_share_is_left_out() -> None:
    model = configuration("moe")
    most, rare = Format(bits=4, limit=7, group_size=32, scale="float16"), FORMATS["int4"]
    blocks = {name: rare if ".k_proj" in name else most for name, _, _, _ in weight_matrices(model)}
    assert format_shares(model, QuantizationPolicy(blocks=blocks)) == {most: 1.0}


@pytest.mark.parametrize(
    "form",
    [
        None,
        *FORMATS.values(),
        Format(bits=8, limit=127, group_size=16, scale="two_levels"),
        Format(bits=4, limit=15, group_size=32, scale="two_levels", is_unsigned=True, has_offset=True),
        Format(bits=4, limit=15, group_size=64, is_unsigned=True, has_zero=True),
        Format(bits=4, limit=1, group_size=32, scale="float16", table=tuple(map(float, range(-8, 8)))),
    ],
)
def test_products_with_every_format_are_measured(form: Format | None) -> None:
    for kernels in (PLAIN, with_int8_activations(PLAIN, ALL_KINDS)):
        rates = measure_rates(kernels, torch.bfloat16, {form: 1.0}, configuration("tiny"), 1)
        assert rates.operations > 1e6 and rates.bandwidth > 1e6 and rates.others > 1e-9
