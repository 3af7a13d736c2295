"""Fills a model with the weights of a checkpoint (safetensors files or a GGUF file), or with random numbers."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from jamba_server.engine.checkpoint import Checkpoint, open_checkpoint
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.in_file import InFile, not_finite
from jamba_server.engine.layers.parameter import Drawn, Fill, Raw, TensorMap, Unit
from jamba_server.engine.models import Model
from jamba_server.engine.pieces import Piece, cut
from jamba_server.engine.quantization import stored
from jamba_server.engine.read_ahead import ReadAhead
from jamba_server.engine.start.contents import HEAD
from jamba_server.engine.start.sources import open_weights
from jamba_server.engine.weight_files import listed
from jamba_server.kernels.ops import QuantizedWeight

# Maps the end of a tensor's name to the key of config.json that decides whether the model has tensors whose names end
# in this way.
_DECIDED_BY: Final = {
    "mamba.conv1d.bias": "mamba_conv_bias",
    "mamba.in_proj.bias": "mamba_proj_bias",
    "mamba.out_proj.bias": "mamba_proj_bias",
    HEAD: "tie_word_embeddings",
}
# How many random numbers are drawn at a time. On a CPU these numbers take 4 MiB in float32, and several arrays of this
# size fit into a CPU's cache. On a GPU they take 64 MiB, which is enough to occupy the GPU fully.
_CHUNK: Final = 1 << 20
_GPU_CHUNK: Final = 1 << 24
# The difference between the hash inputs of two successive random numbers: 2**32 / golden ratio, as int32. The
# difference is odd, so its multiples modulo 2**32 reach every int32.
_STEP: Final = 0x9E3779B9 - 2**32
_DT_RANGE: Final = (0.001, 0.1)  # Mamba's training begins with time steps in this range (Gu & Dao 2023, section 3.6)


def load_weights(
    model: Model, folder: Path, progress: Callable[[str, float], None], *, phase: str = "loading weights"
) -> None:
    """Fills `model` from the checkpoint at `folder`, tensor by tensor. A tensor is converted to the dtype of the memory
    that it fills: a matrix that the checkpoint has quantised stays in its format if the model has memory of this
    format.

    Weights that one kernel uses together (one matrix product, the experts of one layer) are quantised and packed as
    soon as all of these weights are read. The raw weights are then freed, so the model is never in memory twice.

    The function checks that every weight is filled exactly once, and that every tensor in the files is used or known to
    be superfluous (`read_model` warns of superfluous tensors that the user may expect to be used). If the model's head
    is tied to the embedding, the files may store the shared matrix under the name of the embedding or under the name of
    the head. If the files have both tensors, the function `read_model` has checked that the tensors are equal. The
    function `progress` is called about a hundred times with `phase` and the fraction of the bytes that are read. Raises
    CheckpointError if files are missing or truncated, or if their tensors do not match the model's configuration.
    """
    checkpoint, tensor_map = open_checkpoint(folder), model.tensor_map()
    source = open_weights(checkpoint, model.config, model.dtype)
    loader, done, shown = _Loader(tensor_map, checkpoint, source.aliases), 0, -1
    del tensor_map  # it has references to the raw weights, which must be freed one by one
    with ReadAhead(source.paths) as ahead:
        for name, weight, path, num_bytes in source.tensors:
            loader.put(name, weight, path)
            del weight  # the next weight is read into other memory
            done += num_bytes
            ahead.used(done)
            if (percent := 100 * done // source.num_bytes) > shown:
                shown = percent
                progress(phase, done / source.num_bytes)
    loader.check_complete()
    progress(phase, 1.0)


class _Waiting:
    """A group of weights that are packed together, while some checkpoint tensors of the group are not read yet. When
    all weights of the group are filled, the group is converted to the layout of its kernel, and the raw weights are
    freed."""

    def __init__(self, unit: Unit) -> None:
        self._unit: Unit | None = unit
        self._missing = set(unit.destinations)
        # Maps the name of a tensor in the files to the names of the model's weights that the tensor fills.
        self.parts = {name: (name,) for name in unit.destinations}
        self.parts |= {name: fused.parts for name, fused in unit.fused.items()}

    def destination(self, name: str) -> tuple[Raw, Piece | None]:
        """Returns the memory that the checkpoint tensor `name` fills, and the piece of the tensor that fills it."""
        assert self._unit is not None, "a tensor of a packed unit was read again"
        found = self._unit.fused.get(name) or self._unit.destinations[name]
        return found.data, found.piece

    def mark_filled(self, name: str) -> None:
        """Records that the checkpoint tensor `name` has been copied to the weights that it fills. If all weights of the
        group are filled now, they are packed. The caller must hold no reference to the tensor that the method
        `destination` returned, so that packing can free its memory."""
        self._missing.difference_update(self.parts[name])
        if not self._missing:
            assert self._unit is not None, "a unit may be packed only once"
            pack, self._unit = self._unit.pack, None
            pack()


class _Loader:
    """Copies tensors from the files into the model's weights and records which weights are filled. `aliases` maps the
    name of a tensor in the files to another name, under which the tensor is loaded."""

    def __init__(self, tensor_map: TensorMap, checkpoint: Checkpoint, aliases: Mapping[str, str]) -> None:
        self._aliases = aliases
        self._ignored, self._stage, self._folder = tensor_map.ignored, tensor_map.stage, checkpoint.path
        self._config = checkpoint.where("config.json")
        self._names = list(tensor_map.destinations)
        self._waiting = {name: unit for unit in map(_Waiting, tensor_map.units) for name in unit.parts}
        self._filled_by: dict[str, str] = {}  # maps the name of a weight to the name of the tensor that filled it

    def put(self, name: str, weight: Raw | InFile, path: Path) -> None:
        """Copies `weight` into the weights that it fills. Raises CheckpointError in three cases: the name of the tensor
        is unknown, the weights are filled already, or the tensor's shape, its dtype or one of its values is wrong."""
        name = self._aliases.get(name, name)
        if (unit := self._waiting.get(name)) is not None:
            self._account(unit.parts[name], name, path)
            self._fill(name, weight, *unit.destination(name), path)
            unit.mark_filled(name)
        elif name not in self._ignored and not self._stage.is_elsewhere(name):
            why = _decided_by([name], "without it")
            what = f"{name} {_shape(weight)}"
            raise CheckpointError(f"{path}: tensor {what} has no place in the model of {self._config}{why}.")

    def check_complete(self) -> None:
        if missing := [name for name in self._names if name not in self._filled_by]:
            count, why = f"{len(missing)} of {len(self._names)}", _decided_by(missing, "with it")
            raise CheckpointError(f"{self._folder}: {count} tensors are missing: {listed(missing)}{why}.")

    def _fill(self, name: str, weight: Raw | InFile, destination: Raw, piece: Piece | None, path: Path) -> None:
        self._check_shape(name, weight, destination, piece, path)
        if piece is not None:
            weight = weight.read_piece(piece) if isinstance(weight, InFile) else cut(weight, piece)
        if isinstance(weight, InFile):
            if weight.read_into(destination):
                return
            weight = weight.read()
        if isinstance(weight, QuantizedWeight):
            self._copy_quantized(name, weight, destination, path)
        else:
            self._copy(name, weight, destination, path)

    def _copy_quantized(self, name: str, weight: QuantizedWeight, destination: Raw, path: Path) -> None:
        """Copies a quantised matrix. It is dequantised if the model has memory of plain numbers for it."""
        if not all(_is_finite(part) for part in weight if isinstance(part, Tensor)):
            raise not_finite(path, name, weight)
        if isinstance(destination, QuantizedWeight):
            stored.fill(destination, weight)
            return
        stored.dequantize(weight, destination)
        if not _is_finite(destination):
            raise CheckpointError(f"{path}: tensor {name} holds numbers beyond the range of {destination.dtype}.")

    def _check_shape(self, name: str, weight: Raw | InFile, destination: Raw, piece: Piece | None, path: Path) -> None:
        expected = _shape(destination)
        if piece is not None:
            expected[piece.dim] = piece.size
        if (shape := _shape(weight)) != expected:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {shape}; {self._config} makes it {expected}"
                f"{_transposed(name, shape, expected)}."
            )

    def _copy(self, name: str, tensor: Tensor, destination: Raw, path: Path) -> None:
        assert isinstance(destination, Tensor), "a matrix that the checkpoint lists as quantised is read as such"
        if destination.dtype in (torch.float8_e4m3fn, torch.int8):
            if tensor.dtype != destination.dtype:
                raise CheckpointError(
                    f"{path}: tensor {name} has dtype {tensor.dtype}; by quantization_config of "
                    f"{self._config} it is {destination.dtype}."
                )
        # Integers and 8-bit floats are quantised weights, which are meaningless without their scales.
        elif not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise CheckpointError(
                f"{path}: tensor {name} has dtype {tensor.dtype}; floats of 16 bits or more are expected."
            )
        destination.copy_(tensor)
        if not _is_finite(destination):
            if destination.dtype == torch.float16 and _is_finite(tensor):
                raise CheckpointError(
                    f"{path}: tensor {name} holds numbers beyond float16's range; use --dtype bfloat16."
                )
            raise not_finite(path, name, destination)

    def _account(self, parts: Collection[str], name: str, path: Path) -> None:
        for part in parts:
            if part in self._filled_by:
                raise CheckpointError(
                    f"{path}: tensor {name} fills weights that tensor {self._filled_by[part]} has filled already."
                )
            self._filled_by[part] = name


def _is_finite(tensor: Tensor) -> bool:
    """Returns whether all numbers of `tensor` are finite. Only the minimum and the maximum are checked, because both
    are NaN if any number is NaN. This takes one pass over the tensor and needs no mask of the tensor's size. Integers
    are always finite."""
    if not tensor.dtype.is_floating_point:
        return True
    if tensor.dtype == torch.float8_e4m3fn:  # float8_e4m3fn has no infinity, and its NaN is the byte 0x7F or 0xFF
        return bool((tensor.view(torch.uint8) & 0x7F).amax() < 0x7F)
    return all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


def _values(weight: Raw) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.values


def _shape(weight: Raw | InFile) -> list[int]:
    return list(weight.shape if isinstance(weight, InFile) else _values(weight).shape)


def _decided_by(names: Collection[str], how: str) -> str:
    """Returns the end of an error text, which names the key of config.json that decides whether a model has one of the
    tensors `names`. The argument `how` completes the sentence "KEY in config.json makes a model ...": it is "with it"
    if the file must have the tensor, and "without it" if the file must not have it."""
    keys = [key for end, key in _DECIDED_BY.items() if any(name.endswith(end) for name in names)]
    return f"; {keys[0]} in config.json makes a model {how}" if keys else ""


def _transposed(name: str, shape: list[int], expected: list[int]) -> str:
    """Returns the end of an error text if the last two dimensions of a convolution weight are swapped, as in
    checkpoints for MLX. Returns an empty text otherwise."""
    if name.endswith("conv1d.weight") and len(shape) == 3 and [shape[0], shape[2], shape[1]] == expected:
        return "; MLX stores it in this shape: serve the checkpoint from which the MLX one was converted"
    return ""


def dummy_weights(model: Model, seed: int) -> None:
    """Fills `model` with random weights that keep activations finite. The same seed gives the same weights on every
    machine.

    The numbers of a tensor depend only on the seed and on the tensor's name, so models of one shape have equal weights
    on all devices, and in all dtypes up to rounding. The numbers are drawn on the model's device. The weights are
    quantised and packed as in `load_weights`.
    """
    tensor_map = model.tensor_map()
    units, drawn = deque(tensor_map.units), tensor_map.drawn
    del tensor_map  # it has references to the raw weights, which must be freed one by one
    devices = [_values(data).device for unit in units for data, *_ in unit.destinations.values()]
    # Raw weights that will be quantised are in host memory. If the model runs on a GPU, these weights are drawn and
    # quantised on the GPU, which does both much faster than a CPU. Copying them to the host and back would take most of
    # the time that a large model needs to load.
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    while units:
        pack = fill_unit(units.popleft(), seed, device, drawn)
        pack()


def fill_unit(unit: Unit, seed: int, device: torch.device, drawn: Drawn) -> Callable[[], None]:
    """Fills the tensors of `unit` and returns its `pack` function. The caller must drop its own reference to the unit
    before it calls `pack`, so that the raw weights can be freed. Tensors in the memory of another device are not
    filled: tensors on `device` that take their place are added to `drawn`. A rank draws whole tensors and keeps its
    pieces of them."""
    for name, (data, fill, piece) in unit.destinations.items():
        assert isinstance(data, Tensor), "a model with dummy weights keeps no quantised matrices of a checkpoint"
        if data.device != device:
            data = _stand_in(data, device, drawn)
        key = struct.unpack("<2i", hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest())
        if piece is None:
            _fill(data, fill, key, device)
            continue
        shape = list(data.shape)
        shape[piece.dim] = piece.size
        _fill(whole := data.new_empty(shape), fill, key, device)
        data.copy_(piece.cut_tensor(whole))
    return unit.pack


def _stand_in(data: Tensor, device: torch.device, drawn: Drawn) -> Tensor:
    """Returns a tensor on `device` with the shape and the strides of `data`, a view of a raw weight on the host. The
    views of one raw weight share memory on `device` as they do on the host."""
    storage = data.untyped_storage()
    if storage.data_ptr() not in drawn:
        size = storage.nbytes() // data.itemsize
        drawn[storage.data_ptr()] = torch.empty(size, dtype=data.dtype, device=device)
    return drawn[storage.data_ptr()].as_strided(data.shape, data.stride(), data.storage_offset())


def _fill(data: Tensor, fill: Fill, key: tuple[int, ...], device: torch.device) -> None:
    match fill:
        case "one":
            data.fill_(1.0)
        case "a_log":
            data.copy_(torch.arange(1, data.shape[-1] + 1).log())
        case "dt_bias":
            low, high = map(math.log, _DT_RANGE)
            # The biases of dt_proj are drawn on the CPU, because a GPU rounds exp and log differently from a CPU. A
            # model has only few such biases.
            fill_uniform(logs := torch.empty(data.shape), (high - low) / 2, key, logs.device)
            data.copy_((logs + (high + low) / 2).exp().expm1().log())  # log(expm1(t)) is the inverse of softplus
        case "normed":
            fill_uniform(data, math.sqrt(3 / data.shape[-1]), key, device)
        case "unit":
            fill_uniform(data, math.sqrt(3), key, device)


def fill_uniform(data: Tensor, bound: float, key: tuple[int, ...], device: torch.device) -> None:
    """Fills `data` with uniform random numbers in [-bound, bound], whose variance is bound**2 / 3. Each number is a
    constant times an integer hash of `key` and the index of the number, so the number is the same on all devices. The
    numbers are drawn in chunks on `device`, so that memory never holds a second copy of a big tensor."""
    width = data.numel() // len(data)
    rows = min(len(data), max(1, (_CHUNK if device.type == "cpu" else _GPU_CHUNK) // width))
    steps = torch.arange(rows * width, dtype=torch.int32, device=device) * _STEP
    bits, scratch = torch.empty_like(steps), torch.empty_like(steps)
    numbers = torch.empty(rows * width, device=device)
    start = 0
    for part in data.split(rows):
        if (count := part.numel()) < len(bits):
            steps, bits, scratch, numbers = steps[:count], bits[:count], scratch[:count], numbers[:count]
        _scramble(torch.add(steps, _int32(start * _STEP + key[0]), out=bits), key[1], scratch)
        numbers.copy_(bits).mul_(bound * 2.0**-31)
        # Numbers that go to another device are first rounded to the dtype of `data`, so that fewer bytes are copied.
        part.copy_((numbers if part.device == device else numbers.to(part.dtype)).view(part.shape))
        start += count


def _scramble(bits: Tensor, key: int, scratch: Tensor) -> None:
    """Replaces every int32 in `bits` by its hash. The hash is lowbias32 (Wellons 2018) without its last step, which
    improves only the lowest bits. `key` is mixed in between the two multiplications; if it were only added to the
    input, the random sequences of all keys would be sections of one long sequence."""
    for shift, factor in ((16, 0x7FEB352D), (15, _int32(0x846CA68B))):
        # The right shift inserts copies of the sign bit. The mask in the next statement clears these copies.
        torch.bitwise_right_shift(bits, shift, out=scratch)
        bits.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
        if shift == 16:
            bits.bitwise_xor_(key)


def _int32(number: int) -> int:
    """Returns `number` wrapped around to the range of int32."""
    return (number + 2**31) % 2**32 - 2**31
