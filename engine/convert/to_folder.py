"""Converts a checkpoint to a folder with quantised weights, which loads without being quantised again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from jamba_server.engine.checkpoint import MAX_TOKENIZER_BYTES, open_checkpoint, read_object
from jamba_server.engine.config import Quantization
from jamba_server.engine.convert.tensors import DTYPES, read_plain
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.model_config import JambaConfig, linear_modules
from jamba_server.engine.quantization import QuantizationPolicy, Role
from jamba_server.engine.quantization.converted import FORMATS_WRITTEN, settings
from jamba_server.engine.quantization.quantize import quantize
from jamba_server.engine.start.contents import read_model
from jamba_server.engine.weight_files import INDEX_FILE

_SHARD: Final = 2 << 30  # bytes of tensors in a file
_DOCUMENTS: Final = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def convert_to_folder(source: Path, target: Path, form: str) -> None:
    """Writes the checkpoint at `source` to the new folder `target`, with the weights that `--quantization` quantises in
    the format `form`. Raises CheckpointError if the checkpoint cannot be read."""
    checkpoint, config = open_checkpoint(source), read_model(source).config
    quantization = FORMATS_WRITTEN[form]
    values = read_object(checkpoint, "config.json") or {}
    values.pop("quantization", None)  # mlx-lm's name of the settings
    values |= {"quantization_config": settings(quantization), "tie_word_embeddings": config.tie_word_embeddings}
    target.mkdir()
    _write_shards(target, _quantized(read_plain(checkpoint, config), config, quantization))
    for name in _DOCUMENTS:
        if (data := checkpoint.document(name, MAX_TOKENIZER_BYTES)) is not None:
            (target / name).write_bytes(data)
    # The last file makes the folder a checkpoint, so a conversion that is interrupted leaves none behind.
    (target / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")


def _quantized(
    tensors: Iterator[tuple[str, Tensor]], config: JambaConfig, quantization: Quantization
) -> Iterator[tuple[str, Tensor]]:
    policy, dtype = QuantizationPolicy(quantization), DTYPES[config.dtype]
    roles: dict[str, Role] = {f"{name}.weight": role for name, role in linear_modules(config)}
    for name, tensor in tensors:
        role = roles.get(name)
        if role is None or policy.quantization_of(role) is None:
            yield name, tensor
            continue
        weight = quantize(tensor.to(dtype), quantization)
        yield f"{name}_scale", weight.scales
        if weight.bits == 4:
            yield f"{name}_packed", _packed(name, weight.values)
        else:
            yield name, weight.values


def _packed(name: str, values: Tensor) -> Tensor:
    """Returns int8 numbers from -8 to 7, [N, K], with two neighbours in each byte: uint8 [N, K / 2]. The first of the
    two is in the lower four bits."""
    if values.shape[-1] % 2:
        raise CheckpointError(
            f"Tensor {name} has an odd number of inputs, {values.shape[-1]}, which has no int4 format."
        )
    pairs = values.unflatten(-1, (-1, 2))
    return (pairs[..., 0] & 15 | pairs[..., 1] << 4).view(torch.uint8)


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Writes safetensors files of about _SHARD bytes each, and the index that lists their tensors."""
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    number = size = 0

    def write() -> None:
        nonlocal number, size
        number += 1
        name = f"model-{number:05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()
        size = 0

    for name, tensor in tensors:
        if size + tensor.nbytes > _SHARD and shard:
            write()
        shard[name] = tensor.contiguous().clone() if tensor.is_contiguous() else tensor.contiguous()
        size += tensor.nbytes
    write()
    index: dict[str, Any] = {"metadata": {}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
