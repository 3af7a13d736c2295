"""Folders of other tools with settings that are not supported, or with tensors that do not fit to them: each ends in
one error that names the file, the key or the tensor, and what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.model_config import load_model_config
from jamba_server.llm import LLM
from tests import quantized_folders as written
from tests.engine.test_prequantized import (
    AWQ,
    BNB,
    GPTQ,
    SHAPE,
    is_quantized,
    largest_difference,
    scheme,
    write,
    write_for_mlx,
)
from tests.quantized_folders import Array
from tests.tiny import save_tiny

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq bits": (GPTQ | {"bits": 3}, "quantization_config.bits is 3; this server reads 4, 8 only"),
    "gptq layout": (GPTQ | {"checkpoint_format": "marlin"}, 'checkpoint_format is "marlin"; this server reads "gptq"'),
    "gptq groups": (GPTQ | {"group_size": 20}, "group_size is 20; a multiple of 8 is expected"),
    "awq layout": (AWQ | {"version": "gemv"}, 'quantization_config.version is "gemv"; this server reads "gemm"'),
    "awq bits": (AWQ | {"bits": 8}, "quantization_config.bits is 8; this server reads 4 only"),
    "packed bits": (scheme(True, 3, 32, True), "weights.num_bits is 3; this server reads 4, 8 only"),
    "packed strategy": (scheme(True, 4, 0, True), "weights.group_size is 0; a multiple of 8 is expected"),
    "other floats": (BNB | {"bnb_4bit_quant_type": "fp8"}, 'bnb_4bit_quant_type is "fp8"; this server reads "nf4"'),
    "mlx bits": (
        {"group_size": 64, "bits": 6},
        "bits is 6; of MLX folders, this server reads 4, 8",
    ),
    **{
        f"{tool} groups of {size}": (settings | {"group_size": size}, f"group_size is {shown}; a multiple of 8 is exp")
        for tool, settings in (("gptq", GPTQ), ("awq", AWQ))
        for size, shown in ((0, "0"), (-2, "-2"), (-128, "-128"), (True, "true"), ("32", '"32"'), (24.0, "24.0"))
    },
    **{
        f"packed groups of {size}": (scheme(True, 4, size, True), f"weights.group_size is {size}; a multiple of 8 is")
        for size in (-1, -32, 20)
    },
    **{
        f"mlx groups of {size}": ({"group_size": size, "bits": 4}, f"group_size is {size}; of MLX folders, this ser")
        for size in (0, -64, 48, 64.0)
    },
    "mlx mode": ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, 'mode is "mxfp4"; of MLX folders'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str, tmp_path: Path) -> None:
    settings, words = REFUSED[name]
    save_tiny(tmp_path, **SHAPE)
    folder = written.rewrite(tmp_path, tmp_path / "quantised", settings, lambda module, weight: None)
    with pytest.raises(CheckpointError) as refusal:
        load_model_config(folder)
    assert words in str(refusal.value)
    assert "config.json: quantization_config." in str(refusal.value)


Q = "model.layers.1.self_attn.q_proj"
DAMAGED: dict[str, tuple[str, str, Callable[[Array], Array] | None, str]] = {
    "part": ("gptq", f"{Q}.scales", None, "is missing, although other parts of this weight are there"),
    "dtype": (
        "awq",
        f"{Q}.qzeros",
        lambda a: a.astype(np.int64),
        "qzeros is I64 [2, 8]; I32 [2, 8] is expected",
    ),
    "groups": ("gptq", f"{Q}.scales", lambda a: a[:1], "qzeros is I32 [2, 8]; I32 [1, any] is expected"),
    "order": ("gptq desc_act", f"{Q}.g_idx", lambda a: a - 1, "g_idx has numbers beyond 0 to 1"),
    "shape": ("packed int4", f"{Q}.weight_shape", lambda a: a * 2, "weight_shape is [128, 128], to which"),
    "scale": ("packed int8 rows", f"{Q}.weight_scale", lambda a: a * np.inf, "scales that are infinite"),
    "state": ("nf4", f"{Q}.weight.quant_state.bitsandbytes__nf4", lambda a: a[:-1], "no valid state of a matrix"),
    "table": ("nf4", f"{Q}.weight.quant_map", lambda a: a * np.nan, "quant_map has infinite numbers or NaN"),
    "zeros": ("gptq", f"{Q}.qzeros", None, "is missing, although other parts of this weight are there"),
    "AWQ scales": ("awq", f"{Q}.scales", None, "is missing, although other parts of this weight are there"),
    "not a number": ("awq", f"{Q}.scales", lambda a: a * np.nan, "scales that are infinite or not a number (NaN)"),
    "fewer words": ("awq", f"{Q}.qweight", lambda a: a[:-1], "q_proj.weight has shape [64, 63]"),
    "one dimension": ("awq", f"{Q}.qweight", lambda a: a[0], "qweight is I32 [8]; I32 [any, any] is expected"),
    "no words": ("gptq", f"{Q}.qweight", lambda a: a[:0], "is not of 4 or 8 bits in groups of a multiple of 8 inputs"),
    "order beyond": ("gptq desc_act", f"{Q}.g_idx", lambda a: a + 1, "g_idx has numbers beyond 0 to 1"),
    "order far beyond": ("gptq desc_act", f"{Q}.g_idx", lambda a: a * 2**30, "g_idx has numbers beyond 0 to 1"),
    "order too short": ("gptq desc_act", f"{Q}.g_idx", lambda a: a[:-1], "g_idx is I32 [63]; I32 or I64 [64] is expe"),
    "int8 scales": ("int8", f"{Q}.weight_scale", None, "has dtype torch.int8; floats of 16 bits or more are expected"),
    "packed scales": (
        "packed int4",
        f"{Q}.weight_scale",
        None,
        "q_proj.weight_shape [2] has no place in the model",
    ),
    "negative shape": ("packed int4", f"{Q}.weight_shape", lambda a: -a, "weight_shape is [-64, -64], to which"),
    "huge shape": (
        "packed int4",
        f"{Q}.weight_shape",
        lambda a: a * 2**40,
        "to which weight_packed [64, 8] with 4 bits",
    ),
    "row scales": ("rows of 8 bits", f"{Q}.SCB", None, "has dtype torch.int8; floats of 16 bits or more are expected"),
    "block scales": ("nf4", f"{Q}.weight.absmax", None, "is missing, although other parts of this weight are there"),
    "no state": (
        "nf4",
        f"{Q}.weight.quant_state.bitsandbytes__nf4",
        None,
        "weight.absmax [64] has no place in the model",
    ),
    "nested": (
        "nf4 nested",
        f"{Q}.weight.nested_quant_map",
        lambda a: a[:-1],
        "nested_quant_map is F32 [255]; F32 [256",
    ),
    "rows": ("rows of 8 bits", f"{Q}.SCB", lambda a: a[:-1], "SCB is F32 [63]; F32 [64] is expected"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tensor_is_named(name: str, tmp_path: Path) -> None:
    case, tensor, change, words = DAMAGED[name]
    folder = write(case, tmp_path, SHAPE)
    assert words in refusal_of(folder, tensor, change)


def refusal_of(folder: Path, tensor: str, change: Callable[[Array], Array] | None) -> str:
    """Changes a tensor of the folder, or removes it, and returns the error of a load."""
    tensors = load_file(folder / "model.safetensors")
    old = tensors.pop(tensor)
    changed = {} if change is None else {tensor: np.ascontiguousarray(change(old))}
    save_file(tensors | changed, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as refusal:
        LLM(folder, dtype="float32", max_num_seqs=2, threads=1)
    text = str(refusal.value)
    assert f"{folder}/model.safetensors: " in text
    assert len(text) < 1000
    return text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("blocksize", 0),
        ("blocksize", -64),
        ("blocksize", 2**40),
        ("shape", [64]),
        ("shape", [-64, -64]),
        ("shape", [64, "64"]),
        ("nested_blocksize", 0),
        ("nested_offset", "x"),
    ],
)
def test_an_impossible_state_of_a_matrix_is_refused(key: str, value: object, tmp_path: Path) -> None:
    def change(state: Array) -> Array:
        return np.frombuffer(json.dumps(json.loads(state.tobytes()) | {key: value}).encode(), np.uint8)

    text = refusal_of(write("nf4 nested", tmp_path, SHAPE), f"{Q}.weight.quant_state.bitsandbytes__nf4", change)
    assert "no valid state of a matrix of bitsandbytes" in text


DAMAGED_MLX: list[tuple[str, Callable[[Array], Array] | None, str]] = [
    (f"{Q}.biases", None, "q_proj.biases is missing, although other parts of this weight are there"),
    (f"{Q}.scales", None, "q_proj.weight has shape [64, 8]; "),
    ("model.layers.1.feed_forward.switch_mlp.up_proj.weight", lambda a: a[0], "U32 [any, any, any] is expected"),
    ("model.layers.1.feed_forward.switch_mlp.up_proj.scales", lambda a: a[:1], "up_proj.scales is F16 [1, 128, 1]"),
    ("model.layers.1.feed_forward.switch_mlp.up_proj.scales", lambda a: a * np.inf, "scales that are infinite"),
]


@pytest.mark.parametrize(("tensor", "change", "words"), DAMAGED_MLX)
def test_a_damaged_tensor_of_mlx_is_named(
    tensor: str, change: Callable[[Array], Array] | None, words: str, tmp_path: Path
) -> None:
    assert words in refusal_of(write_for_mlx(tmp_path, SHAPE, 4), tensor, change)


@pytest.mark.parametrize("size", [24, 48])
def test_groups_that_do_not_divide_the_inputs(size: int, tmp_path: Path) -> None:
    """AWQ: the tensors are those of groups of 32. GPTQ: the last group of a row has fewer inputs, as the tool writes
    it."""
    folder = write("awq", tmp_path, SHAPE)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = size
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"scales is F16 \[4, 64\]; .* \[{-(-128 // size)}, 64\] is expected"):
        load_model_config(folder)
    ragged = written.rewrite(
        tmp_path,
        tmp_path / "ragged",
        GPTQ | {"group_size": size},
        lambda module, w: written.gptq(w, bits=4, size=size) if is_quantized(module, w) else None,
    )
    assert largest_difference(ragged) < 1e-3
