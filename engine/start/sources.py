"""Reads the tensors of a checkpoint, whatever the format of its files. To add a format, add a line to `_READERS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from jamba_server.engine.checkpoint import Checkpoint, Folder
from jamba_server.engine.gguf.checkpoint import GgufCheckpoint
from jamba_server.engine.gguf.weights import read_tensors
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.quantization.stored import Read
from jamba_server.engine.start import quantized_folder
from jamba_server.engine.start.contents import EMBEDDING, HEAD
from jamba_server.engine.start.safetensors_file import read_file
from jamba_server.engine.weight_files import header, weight_files


class Source(NamedTuple):
    """The tensors of a checkpoint, which take `num_bytes` bytes in its files. The files `paths` are read one after the
    other, each from its start to its end. `aliases` maps the name of a tensor to
    the name under which the tensor is loaded."""

    tensors: Iterator[Read]
    num_bytes: int
    paths: Sequence[Path]
    aliases: Mapping[str, str] = {}


def open_weights(checkpoint: Checkpoint, config: JambaConfig, dtype: torch.dtype) -> Source:
    """Returns the tensors of a checkpoint under the names of a Hugging Face folder. The matrices that the checkpoint's
    method `stored` lists are yielded as they are stored, one by one. A reader is allowed to convert other matrices to
    `dtype`. Raises CheckpointError if files are missing or damaged."""
    return _READERS[type(checkpoint)](checkpoint, config, dtype)


def _from_gguf(checkpoint: GgufCheckpoint, config: JambaConfig, dtype: torch.dtype) -> Source:
    size = sum(tensor.num_bytes for tensor in checkpoint.file.tensors.values())
    paths = dict.fromkeys(tensor.path for tensor in checkpoint.file.tensors.values())
    return Source(read_tensors(checkpoint.file, dtype), size, tuple(paths))


def _from_folder(checkpoint: Folder, config: JambaConfig, dtype: torch.dtype) -> Source:
    paths = weight_files(checkpoint.path)
    tied = config.tie_word_embeddings and not config.is_classifier
    aliases = {} if not tied or any(EMBEDDING in header(path) for path in paths) else {HEAD: EMBEDDING}
    layout, size = checkpoint.layout(), sum(path.stat().st_size for path in paths)
    if layout is not None:
        return Source(quantized_folder.read_tensors(paths, layout), size, paths, aliases)
    return Source((read for path in paths for read in read_file(path)), size, paths, aliases)


# Maps the class of a checkpoint to the function that reads its tensors.
_READERS: Final[Mapping[type[Checkpoint], Callable[[Any, JambaConfig, torch.dtype], Source]]] = {
    GgufCheckpoint: _from_gguf,
    Folder: _from_folder,
}
