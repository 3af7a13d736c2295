"""Tiny checkpoints that the quantising packages themselves have written, with `python -m tools.quantized_fixtures`.

The expected log-probabilities are those of transformers in float32, with the numbers to which each package dequantises
its own weights. `tests/data/README.md` says which versions wrote the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.types import SamplingParams
from jamba_server.engine.weight_sizes import kept_formats
from jamba_server.llm import LLM
from jamba_server.server.cli.doctor import describe_checkpoint

FOLDERS = sorted(path for path in (Path(__file__).parents[1] / "data" / "prequantized").iterdir() if path.is_dir())
# What `jamba doctor` says of the quantised matrices.
TYPES = {
    "autoawq": "AWQ of 4 bits",
    "bitsandbytes-int8": "int8 of bitsandbytes",
    "bitsandbytes-nf4": "NF4 of bitsandbytes",
    "gptqmodel": "GPTQ of 4 bits",
    "gptqmodel-desc-act": "GPTQ of 4 bits with desc_act",
    "llmcompressor-w4a16": "int4 of compressed-tensors",
    "llmcompressor-w8a8": "int8 of compressed-tensors",
    "mlx-4": "MLX of 4 bits",
    "mlx-8": "MLX of 8 bits",
}
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)


def expected_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "expected.json").read_text())


def test_each_type_has_a_folder() -> None:
    assert {folder.name for folder in FOLDERS} == set(TYPES)


@each_folder
def test_log_probabilities_are_those_of_the_package_and_transformers(folder: Path) -> None:
    expected = expected_of(folder)
    assert set(load_model_config(folder).stored) == set(expected["quantized"])
    llm = LLM(folder, dtype="float32", max_num_seqs=2, threads=1)
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, prompt_logprobs=0)
    entries = llm.generate([expected["prompt"]], params)[0].prompt_logprobs
    found = [entry.logprob for entry in entries if entry is not None]
    assert len(found) == len(expected["logprobs"]) == len(expected["prompt"]) - 1
    difference = max(abs(a - b) for a, b in zip(found, expected["logprobs"], strict=True))
    print(f"{folder.name}: the largest difference is {difference:.1e}")
    assert difference < 1e-3
    assert max(found) - min(found) > 1, "equal log-probabilities would say little"


@each_folder
def test_the_doctor_says_what_it_is(folder: Path) -> None:
    config, facts = load_model_config(folder), dict(describe_checkpoint(str(folder)))
    assert facts["checkpoint"] == f"{folder}, a folder in Hugging Face format"
    assert TYPES[folder.name] in facts["quantised"]
    assert facts["converting"].startswith(f"rounds {len(config.stored)} quantised matrices twice, first to ")
    if kept_formats(config):
        assert TYPES[folder.name] in facts["as stored"]
    else:
        assert "are converted to" in facts["note"]
