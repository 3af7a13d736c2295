"""Says in which formats the kernels can multiply by the matrices of a GGUF file as they are stored."""

from __future__ import annotations

from collections.abc import Mapping

from jamba_server.engine.gguf.blocks import BlockType
from jamba_server.engine.gguf.names import translated
from jamba_server.engine.gguf.reader import GgufFile
from jamba_server.engine.quantization import Format
from jamba_server.engine.quantization.blocks import StoredMatrix


def stored_matrices(file: GgufFile) -> Mapping[str, StoredMatrix]:
    """Returns the quantised matrices of a file by their Hugging Face names, one for each expert."""
    stored: dict[str, StoredMatrix] = {}
    for tensor in file.tensors.values():
        name = translated(tensor.name)
        if name is None or tensor.kind.unpack is None:
            continue
        count = tensor.shape[0] if "{}" in name else 1
        numbers = tensor.data.nbytes // tensor.kind.num_bytes * tensor.kind.inputs // count
        entry = StoredMatrix(tensor.kind.name, _format(tensor.kind), numbers, tensor.data.nbytes // count)
        stored |= {name.format(number): entry for number in range(count)}
    return stored


def _format(kind: BlockType) -> Format | None:
    """Returns the format of the values and scales that the blocks of a type hold, or None if they hold offsets too."""
    if kind.has_offset:
        return None
    return Format(bits=kind.bits, limit=7 if kind.bits == 4 else 127, group_size=kind.group)
