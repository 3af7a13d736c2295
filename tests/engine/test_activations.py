"""Which products use 8-bit activations, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jamba_server.engine.config import ActivationQuantization, EngineConfig, Quantization
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.quantization import Format, QuantizationPolicy
from jamba_server.engine.start import activations
from jamba_server.engine.start.activations import int8_activations
from jamba_server.kernels.cpu.library import Library, library
from jamba_server.kernels.int8_activations import ALL_KINDS, Kind
from jamba_server.llm import LLM
from tests.engine.test_exact import CONFIG, SUBJECT

CPU_KERNELS = {"linear": "cpu", "run_experts": "cpu"}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def choose(
    wanted: ActivationQuantization | None,
    policy: QuantizationPolicy,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device = CPU,
    **names: str,
) -> frozenset[Kind]:
    config = EngineConfig(model="m", activation_quantization=wanted)
    return int8_activations(config, policy, dtype, device, CPU_KERNELS | names)


@pytest.mark.parametrize(
    ("policy", "bits"),
    [
        (QuantizationPolicy("int4"), 4),
        (QuantizationPolicy("int4-g32"), 4),
        (QuantizationPolicy("int8"), 8),
        (QuantizationPolicy(blocks={"a": Format(bits=8, limit=31, group_size=16)}), 8),
    ],
)
def test_the_option_decides(policy: QuantizationPolicy, bits: int) -> None:
    kinds = {Kind(bits, is_fine=False), Kind(bits, is_fine=True)}
    assert choose("int8", policy) == kinds
    assert choose("int8", policy, linear="reference", run_experts="reference") == kinds
    assert not choose("none", policy)


def test_blocks_without_whole_numbers_are_no_reason_for_8_bits() -> None:
    nf4 = Format(bits=4, limit=1, group_size=64, table=(0.5,) * 16)
    assert choose(None, QuantizationPolicy(blocks={"a": nf4})) == set()
    with pytest.raises(ConfigError, match="needs weights that are whole numbers"):
        choose("int8", QuantizationPolicy(blocks={"a": nf4}))


@pytest.mark.parametrize(
    ("level", "units"),
    [
        ("portable", "portable"),
        ("avx2", "avx2"),
        ("avx512", "avx2"),
        ("avx512", "avx512_vnni"),
        ("avx512_bf16", "avx512_vnni"),
        ("amx", "avx512_vnni"),
    ],
)
def test_the_default_follows_from_the_level_and_the_weights(
    level: str, units: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Library, "level", lambda self: level)  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
    monkeypatch.setattr(activations, "units_of", lambda level: units)
    is_default = (level, units) in {("avx2", "avx2"), ("avx512", "avx512_vnni"), ("avx512_bf16", "avx512_vnni")}
    takes_rows = level == "avx512" and is_default  # weights of 8 bits with a scale for a row or for many inputs
    assert choose(None, QuantizationPolicy("int4")) == ({Kind(4, is_fine=False)} if is_default else set())
    assert choose(None, QuantizationPolicy("int4-g32")) == ({Kind(4, is_fine=True)} if is_default else set())
    for size in (16, 32, 64):
        blocks, is_fine = QuantizationPolicy(blocks={"a": Format(bits=8, limit=127, group_size=size)}), size <= 32
        is_taken = takes_rows or (is_default and is_fine)
        assert choose(None, blocks) == ({Kind(8, is_fine=is_fine)} if is_taken else set())
    assert choose(None, QuantizationPolicy("int8")) == ({Kind(8, is_fine=False)} if takes_rows else set())
    assert choose(None, QuantizationPolicy("fp8")) == set()
    assert choose(None, QuantizationPolicy()) == set()


def test_the_default_is_none_without_code_for_it_and_for_exact_dtypes() -> None:
    four = QuantizationPolicy("int4")
    assert not choose(None, four, dtype=torch.float32)
    assert not choose(None, four, device=GPU)
    assert not choose(None, four, linear="reference", run_experts="reference")
    assert not choose(None, four, run_experts="other")


@pytest.mark.parametrize(
    ("quantization", "dtype", "device", "kernel", "message"),
    [
        ("int4", torch.bfloat16, GPU, "cpu", "'int8' is for CPUs; the model runs on cuda"),
        ("int4", torch.float32, CPU, "cpu", "'int8' and dtype 'float32' exclude each other"),
        (None, torch.bfloat16, CPU, "cpu", "this model's weights are plain. Add --quantization int4 or int8"),
        ("fp8", torch.bfloat16, CPU, "cpu", "this model's weights are fp8"),
        ("int4", torch.bfloat16, CPU, "triton", "not supported by the kernels linear=triton, run_experts=triton"),
    ],
)
def test_int8_is_refused_where_it_cannot_be(
    quantization: Quantization | None, dtype: torch.dtype, device: torch.device, kernel: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        choose("int8", QuantizationPolicy(quantization), dtype=dtype, device=device, linear=kernel, run_experts=kernel)


def test_the_engine_says_which_activations_it_uses(tmp_path: Path) -> None:
    library()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    scores: list[list[float]] = []
    for kind in ("none", "int8"):
        settings = {"quantization": "int4-g32", "activation_quantization": kind, "load_format": "dummy"}
        llm = LLM(tmp_path, dtype="bfloat16", max_model_len=512, threads=1, **settings)
        assert llm.core.info.activation_quantization == kind
        [reply] = llm.generate([SUBJECT], max_tokens=4, temperature=0.0, logprobs=1)
        scores.append([entry.logprob for entry in reply.logprobs])
    assert scores[0] != scores[1]


def test_default_and_explicit_int8_differ_where_a_file_has_coarse_groups() -> None:
    """So the fingerprint of saved states, which has these kinds, differs too."""
    mixed = {"a": Format(bits=4, limit=8, group_size=32), "b": Format(bits=8, limit=127, group_size=64)}
    policy = QuantizationPolicy(blocks=mixed)
    explicit = choose("int8", policy)
    assert explicit == ALL_KINDS
    by_default = activations.INT8_BY_DEFAULT
    assert not any(Kind(8, is_fine=False) in by_default[level] for level in by_default if level[0] != "avx512")
