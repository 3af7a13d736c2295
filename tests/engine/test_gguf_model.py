"""A model in a GGUF file computes what the same numbers compute from a Hugging Face folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.numpy import load_file, save_file

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.start.contents import read_model
from jamba_server.engine.types import SamplingParams
from jamba_server.llm import LLM, Completion
from tests.gguf_file import write_gguf
from tests.tiny import TINY_CONFIGS, oracle_logits, save_tiny

PROMPTS = [[5], [7, 9, 11, 30, 12], list(range(3, 40))]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=0)
# Rows of whole blocks of 256 numbers.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "mamba_dt_rank": 32,
}


def load(path: Path, **settings: Any) -> LLM:
    return LLM(path, **{"dtype": "float32", "max_num_seqs": 4, "threads": 1} | settings)


def logprobs(completion: Completion) -> list[float]:
    entries = [*completion.prompt_logprobs, *completion.logprobs]
    return [entry.logprob for entry in entries if entry is not None]


def largest_difference(path: Path, folder: Path, **settings: Any) -> float:
    """Returns the largest difference of log-probabilities in two results, whose tokens must be equal."""
    ours, theirs = (load(model, **settings).generate(PROMPTS, GREEDY) for model in (path, folder))
    assert [reply.token_ids for reply in ours] == [reply.token_ids for reply in theirs]
    pairs = [(logprobs(a), logprobs(b)) for a, b in zip(ours, theirs, strict=True)]
    return max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))


# GGUF files have no biases of projections; a head size of its own has a test below.
SHAPES = [name for name in TINY_CONFIGS if name not in ("conv3-state8-all-biases", "conv2-dt-rank-auto")]


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_model(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, **TINY_CONFIGS[name])
    path = write_gguf(tmp_path / "model.gguf", tmp_path)
    assert largest_difference(path, tmp_path) < 1e-4
    ours, theirs = load_model_config(path), load_model_config(tmp_path)
    assert ours.attention_layers == theirs.attention_layers
    assert (ours.dtype, ours.tie_word_embeddings) == ("float32", theirs.tie_word_embeddings)
    assert ours.rms_norm_eps == theirs.rms_norm_eps


def kind_in(kinds: str) -> Callable[[str], str]:
    """Types by the name of a tensor: the value projection and the down projections have the second type, and the up
    projections of experts the third."""
    first, *others = kinds.split("+")
    second, third = (*others, first, first)[:2]

    def kind_of(name: str) -> str:
        part = name.split(".")[-2]
        if part == "ssm_dt":  # its rows have 32 numbers
            return "F16" if first in ("F16", "BF16") else "Q5_0"
        return second if part in ("attn_v", "ffn_down", "ffn_down_exps") else third if part == "ffn_up_exps" else first

    return kind_of


@pytest.mark.parametrize(
    "kinds",
    [
        "F16",
        "BF16",
        "Q8_0",
        "Q4_0",
        "Q5_1+Q4_1",
        "Q5_0+Q6_K",
        "Q4_K+Q6_K",
        "Q4_0+Q4_K+Q6_K",
        "Q3_K+Q5_K",
        "Q2_K",
        "Q4_0+Q6_K",
        "Q8_0+Q3_K",
        "IQ4_XS+IQ4_NL",
    ],
)
def test_every_type(kinds: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1, num_experts=2, **WIDE)
    path = write_gguf(tmp_path / "model.gguf", tmp_path, kind_in(kinds))
    assert load_model_config(path).dtype == ("float16" if kinds == "F16" else "bfloat16")
    assert largest_difference(path, tmp_path) < 1e-3


@pytest.mark.parametrize("kinds", ["F16", "Q8_0", "Q4_0", "Q6_K", "Q4_K+Q6_K"])
def test_log_probabilities_are_those_of_transformers(kinds: str, tmp_path: Path) -> None:
    """With the numbers to which the package `gguf` dequantises the file, in float32."""
    save_tiny(tmp_path, **WIDE)
    path = write_gguf(tmp_path / "model.gguf", tmp_path, kind_in(kinds))
    model = transformers.JambaForCausalLM.from_pretrained(tmp_path).eval()
    for prompt, reply in zip(PROMPTS, load(path).generate(PROMPTS, GREEDY), strict=True):
        tokens = [*prompt, *reply.token_ids]
        expected = oracle_logits(model, tokens).log_softmax(-1)
        found = logprobs(reply)
        assert len(found) == len(tokens) - 1
        assert max(abs(found[i] - expected[i, token].item()) for i, token in enumerate(tokens[1:])) < 1e-3


def test_a_head_that_equals_the_embedding_is_tied(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    path = write_gguf(tmp_path / "model.gguf", tmp_path)
    assert read_model(path).config.tie_word_embeddings
    assert largest_difference(path, tmp_path) < 1e-4


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"general.architecture": "llama"}, r'general\.architecture is "llama"; this server runs "jamba"'),
    "missing": ({"jamba.embedding_length": None}, r"jamba\.embedding_length is missing; a whole number is expected"),
    "wrong type": ({"jamba.ssm.state_size": "16"}, r'jamba\.ssm\.state_size is "16"; a whole number is expected'),
    "layers": ({"jamba.block_count": 2**31}, r"jamba\.block_count is 2147483648; 1 to 1024 layers are expected"),
    "hidden": (
        {"jamba.embedding_length": 0},
        r"jamba\.embedding_length is 0; a whole number of at least 1 is expected",
    ),
    "expand": ({"jamba.ssm.inner_size": 65}, r"jamba\.ssm\.inner_size is 65; a multiple of embedding_length, 32"),
    "pattern": (
        {"jamba.attention.head_count_kv": [0, 2, 0, 0]},
        r"head_count_kv is an array of 4 elements; it says attention in layers 1, the tensors 2\.",
    ),
    "pattern length": ({"jamba.attention.head_count_kv": [0, 0]}, "a whole number for each of 4 layers is expected"),
    "heads": ({"jamba.attention.head_count": 0}, "num_attention_heads is 0; a whole number of at least 1 is expected"),
    "KV heads": ({"jamba.attention.head_count_kv": 3}, "num_key_value_heads is 3; it must divide num_attention_heads"),
    "experts": ({"jamba.expert_count": 2**31}, "num_experts is 2147483648; at most 1024 is expected"),
    "state": ({"jamba.ssm.state_size": 0}, "mamba_d_state is 0; a whole number of at least 1 is expected"),
    "not a number": (
        {"jamba.attention.layer_norm_rms_epsilon": math.nan},
        "a number above 0 and at most 1 is expected",
    ),
    "eps": ({"jamba.attention.layer_norm_rms_epsilon": 1}, "layer_norm_rms_epsilon is 1; a number is expected"),
    "token": ({"tokenizer.ggml.eos_token_id": 2**24}, r"eos_token_id is 16777216; a token id from 0 to"),
    "size": ({"jamba.embedding_length": 64, "jamba.ssm.inner_size": 128}, "has shape"),
    "range": ({"jamba.context_length": 2**31}, "max_position_embeddings is 2147483648; at most"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_metadata_is_refused(kind: str, tmp_path: Path) -> None:
    changes, words = WRONG[kind]
    save_tiny(tmp_path)
    path = write_gguf(tmp_path / "model.gguf", tmp_path, changes=changes)
    with pytest.raises(CheckpointError, match=words) as refusal:
        load(path)
    assert "model.gguf" in str(refusal.value)


def test_a_head_size_of_its_own(tmp_path: Path) -> None:
    save_tiny(tmp_path, head_dim=12)
    path = write_gguf(tmp_path / "model.gguf", tmp_path, changes={"jamba.attention.key_length": 12})
    assert load_model_config(path).head_dim == 12
    assert not math.isnan(largest_difference(path, tmp_path))
