"""Converts a checkpoint to a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from jamba_server.engine.checkpoint import open_checkpoint
from jamba_server.engine.convert.encode import encode, type_for
from jamba_server.engine.convert.gguf_file import Encoded, write_gguf
from jamba_server.engine.convert.metadata import make_metadata
from jamba_server.engine.convert.tensors import read_plain
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.gguf.names import stored_name
from jamba_server.engine.start.contents import read_model


def convert_to_gguf(source: Path, target: Path, kind: str) -> None:
    """Writes the checkpoint at `source` to the GGUF file `target`, with matrices of the type `kind`. Raises
    CheckpointError if the checkpoint cannot be read, or has something that a GGUF file cannot hold."""
    checkpoint, config = open_checkpoint(source), read_model(source).config
    if config.is_classifier or config.mamba_proj_bias:
        what = "a classifier" if config.is_classifier else "a model with biases of the Mamba projections"
        raise CheckpointError(f"{source} is {what}, which llama.cpp does not run in a GGUF file.")
    metadata = make_metadata(config, checkpoint, kind, source.stem)
    write_gguf(target, metadata, _encoded(read_plain(checkpoint, config), kind, config.num_experts))


def _encoded(tensors: Iterator[tuple[str, Tensor]], kind: str, num_experts: int) -> Iterator[Encoded]:
    """Yields the tensors of a file. The experts of a layer are kept until all have come, and become one tensor."""
    waiting: dict[str, dict[int, Encoded]] = {}
    for name, tensor in tensors:
        own, expert = stored_name(name)
        encoded = _encode(own, tensor, kind)
        if expert is None:
            yield encoded
            continue
        parts = waiting.setdefault(own, {})
        parts[expert] = encoded
        if len(parts) == num_experts:
            del waiting[own]
            shape = (num_experts, *encoded.shape)
            yield Encoded(own, encoded.kind, shape, b"".join(parts[number].data for number in range(num_experts)))


def _encode(name: str, tensor: Tensor, kind: str) -> Encoded:
    numbers = tensor.float()
    if name.endswith(".ssm_conv1d.weight"):
        numbers = numbers.squeeze(1)
    elif name.endswith(".ssm_a"):
        numbers = -numbers.exp()
    shape: tuple[int, ...] = tuple(numbers.shape)
    # As llama.cpp's converter does: vectors, the convolution, A and the router stay in float32.
    is_plain = len(shape) < 2 or name.endswith((".ssm_conv1d.weight", ".ssm_a", ".ffn_gate_inp.weight"))
    # The errors of four bits in the embedding and the head would be too large.
    wanted = "Q8_0" if kind == "Q4_0" and name in ("token_embd.weight", "output.weight") else kind
    own = "F32" if is_plain else type_for(wanted, numbers.shape[-1])
    return Encoded(name, own, shape, encode(own, numbers.numpy()))
