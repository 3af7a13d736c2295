"""Says in which formats the kernels can multiply by the matrices of a GGUF file as they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from jamba_server.engine.gguf.blocks import SUPER_BLOCK, BlockType
from jamba_server.engine.gguf.names import translated
from jamba_server.engine.gguf.reader import GgufFile, GgufTensor
from jamba_server.engine.quantization import Format
from jamba_server.engine.quantization.blocks import StoredMatrix

# The ends of the names of tensors that have two dimensions but are no matrices.
_NO_MATRICES: Final = (".ssm_conv1d.weight", ".ssm_a")


def stored_matrices(file: GgufFile) -> Mapping[str, StoredMatrix]:
    """Returns the quantised matrices of a file by their Hugging Face names, one for each expert."""
    stored: dict[str, StoredMatrix] = {}
    for tensor in file.tensors.values():
        name = translated(tensor.name)
        if name is None or not is_quantized_matrix(tensor):
            continue
        count = tensor.shape[0] if "{}" in name else 1
        numbers = tensor.num_bytes // tensor.kind.num_bytes * tensor.kind.inputs // count
        entry = StoredMatrix(tensor.kind.name, format_of(tensor.kind), numbers, tensor.num_bytes // count)
        stored |= {name.format(number): entry for number in range(count)}
    return stored


def is_quantized_matrix(tensor: GgufTensor) -> bool:
    """Returns whether a tensor is a matrix, or the matrices of all experts, in a block type. The convolution and A are
    no matrices, although they have two dimensions."""
    return tensor.kind.unpack is not None and len(tensor.shape) > 1 and not tensor.name.endswith(_NO_MATRICES)


def format_of(kind: BlockType) -> Format:
    """Returns the format of the values, scales and offsets that the blocks of a type hold."""
    return Format(
        bits=kind.bits,
        limit=kind.limit,
        group_size=kind.group,
        scale="two_levels" if kind.inputs == SUPER_BLOCK else "float16",
        is_unsigned=kind.has_offset or kind.table is not None,
        has_offset=kind.has_offset,
        table=kind.table,
    )
