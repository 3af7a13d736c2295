"""Converted checkpoints: what they hold, and that they answer as the original does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType
from gguf.quants import quantize as oracle
from safetensors import safe_open

from jamba_server.engine.convert.__main__ import main as convert
from jamba_server.engine.convert.encode import encode
from jamba_server.engine.errors import CheckpointError, ConfigError
from jamba_server.engine.gguf.reader import read_gguf
from jamba_server.engine.types import SamplingParams
from jamba_server.llm import LLM
from jamba_server.server.demo import demo_folder
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.engine.test_gguf_exact import GREEDY, SUBJECT, WIDE, result
from tests.engine.test_gguf_vocabulary import llama_cpp
from tests.tiny import save_tiny

TEXTS = ["Once upon a time, there was a little girl.", " two  spaces\n\nand \u00e9 \U0001f600", "<|eom|> is text"]


def load(path: Path, **settings: Any) -> LLM:
    return LLM(path, **{"threads": 1, "max_num_seqs": 2} | settings)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_encoded_numbers_are_those_of_the_package(kind: str) -> None:
    numbers = np.random.default_rng(3).standard_normal((40, 64)).astype(np.float32)
    numbers[0] = 0
    numbers[1, :32] = np.arange(32) / 2
    expected = oracle(numbers, GGMLQuantizationType[kind])
    assert encode(kind, numbers) == expected.tobytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with experts, whose head is its own, with the vocabulary of the demonstration model."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    settings: dict[str, Any] = WIDE | {"vocab_size": 4100, "eos_token_id": [2, 4]}
    save_tiny(folder, **settings)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo_folder() / name, folder / name)
    return folder


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_a_gguf_file_answers_as_the_original(kind: str, source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    convert(source, path, kind)
    ours, theirs = (Tokenizer.from_folder(model) for model in (path, source))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.special_tokens == theirs.special_tokens
    templates = [ChatTemplate.from_folder(model, tokenizer) for model, tokenizer in ((path, ours), (source, theirs))]
    assert templates[0] is not None and templates[1] is not None
    assert templates[0].source == templates[1].source
    dtype = "float16" if kind == "F16" else "bfloat16"
    llm, plain = load(path, dtype=dtype), load(source, dtype=dtype)
    assert llm.core.info.eos_token_ids == plain.core.info.eos_token_ids == (2, 4)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    pairs = [model.generate([SUBJECT], params)[0].prompt_logprobs[1:] for model in (llm, plain)]
    difference = max(abs(a.logprob - b.logprob) for a, b in zip(*pairs, strict=True) if a and b)
    assert difference < {"F16": 0.02, "BF16": 0.02, "Q8_0": 1, "Q4_0": 6}[kind]


def test_the_package_reads_the_file(source: Path, tmp_path: Path) -> None:
    convert(source, path := tmp_path / "model.gguf", "Q8_0")
    reader, file = GGUFReader(path), read_gguf(path)
    assert {tensor.name: tensor.data.tobytes() for tensor in reader.tensors} == {
        name: tensor.read(0, tensor.num_bytes).tobytes() for name, tensor in file.tensors.items()
    }
    assert {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}["blk.0.ssm_dt.weight"] == "F16"
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    # llama.cpp refuses an array of any other type (llama-vocab.cpp)
    assert reader.fields["tokenizer.ggml.token_type"].types == [GGUFValueType.ARRAY, GGUFValueType.INT32]
    pieces = reader.fields["tokenizer.ggml.tokens"].contents()
    assert pieces[4096:] == [f"[PAD{id}]" for id in range(4096, 4100)]
    assert types[0] == 3 and types[4096:] == [5] * 4
    scores = reader.fields["tokenizer.ggml.scores"].contents()
    known = {piece: score for piece, score, kind in zip(pieces, scores, types, strict=True) if kind == 1}
    tokenizer = Tokenizer.from_folder(source)
    text = "Once upon a time, there was a little girl."
    assert [pieces[id] for id in tokenizer.encode(text)[1:]] == llama_cpp(text, known)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_answers_bit_for_bit_as_weights_quantised_at_load(form: str, tied: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = WIDE | {"tie_word_embeddings": tied, "dtype": "bfloat16"}
    save_tiny(folder := tmp_path / "source", **settings)
    convert(folder, target := tmp_path / "target", form)
    converted, at_load = load(target), load(folder, quantization=form)
    assert converted.core.info.quantization == form
    assert converted.core.info.weight_bytes == at_load.core.info.weight_bytes
    assert result(converted.generate([SUBJECT], GREEDY)[0]) == result(at_load.generate([SUBJECT], GREEDY)[0])
    with pytest.raises(ConfigError, match=f"the checkpoint's weights are {form} already"):
        load(target, quantization="int8")


def test_numbers_of_four_bits_take_half_a_byte(tmp_path: Path) -> None:
    save_tiny(folder := tmp_path / "source", **WIDE)
    convert(folder, target := tmp_path / "target", "int4")
    name = "model.layers.0.feed_forward.gate_proj.weight"
    with safe_open(target / "model-00001.safetensors", framework="np") as file:
        assert file.get_tensor(f"{name}_packed").shape == (256, 128)
        assert name not in file.keys()  # noqa: SIM118 - the file is no mapping


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no tokenizer": ({}, "Q8_0", r"has no tokenizer\.json, which a GGUF file must have"),
    "biases": ({"mamba_proj_bias": True}, "Q8_0", "is a model with biases of the Mamba projections"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_converted_is_refused(kind: str, tmp_path: Path) -> None:
    changes, form, words = WRONG[kind]
    save_tiny(tmp_path / "source", **changes)
    with pytest.raises(CheckpointError, match=words):
        convert(tmp_path / "source", tmp_path / "target", form)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_another_version_of_a_converted_folder_is_refused(tmp_path: Path) -> None:
    save_tiny(folder := tmp_path / "source", **WIDE)
    convert(folder, target := tmp_path / "target", "int8")
    config = target / "config.json"
    config.write_text(config.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(CheckpointError, match=r"this server reads what its own `jamba convert` writes in the formats"):
        load(target)


def test_the_command(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jamba_server", "convert", str(source), str(path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run("--to", "gguf", "--type", "Q4_0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{path}: Q4_0, ")
    again = run("--to", "gguf")
    assert again.returncode == 1
    assert again.stderr.strip().endswith("model.gguf exists already; name a new file.")
    path.unlink()
    wrong = run("--to", "int8", "--type", "F16")
    assert "--type F16 is for --to gguf, not for --to int8." in wrong.stderr
