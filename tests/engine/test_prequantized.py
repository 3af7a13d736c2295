"""Folders that other tools have quantised: the engine's log-probabilities equal those of transformers on the same
numbers in float32. The folders are written by `tests/quantized_folders.py` from the documented layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.start.contents import read_model
from jamba_server.engine.types import SamplingParams
from jamba_server.llm import LLM
from tests import quantized_folders as written
from tests.quantized_folders import Array, Written
from tests.tiny import oracle_logits, save_tiny

PROMPT = list(range(3, 40))
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "mamba_dt_rank": 8,
}
DENSE = SHAPE | {"num_experts": 1, "num_experts_per_tok": 1, "tie_word_embeddings": True}


def scheme(pack: bool, bits: int, size: int | None, symmetric: bool, **more: Any) -> dict[str, Any]:
    weights = {
        "num_bits": bits,
        "type": "int",
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "symmetric": symmetric,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if pack else "int-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights} | more},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
BNB = {"quant_method": "bitsandbytes"}
ACTIVATIONS = {"input_activations": {"num_bits": 8, "dynamic": True}}
CASES: dict[str, tuple[dict[str, Any], Callable[[Array], Written]]] = {
    "gptq": (GPTQ, lambda w: written.gptq(w, bits=4, size=32)),
    "gptq rows": (GPTQ | {"group_size": -1}, lambda w: written.gptq(w, bits=4, size=None)),
    "gptq_v2, 8 bits": (
        GPTQ | {"bits": 8, "checkpoint_format": "gptq_v2"},
        lambda w: written.gptq(w, bits=8, size=32, v2=True),
    ),
    "gptq desc_act": (
        GPTQ | {"desc_act": True},
        lambda w: written.gptq(w, bits=4, size=32, order=np.random.default_rng(0).permutation(w.shape[1]) // 32),
    ),
    "awq": (AWQ, lambda w: written.awq(w, size=32)),
    "packed int4": (
        scheme(True, 4, 32, True),
        lambda w: written.compressed(w, bits=4, size=32, symmetric=True, pack=True),
    ),
    "packed int4 with zeros": (
        scheme(True, 4, 32, False),
        lambda w: written.compressed(w, bits=4, size=32, symmetric=False, pack=True),
    ),
    "packed int8 rows": (
        scheme(True, 8, None, True),
        lambda w: written.compressed(w, bits=8, size=None, symmetric=True, pack=True),
    ),
    "int8": (
        scheme(False, 8, None, True, **ACTIVATIONS),
        lambda w: written.compressed(w, bits=8, size=None, symmetric=True, pack=False),
    ),
    "int8 with zeros": (
        scheme(False, 8, None, False),
        lambda w: written.compressed(w, bits=8, size=None, symmetric=False, pack=False),
    ),
    "rows of 8 bits": (BNB | {"load_in_8bit": True}, written.rows8),
    "nf4": (BNB | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, written.nf4),
    "nf4 nested": (
        BNB | {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        lambda w: written.nf4(w, nested=True),
    ),
    "nf4 across rows": (BNB | {"load_in_4bit": True}, lambda w: written.nf4(w, block=128)),
}


def is_quantized(module: str, weight: Array) -> bool:
    """Only some modules are quantised, and in one layer only some of a kind."""
    kept = ("embed_tokens", "lm_head", "dt_proj", "router", "x_proj", "layers.1.self_attn.k_proj", "norm")
    return not any(name in module for name in kept)


def write(name: str, folder: Path, shape: dict[str, Any]) -> Path:
    save_tiny(folder, **shape)
    settings, writer = CASES[name]
    return written.rewrite(
        folder, folder / "quantised", settings, lambda module, w: writer(w) if is_quantized(module, w) else None
    )


def largest_difference(folder: Path, **options: Any) -> float:
    """Of all log-probabilities of a prompt's tokens, from those of transformers on the same numbers in float32."""
    model = transformers.JambaForCausalLM.from_pretrained(folder / "plain").eval()
    expected = oracle_logits(model, PROMPT).log_softmax(-1)
    llm = LLM(folder, **{"dtype": "float32", "max_num_seqs": 2, "threads": 1} | options)
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, prompt_logprobs=0)
    entries = llm.generate([PROMPT], params)[0].prompt_logprobs
    pairs = [(entry.logprob, expected[i - 1, PROMPT[i]].item()) for i, entry in enumerate(entries) if entry is not None]
    assert len(pairs) == len(PROMPT) - 1
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("shape", [SHAPE, DENSE], ids=["experts", "dense"])
@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_the_files(name: str, shape: dict[str, Any], tmp_path: Path) -> None:
    folder = write(name, tmp_path, shape)
    config = load_model_config(folder)
    assert "model.layers.0.mamba.in_proj.weight" in config.stored
    assert "model.layers.1.self_attn.k_proj.weight" not in config.stored
    assert largest_difference(folder) < 1e-3
    assert len(read_model(folder).warnings) == ("8bit" in str(CASES[name]) or name == "int8")
