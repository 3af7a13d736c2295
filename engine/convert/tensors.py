"""Reads the tensors of a checkpoint for a conversion: one by one, under the names of a Hugging Face folder, with one
tensor for each expert."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from jamba_server.engine.checkpoint import Checkpoint
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.quantization import stored
from jamba_server.engine.start.sources import open_weights
from jamba_server.kernels.ops import QuantizedWeight

DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Tensors that transformers 5 writes for all experts of a layer together.
_FUSED: Final = re.compile(r"(.*\.experts\.)(gate_up_proj|down_proj)")
_UNUSED: Final = ("score.weight", ".rotary_emb.inv_freq")


def read_plain(checkpoint: Checkpoint, config: JambaConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that the model uses. Matrices of a GGUF file are converted to the model's dtype. Raises
    CheckpointError for a checkpoint that is quantised in another way, and for numbers that are not finite."""
    if config.quantized_roles:
        raise CheckpointError(f"{checkpoint.path} has quantised weights already; convert the original checkpoint.")
    source = open_weights(checkpoint, config, DTYPES[config.dtype])
    for read in source.tensors:
        name, path, weight = read.name, read.path, read.loaded
        tensor = _plain(weight, DTYPES[config.dtype]) if isinstance(weight, QuantizedWeight) else weight
        own = source.aliases.get(name, name)
        if own.endswith(_UNUSED) or (own == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise CheckpointError(f"{path}: tensor {name} has dtype {tensor.dtype}; plain numbers are expected.")
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: tensor {name} holds values that are infinite or not a number (NaN).")
        yield from _unfused(own, tensor)


def _plain(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(weight.values.shape, dtype=dtype)
    stored.dequantize(weight, tensor)
    return tensor


def _unfused(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if (match := _FUSED.fullmatch(name)) is None:
        yield name, tensor
        return
    for number, weight in enumerate(tensor):
        if match[2] == "down_proj":
            yield f"{match[1]}{number}.down_proj.weight", weight
            continue
        gate, up = weight.chunk(2)
        yield f"{match[1]}{number}.gate_proj.weight", gate
        yield f"{match[1]}{number}.up_proj.weight", up
