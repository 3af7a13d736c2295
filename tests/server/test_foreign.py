"""What people point a server at that is no checkpoint: one sentence that says what it is and what to do, from every
command and from the engine alike; and files that could hurt are not read at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import CheckpointError, ConfigError
from jamba_server.engine.files import MAX_BYTES
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.weight_files import INDEX_FILE, weight_files
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.config import ServerConfig
from jamba_server.server.config_sources import load_config
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from jamba_server.server.text.tokenizer_config import read_tokenizer_config
from tests.geometries import GEOMETRIES, write_geometry

PLAIN = "Serve the original checkpoint with plain weights instead; to reduce its memory, add --quantization "


def files(*names: str, **texts: str) -> Callable[[Path], Path]:
    """Makes a folder with these files, and returns its path."""

    def make(folder: Path) -> Path:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(texts.get(name.replace(".", "_"), "{}"))
        return folder

    return make


def named(name: str, *others: str) -> Callable[[Path], Path]:
    return lambda folder: files(*others)(folder) / name


ADAPTER = json.dumps({"base_model_name_or_path": "ai21labs/AI21-Jamba2-3B"})
FOREIGN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "lora": (
        files("adapter_config.json", "adapter_model.safetensors", adapter_config_json=ADAPTER),
        'is a LoRA adapter of "ai21labs/AI21-Jamba2-3B" (adapter_config.json), which is not a model by itself: merge',
    ),
    "lora beside a model": (
        files("config.json", "adapter_config.json", "model.safetensors"),
        "has a LoRA adapter beside the model (adapter_config.json), which this server would not apply: merge it into",
    ),
    "gguf file": (named("a.gguf", "a.gguf"), "a.gguf has 2 bytes, which is no GGUF file; download it again."),
    "ggml file": (named("a.ggml", "a.ggml"), "a.ggml is a file of an old version of llama.cpp, which this server does"),
    "gguf name": (lambda _: Path("x/y.gguf"), "There is no folder or file x/y.gguf; by its name it would be a GGUF fi"),
    "gguf folder": (
        files("README.md", "a-Q4_K_M.gguf"),
        "has no config.json; a-Q4_K_M.gguf in it is a GGUF file; give",
    ),
    "onnx folder": (files("model.onnx"), "model.onnx in it is an export for another runtime, which this server does"),
    "pickle": (named("pytorch_model.bin", "pytorch_model.bin"), "is not a safetensors file; load it with transformers"),
    "safetensors": (named("model.safetensors", "model.safetensors"), "is a file of weights; give the folder that it"),
    "another file": (named("notes.txt", "notes.txt"), "notes.txt is not a folder; give a checkpoint folder in Huggin"),
    "archive": (named("model.tar.gz", "model.tar.gz"), "is an archive; unpack it and give the folder."),
    "empty": (files(), " is empty; give a checkpoint folder in Hugging Face format (config.json, tokenizer.json, *."),
    "one model below": (files("a/config.json"), "has no config.json itself, but folders in it have one; give "),
    "models": (files(*(f"{n}/config.json" for n in "abcde")), "/a, "),
    "many models": (files(*(f"{n}/config.json" for n in "abcde")), "/c or one of 2 more."),
    "hub cache": (files("refs/main", "snapshots/1a2b/config.json"), "is an entry of a hub cache; give the hub id, or "),
    "half a download": (files("tokenizer.json"), "has no config.json, so it is not a checkpoint folder in Hugging F"),
    "modelopt": (files("config.json", "hf_quant_config.json"), "has weights quantised by NVIDIA ModelOpt (hf_quant_c"),
    "a long name": (lambda _: Path("/" + "a" * 5000), "a cannot be read: File name too long."),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_checkpoint_is_named_with_what_to_do(kind: str, tmp_path: Path) -> None:
    make, words = FOREIGN[kind]
    folder = make(tmp_path)
    sentences: list[str] = []
    for enter in (load_model_config, lambda path: find_checkpoint(ServerConfig(model=str(path)))):
        with pytest.raises(CheckpointError) as refusal:
            enter(folder)
        sentences.append(str(refusal.value))
    assert all(words in sentence and sentence.endswith(".") for sentence in sentences)
    assert all("\n" not in sentence and len(sentence) < 5200 for sentence in sentences)


def quantized(**config: Any) -> dict[str, Any]:
    return {"quantization_config": config}


ONLY = "; this server reads compressed-tensors, gptq, awq, bitsandbytes and the format of mlx-lm only. "


def compressed(**config: Any) -> dict[str, Any]:
    return quantized(quant_method="compressed-tensors", **config)


METHODS: list[tuple[dict[str, Any], str]] = [
    ({"quantization": {"group_size": 64}}, 'quantization is {"group_size": 64}; the settings of mlx-lm, bits and'),
    (quantized(group_size=64, bits=3), f"bits is 3; of MLX folders, this server reads 4, 8 only. {PLAIN}int8, int4 or"),
    (quantized(quant_method="gptq", bits=2), f"bits is 2; this server reads 4, 8 only. {PLAIN}int8, int4 or fp8"),
    (quantized(quant_method="awq"), f"bits is null; this server reads 4 only. {PLAIN}"),
    (quantized(quant_method="fp8", weight_block_size=[128, 128]), f"{PLAIN}fp8"),
    (quantized(quant_method="fbgemm_fp8"), f", weights quantised by FBGEMM{ONLY}"),
    (quantized(quant_method="modelopt_fp4"), f", weights quantised by NVIDIA ModelOpt{ONLY}"),
    *((quantized(quant_method=name), f"{PLAIN}int") for name in ("torchao", "hqq", "quanto", "aqlm", "marlin")),
    (quantized(quant_method="of-tomorrow"), f'quant_method is "of-tomorrow"{ONLY}'),
    (compressed(format="marlin-24"), f'this server reads "float-quantized" only. {PLAIN}int8, int4 or fp8'),
    (compressed(transform_config={"config_groups": {"R1": {}}}), "transform_config is {"),
    (compressed(sparsity_config={"format": "sparse-24-bitmask"}), 'sparsity_config.format is "sparse-24-bitmask"'),
    ({"compression_config": {"format": "float-quantized"}}, "this is an old name of quantization_config"),
    ({"model_type": "mamba2"}, 'model_type is "mamba2"; this server runs "jamba" models only, such as ai21labs/'),
]


def write_config(folder: Path, changes: dict[str, Any]) -> Path:
    write_geometry(folder, "3b")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(("changes", "words"), METHODS)
def test_quantised_weights_are_named_with_what_to_do(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        find_checkpoint(ServerConfig(model=str(write_config(tmp_path, changes))))
    assert words in str(refusal.value)


def test_a_method_that_quantises_plain_weights_is_taken_by_its_name_here(tmp_path: Path) -> None:
    config = load_model_config(write_config(tmp_path, quantized(quant_method="experts_int8")))
    with pytest.raises(ConfigError, match=r"asks for experts_int8, which .*; add --quantization int8 to do the same"):
        QuantizationPolicy.of(EngineConfig(model=""), config.quantized_roles, config.made_at_load)
    policy = QuantizationPolicy.of(
        EngineConfig(model="", quantization="int8"), config.quantized_roles, config.made_at_load
    )
    assert policy == QuantizationPolicy("int8")
    with pytest.raises(ConfigError, match=r"it must be one of int8, int4, int4-g32, fp8\. The nearest value is int8\."):
        load_config({"quantization": "experts_int8"}, {})


# Files that could hurt ----------------------------------------------------------------------------------------------

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config": ("config.json", load_model_config),
    "generation defaults": ("generation_config.json", GenerationDefaults.of),
    "end of text": ("generation_config.json", load_model_config),
    "tokenizer": ("tokenizer.json", Tokenizer.from_folder),
    "token names": ("tokenizer_config.json", read_tokenizer_config),
    "template": ("chat_template.jinja", lambda folder: ChatTemplate.from_folder(folder, None)),  # pyright: ignore[reportArgumentType]
    "index": (INDEX_FILE, weight_files),
    "options": ("options.yaml", lambda folder: load_config({}, {}, folder / "options.yaml")),
}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "cannot be read: Is a directory."),
    "pipe": (os.mkfifo, "is a pipe; a file is expected."),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device; a file is expected."),
    "size": (lambda path: (path.touch(), os.truncate(path, 8 * MAX_BYTES + 1)), " has 134,217,729 bytes; at most "),
    "nesting": (lambda path: path.write_text('{"x": ' + "[" * 200_000), ""),
    "parentheses": (lambda path: path.write_text("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"), ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("reader", READERS)
def test_files_that_could_hurt_are_one_sentence(reader: str, damage: str, tmp_path: Path) -> None:
    (name, read), (change, words) = READERS[reader], DAMAGES[damage]
    if name != "config.json":
        write_geometry(tmp_path, "3b")
    if reader == "index" and damage in ("folder", "pipe", "device"):
        words = "has neither model.safetensors nor"
    change(tmp_path / name)
    if reader == "template" and damage == "nesting":
        return  # which is but text there
    with pytest.raises(ConfigError) as refusal:
        read(tmp_path)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_vocabulary_with_a_far_id_takes_no_memory(tmp_path: Path) -> None:
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    vocabulary = {"type": "BPE", "vocab": {"a": 0, "b": 4_000_000_000}, "merges": []}
    content = {"version": "1.0", "added_tokens": [], "model": vocabulary, "decoder": decoder}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="the highest token id is 4000000000; at most 16777215 is expected"):
        Tokenizer.from_folder(tmp_path)


def test_the_published_geometries_are_within_the_limits(tmp_path: Path) -> None:
    for name in GEOMETRIES:
        assert load_model_config(write_geometry(tmp_path, name)).num_hidden_layers <= 72
