"""Writes checkpoint folders as GPTQModel, AutoAWQ, llm-compressor, mlx-lm and transformers with bitsandbytes write
them, from the layouts that these tools document. `test_prequantized_vectors.py` compares the writers' packing with
tensors that the packages themselves have written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

Array = np.ndarray[Any, np.dtype[Any]]
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Written(NamedTuple):
    """The tensors of one module, by the end of their names, and the numbers that they stand for, float32 [N, K]."""

    tensors: dict[str, Array]
    numbers: Array


Writer = Callable[[str, Array], Written | None]
"""Takes the name of a weight without `.weight` and the weight, and returns None if the weight stays as it is."""


def rewrite(folder: Path, to: Path, settings: dict[str, Any], write: Writer, key: str = "quantization_config") -> Path:
    """Writes the checkpoint `folder` to the folder `to` with quantised weights. The folder `to`/plain has the same
    numbers in float32."""
    tensors: dict[str, Array] = {}
    plain: dict[str, Array] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, end = name.rpartition(".")
        written = write(module, tensor) if end == "weight" and tensor.ndim == 2 else None
        plain[name] = tensor if written is None else written.numbers
        if written is None:
            tensors[name] = tensor
        else:
            tensors |= {f"{module}.{end}": part for end, part in written.tensors.items()}
    return save(to, folder / "config.json", tensors, plain, key, settings)


def save(
    to: Path, document: Path, tensors: dict[str, Array], plain: dict[str, Array], key: str, settings: dict[str, Any]
) -> Path:
    """Writes quantised tensors to the folder `to` and the same numbers in float32 to `to`/plain. `document` is the
    config.json of the model, to which `settings` are added as `key`."""
    config = json.loads(document.read_text())
    for path, values, config_values in ((to, tensors, config | {key: settings}), (to / "plain", plain, config)):
        path.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(config_values))
    return to


def grouped(weight: Array, size: int | None, levels: int, order: Array | None = None) -> tuple[Array, Array, Array]:
    """Returns integers from 0 to `levels` [N, K], scales [N, G] in float16 and zeros [N, G] for groups of `size`
    inputs. `order` has the group of each input."""
    k = weight.shape[1]
    size = size or k
    groups = np.arange(k) // size if order is None else order
    count = int(groups.max()) + 1
    low = np.stack([np.minimum(weight[:, groups == g].min(1), 0) for g in range(count)], 1)
    high = np.stack([np.maximum(weight[:, groups == g].max(1), 0) for g in range(count)], 1)
    scales = ((high - low) / levels).astype(np.float16)
    zeros = np.clip(np.round(-low / scales.astype(np.float32)), 0, levels)
    values = np.round(weight / scales.astype(np.float32)[:, groups]) + zeros[:, groups]
    return np.clip(values, 0, levels).astype(np.uint32), scales, zeros.astype(np.uint32)


def packed(values: Array, bits: int, order: tuple[int, ...] | None = None) -> Array:
    """Packs integers [R, C] along their last dimension into int32 words, the first one in the lowest bits. `order`
    names the integers of a word from the lowest bits on."""
    per_word = 32 // bits
    padded = np.pad(values.astype(np.uint32), ((0, 0), (0, -values.shape[1] % per_word)))
    words = padded.reshape(len(values), -1, per_word)[..., list(order or range(per_word))]
    shifted = words << (np.arange(per_word, dtype=np.uint32) * np.uint32(bits))
    return np.bitwise_or.reduce(shifted, -1).astype(np.uint32).view(np.int32)


def numbers(values: Array, scales: Array, zeros: Array, groups: Array) -> Array:
    signed = values.astype(np.float32) - zeros.astype(np.float32)[:, groups]
    return signed * scales.astype(np.float32)[:, groups]


def gptq(weight: Array, *, bits: int, size: int | None, v2: bool = False, order: Array | None = None) -> Written:
    levels = 2**bits - 1
    groups = np.arange(weight.shape[1]) // (size or weight.shape[1]) if order is None else order
    values, scales, zeros = grouped(weight, size, levels, order)
    tensors = {
        "qweight": packed(values, bits).T,
        "qzeros": packed(zeros.T, bits) - np.int32(0 if v2 else 0x11111111 if bits == 4 else 0x01010101),
        "scales": scales.T,
        "g_idx": groups.astype(np.int32),
    }
    return Written(tensors, numbers(values, scales, zeros, groups))


def awq(weight: Array, *, size: int) -> Written:
    values, scales, zeros = grouped(weight, size, 15)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": packed(values.T, 4, order), "qzeros": packed(zeros.T, 4, order), "scales": scales.T}
    return Written(tensors, numbers(values, scales, zeros, np.arange(weight.shape[1]) // size))


def compressed(weight: Array, *, bits: int, size: int | None, symmetric: bool, pack: bool) -> Written:
    groups = np.arange(weight.shape[1]) // (size or weight.shape[1])
    half, levels = 2 ** (bits - 1), 2**bits - 1
    values, scales, zeros = grouped(weight, size, levels)
    if symmetric:
        largest = np.stack([np.abs(weight[:, groups == g]).max(1) for g in range(int(groups.max()) + 1)], 1)
        scales = (largest / (half - 1)).astype(np.float16)
        zeros = np.full_like(zeros, half)
        values = (np.round(weight / scales.astype(np.float32)[:, groups]) + half).astype(np.uint32)
    if pack:
        tensors = {"weight_packed": packed(values, bits), "weight_shape": np.array(weight.shape, np.int64)}
        tensors |= {} if symmetric else {"weight_zero_point": packed(zeros.T, bits).T}
    else:
        tensors = {"weight": (values.astype(np.int32) - half).astype(np.int8)}
        tensors |= {} if symmetric else {"weight_zero_point": (zeros.astype(np.int32) - half).astype(np.int8)}
    return Written(tensors | {"weight_scale": scales}, numbers(values, scales, zeros, groups))


def mlx(weight: Array, *, bits: int, size: int) -> Written:
    """The last dimension is quantised, so the experts of a layer may be stacked."""
    split = weight.reshape(*weight.shape[:-1], -1, size)
    low = split.min(-1)
    scales = ((split.max(-1) - low) / (2**bits - 1)).astype(np.float16)
    biases = low.astype(np.float16)
    wide, shift = scales.astype(np.float32)[..., None], biases.astype(np.float32)[..., None]
    values = np.clip(np.round((split - shift) / wide), 0, 2**bits - 1)
    words = packed(values.reshape(-1, weight.shape[-1]), bits).view(np.uint32).reshape(*weight.shape[:-1], -1)
    return Written({"weight": words, "scales": scales, "biases": biases}, (values * wide + shift).reshape(weight.shape))


def rows8(weight: Array) -> Written:
    largest = np.abs(weight).max(1)
    values = np.round(weight * (127 / largest)[:, None]).astype(np.int8)
    tensors = {"weight": values, "SCB": largest, "weight_format": np.zeros((), np.uint8)}
    return Written(tensors, values.astype(np.float32) * (largest / np.float32(127))[:, None])


def nf4(weight: Array, *, block: int = 64, nested: bool = False) -> Written:
    flat = np.pad(weight.reshape(-1), (0, -weight.size % block)).reshape(-1, block)
    scales, table = np.abs(flat).max(1), np.array(NF4, np.float32)
    values = np.abs(flat[..., None] / scales[:, None, None] - table).argmin(-1).astype(np.uint8)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": "float32", "shape": list(weight.shape)}
    tensors: dict[str, Array] = {"weight.absmax": scales}
    if nested:
        offset, codes = float(scales.mean()), np.linspace(-1, 1, 256, dtype=np.float32)
        upper = np.array([np.abs(scales - offset).max() + 1e-6], np.float32)
        chosen = np.abs((scales - offset)[:, None] / upper - codes).argmin(-1).astype(np.uint8)
        scales = codes[chosen] * upper + np.float32(offset)
        tensors = {"weight.absmax": chosen, "weight.nested_absmax": upper, "weight.nested_quant_map": codes}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    kept = values.reshape(-1)[: weight.size]
    tensors["weight"] = (kept[::2] << 4 | kept[1::2])[:, None]
    tensors["weight.quant_map"] = table
    tensors["weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    result = (table[values] * scales[:, None]).reshape(-1)[: weight.size].reshape(weight.shape)
    return Written(tensors, result.astype(np.float32))
