"""Reads the tensors of a checkpoint, whatever the format of its files. To add a format, add a line to `_READERS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from jamba_server.engine.checkpoint import Checkpoint, Folder
from jamba_server.engine.gguf.checkpoint import GgufCheckpoint
from jamba_server.engine.gguf.weights import read_tensors
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.quantization.stored import Read
from jamba_server.engine.start import quantized_folder
from jamba_server.engine.start.contents import EMBEDDING, HEAD
from jamba_server.engine.start.quantized_folder import read_file
from jamba_server.engine.weight_files import header, weight_files


class Source(NamedTuple):
    """The tensors of a checkpoint, which take `num_bytes` bytes in its files. `aliases` maps the name of a tensor to
    the name under which the tensor is loaded."""

    tensors: Iterator[Read]
    num_bytes: int
    aliases: Mapping[str, str] = {}


def open_weights(checkpoint: Checkpoint, config: JambaConfig, dtype: torch.dtype) -> Source:
    """Returns the tensors of a checkpoint under the names of a Hugging Face folder. The matrices that the checkpoint's
    method `stored` lists are yielded as they are stored, one by one. A reader is allowed to convert other matrices to
    `dtype`. Raises CheckpointError if files are missing or damaged."""
    return _READERS[type(checkpoint)](checkpoint, config, dtype)


def _from_gguf(checkpoint: GgufCheckpoint, config: JambaConfig, dtype: torch.dtype) -> Source:
    size = sum(tensor.num_bytes for tensor in checkpoint.file.tensors.values())
    return Source(read_tensors(checkpoint.file, dtype), size)


def _from_folder(checkpoint: Folder, config: JambaConfig, dtype: torch.dtype) -> Source:
    paths = weight_files(checkpoint.path)
    tied = config.tie_word_embeddings and not config.is_classifier
    aliases = {} if not tied or any(EMBEDDING in header(path) for path in paths) else {HEAD: EMBEDDING}
    if (layout := checkpoint.layout()) is not None:
        return Source(quantized_folder.read_tensors(paths, layout), sum(path.stat().st_size for path in paths), aliases)
    tensors = (
        Read(*_unpacked(name, tensor), path, tensor.nbytes) for path in paths for name, tensor in read_file(path)
    )
    return Source(tensors, sum(path.stat().st_size for path in paths), aliases)


# Maps the class of a checkpoint to the function that reads its tensors.
_READERS: Final[Mapping[type[Checkpoint], Callable[[Any, JambaConfig, torch.dtype], Source]]] = {
    GgufCheckpoint: _from_gguf,
    Folder: _from_folder,
}


def _unpacked(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """Returns the name of a weight and its tensor. If the tensor in the file packs two 4-bit numbers into each byte,
    they are unpacked: the result has one number in each byte. Every other tensor is returned unchanged."""
    if tensor.dtype != torch.uint8 or not name.endswith(".weight_packed"):
        return name, tensor
    signed = tensor.view(torch.int8)
    # Both shifts copy the sign bit of the number.
    low, high = signed << 4 >> 4, signed >> 4
    return name.removesuffix("_packed"), torch.stack([low, high], dim=-1).flatten(-2)
