"""Checkpoints whose configuration and weight files contradict each other about the head: which one counts, and the
warning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.start.contents import EMBEDDING, HEAD, read_model, read_plan
from jamba_server.engine.types import SamplingParams
from jamba_server.engine.weight_files import StoredTensor, header
from jamba_server.engine.weight_sizes import weight_bytes
from jamba_server.llm import LLM
from tests.engine.test_weights import INDEX_FILE, MODEL_FILE, Tensors, rewrite, set_tensor, shard, write_checkpoint
from tests.geometries import write_geometry
from tests.tiny import TINY_CONFIGS, oracle_logits, save_tiny

TIED = TINY_CONFIGS["dense-mqa-tied"]
PROMPT = [1, 5, 7, 3, 9, 30, 11]
SIZE = 64 * 32  # numbers of the tiny model's embedding


def save_tied(folder: Path, change: Callable[[Tensors], object]) -> None:
    save_tiny(folder, **TIED)
    tensors = load_file(folder / MODEL_FILE)
    assert HEAD not in tensors
    change(tensors)
    save_file(tensors, folder / MODEL_FILE, metadata={"format": "pt"})


def another_head(tensors: Tensors) -> None:
    tensors[HEAD] = torch.randn(64, 32, generator=torch.Generator().manual_seed(7)) / 5


def another_at_the_end(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][-1, -1] += 1.0


def equal_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def only_the_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBEDDING)


def shard_names(folder: Path) -> None:
    names = sorted(load_file(folder / MODEL_FILE))
    shard(folder, (names[:1], names[1:]))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("change", "own"),
    [(another_head, True), (another_at_the_end, True), (equal_head, False), (only_the_head, False)],
)
def test_a_tied_model_answers_as_in_transformers(
    change: Callable[[Tensors], object], own: bool, sharded: bool, tmp_path: Path
) -> None:
    save_tied(tmp_path, change)
    if sharded:
        shard_names(tmp_path)
    oracle: Any = transformers.JambaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    llm = LLM(tmp_path, dtype="float32", max_num_seqs=1, threads=1)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=1)
    [found] = llm.generate([PROMPT], params)
    expected = oracle_logits(oracle, [*PROMPT, *found.token_ids]).log_softmax(-1)[len(PROMPT) - 1 : -1]
    assert found.token_ids == expected.argmax(-1).tolist()
    assert [entry.logprob for entry in found.logprobs] == pytest.approx(expected.amax(-1).tolist(), abs=1e-3)
    info = llm.core.info
    told = [warning for warning in info.warnings if "tie_word_embeddings" in warning]
    assert len(told) == own
    tied = load_model_config(tmp_path)
    assert info.num_parameters - tied.num_parameters() == own * SIZE
    assert info.weight_bytes - weight_bytes(tied, 4) == own * 4 * SIZE
    assert read_plan(tmp_path) == read_model(tmp_path)


def test_a_quantised_head_of_its_own_is_counted(tmp_path: Path) -> None:
    """One that is the embedding is quantised beside it all the same, so both take the same."""
    save_tied(tmp_path, another_head)
    llm = LLM(tmp_path, dtype="float32", max_num_seqs=1, threads=1, quantization="int8")
    policy = QuantizationPolicy("int8")
    assert llm.core.info.weight_bytes == weight_bytes(read_model(tmp_path).config, 4, policy=policy)
    assert llm.core.info.num_parameters == load_model_config(tmp_path).num_parameters() + SIZE


def test_another_dtype_is_another_head(tmp_path: Path) -> None:
    save_tied(tmp_path, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].double()}))
    assert not read_model(tmp_path).config.tie_word_embeddings


def test_random_weights_follow_the_configuration(tmp_path: Path) -> None:
    save_tied(tmp_path, another_head)
    info = LLM(tmp_path, load_format="dummy", max_num_seqs=1, threads=1).core.info
    assert info.num_parameters == load_model_config(tmp_path).num_parameters()


def test_tensors_are_compared_up_to_the_first_slice_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jamba_server.engine.weight_files._SLICE", 1000)
    first = torch.arange(2500, dtype=torch.uint8)
    second = first.clone()
    save_file({"a": first, "b": second, "c": first.clone().view(50, 50)}, tmp_path / "x.safetensors")
    tensors = header(tmp_path / "x.safetensors")
    assert tensors["a"].equals(tensors["b"])
    assert not tensors["a"].equals(tensors["c"])
    for place in (0, 999, 1000, 2499):
        second[place] += 1
        save_file({"a": first, "b": second}, tmp_path / "y.safetensors")
        changed: StoredTensor = header(tmp_path / "y.safetensors")["b"]
        assert not tensors["a"].equals(changed)
        second[place] -= 1


@pytest.mark.parametrize(
    ("index", "own"),
    [(None, False), ({EMBEDDING: "a.safetensors"}, False), ({EMBEDDING: "a.safetensors", HEAD: "b.safetensors"}, True)],
)
def test_a_plan_without_weights_goes_by_the_index(index: dict[str, str] | None, own: bool, tmp_path: Path) -> None:
    write_geometry(tmp_path, "3b")
    if index is not None:
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
    plan = read_plan(tmp_path)
    # the two published sizes of 3B models: 6,058,674,944 bytes tied, 6,394,271,296 less the headers otherwise
    assert plan.config.num_parameters() == 3_029_337_472 + own * 65_536 * 2560
    assert len(plan.warnings) == own


def test_a_plan_takes_pointers_for_no_weights(tmp_path: Path) -> None:
    write_geometry(tmp_path, "3b")
    (tmp_path / MODEL_FILE).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert read_plan(tmp_path).config.tie_word_embeddings
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "extra", "words"),
    [
        ({}, "score.weight", "tensor score.weight is in the files, but JambaForCausalLM"),
        (
            {"architectures": ["JambaForSequenceClassification"]},
            "lm_head.weight",
            "lm_head.weight is in the files",
        ),
        ({}, "model.layers.2.self_attn.rotary_emb.inv_freq", None),  # no model of these has ever used it
    ],
)
def test_whoever_may_miss_a_tensor_is_told(
    changes: dict[str, Any], extra: str, words: str | None, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, **changes)
    rewrite(tmp_path, lambda tensors: tensors.update({extra: torch.ones(48, 16)}))
    warnings = read_model(tmp_path).warnings
    assert [words is not None and words in warning for warning in warnings] == [True] * (words is not None)


def test_an_index_beside_a_single_file_is_told(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / INDEX_FILE).write_text("{}")
    [warning] = read_model(tmp_path).warnings
    assert warning == f"the folder has both {MODEL_FILE}, which is loaded, and {INDEX_FILE}, which is ignored"


CONV, IN = "model.layers.0.mamba.conv1d", "model.layers.0.mamba.in_proj"


def without_head(tensors: Tensors) -> Tensor:
    return tensors.pop(HEAD)


@pytest.mark.parametrize(
    ("changes", "change", "words"),
    [
        ({}, lambda f: rewrite(f, without_head), "missing: lm_head.weight; tie_word_embeddings in config.json makes a"),
        ({"mamba_conv_bias": False}, set_tensor(f"{CONV}.bias", torch.ones(32)), "without it"),
        (
            {"mamba_proj_bias": False},
            set_tensor(f"{IN}.bias", torch.ones(64)),
            "; mamba_proj_bias in config.json",
        ),
        ({}, set_tensor(f"{CONV}.weight", torch.ones(32, 4, 1)), "; MLX stores it in this shape: serve"),
        ({}, set_tensor("score.bias", torch.ones(2)), "tensor score.bias [2] has no place"),
        ({}, set_tensor("model.model.embed_tokens.weight", torch.ones(48, 16)), "has no place"),
        ({}, set_tensor("embed_tokens.weight", torch.ones(48, 16)), "tensor embed_tokens.weight [48, 16] has no place"),
        ({}, set_tensor("lm_head.bias", torch.ones(48)), "tensor lm_head.bias [48] has no place"),
    ],
)
def test_tensors_that_the_configuration_has_no_place_for_are_refused(
    changes: dict[str, Any], change: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, **changes)
    change(tmp_path)
    with pytest.raises(CheckpointError) as refusal:
        LLM(tmp_path, max_num_seqs=1, threads=1)
    assert words in str(refusal.value)
