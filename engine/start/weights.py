"""Fills a model: from the safetensors of a checkpoint folder, or with random numbers."""

from __future__ import annotations

import hashlib
import math
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.layers.parameter import Fill, TensorMap, Unit
from jamba_server.engine.models import Model
from jamba_server.engine.start.contents import EMBEDDING, HEAD, header, incomplete, listed, weight_files

# The end of a tensor's name -> the key of config.json that decides whether the model has it.
_DECIDED_BY: Final = {
    "mamba.conv1d.bias": "mamba_conv_bias",
    "mamba.in_proj.bias": "mamba_proj_bias",
    "mamba.out_proj.bias": "mamba_proj_bias",
    HEAD: "tie_word_embeddings",
}
_CHUNK: Final = 1 << 20  # random numbers made at a time: 4 MiB in float32, of which a CPU's caches hold a few
_STEP: Final = 0x9E3779B9 - 2**32  # odd: 2**32 steps reach every int32 (2**32 / golden ratio, as int32)
_DT_RANGE: Final = (0.001, 0.1)  # time steps at the start of Mamba's training (Gu & Dao 2023, section 3.6)


def load_weights(
    model: Model, folder: Path, progress: Callable[[str, float], None], *, phase: str = "loading weights"
) -> None:
    """Fills `model` from `folder`, tensor by tensor through memory-mapped files, in the model's dtypes.

    What the kernels take together (one matrix product, the experts of one layer) is quantised and packed as soon as its
    last tensor has come, and the raw weights are let go: the model is never in memory twice.

    Proves that every weight is filled exactly once and that every tensor in the files is used or known to be of no use
    (`read_model` has words for those that somebody may miss). A tied model takes its one matrix under either name;
    that both are equal where both are there has been seen by `read_model`.
    `progress` gets (`phase`, fraction of the bytes) about a hundred times. Raises CheckpointError with one sentence for
    a folder that is missing, truncated, foreign or incomplete.
    """
    paths = weight_files(folder)
    tied = model.config.tie_word_embeddings and not model.config.is_classifier
    aliases = {} if not tied or any(EMBEDDING in header(path) for path in paths) else {HEAD: EMBEDDING}
    loader = _Loader(model.tensor_map(), folder, aliases)
    total, done, shown = sum(path.stat().st_size for path in paths), 0, -1
    for path in paths:
        for name, tensor in _read(path):
            loader.put(name, tensor, path)
            done += tensor.nbytes
            if (percent := 100 * done // total) > shown:
                shown = percent
                progress(phase, done / total)
    loader.check_complete()
    progress(phase, 1.0)


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file. They are views of the mapped file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names: list[str] = file.keys()
            for name in names:
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise incomplete(path, error) from error


class _Waiting:
    """A unit of the model until all of its tensors have come. Then it is packed, and its raw weights are let go."""

    def __init__(self, unit: Unit) -> None:
        self._unit: Unit | None = unit
        self._missing = set(unit.destinations)
        # what a tensor in the file fills, by the names of destinations
        self.parts = {name: (name,) for name in unit.destinations}
        self.parts |= {name: fused.parts for name, fused in unit.fused.items()}

    def data(self, name: str) -> Tensor:
        assert self._unit is not None, "nothing comes twice"
        unit = self._unit
        return unit.fused[name].data if name in unit.fused else unit.destinations[name].data

    def mark_filled(self, name: str) -> None:
        """Nobody else may hold any of the unit's `data` now."""
        self._missing.difference_update(self.parts[name])
        if not self._missing:
            assert self._unit is not None, "a unit is packed once"
            pack, self._unit = self._unit.pack, None
            pack()


class _Loader:
    """Copies tensors to where they belong and keeps account of them. `aliases` are names in the files by which they are
    loaded as something else."""

    def __init__(self, tensor_map: TensorMap, folder: Path, aliases: Mapping[str, str]) -> None:
        self._aliases = aliases
        self._ignored, self._folder = tensor_map.ignored, folder
        self._names = list(tensor_map.destinations)
        self._waiting = {name: unit for unit in map(_Waiting, tensor_map.units) for name in unit.parts}
        self._filled_by: dict[str, str] = {}  # destination -> the tensor that filled it

    def put(self, name: str, tensor: Tensor, path: Path) -> None:
        """Raises CheckpointError for a tensor that is unknown, misshapen, of a strange dtype, or one too many."""
        name = self._aliases.get(name, name)
        if (unit := self._waiting.get(name)) is not None:
            self._account(unit.parts[name], name, path)
            self._copy(name, tensor, unit.data(name), path)
            unit.mark_filled(name)
        elif name not in self._ignored:
            where, why = self._folder / "config.json", _decided_by([name], "without it")
            raise CheckpointError(f"{path}: tensor {name} {_shape(tensor)} has no place in the model of {where}{why}.")

    def check_complete(self) -> None:
        if missing := [name for name in self._names if name not in self._filled_by]:
            count, why = f"{len(missing)} of {len(self._names)}", _decided_by(missing, "with it")
            raise CheckpointError(f"{self._folder}: {count} tensors are missing: {listed(missing)}{why}.")

    def _copy(self, name: str, tensor: Tensor, destination: Tensor, path: Path) -> None:
        if tensor.shape != destination.shape:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {_shape(tensor)}; {self._folder / 'config.json'} makes it "
                f"{_shape(destination)}{_transposed(name, tensor, destination)}."
            )
        if destination.dtype == torch.float8_e4m3fn:
            if tensor.dtype != destination.dtype:
                raise CheckpointError(
                    f"{path}: tensor {name} has dtype {tensor.dtype}; by quantization_config of "
                    f"{self._folder / 'config.json'} it is {destination.dtype}."
                )
        # Narrower floats and integers are quantised weights, worth nothing without their scales.
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
            raise CheckpointError(f"{path}: tensor {name} holds numbers that are infinite or none (NaN).")

    def _account(self, parts: Collection[str], name: str, path: Path) -> None:
        for part in parts:
            if part in self._filled_by:
                raise CheckpointError(f"{path}: tensor {name} holds what {self._filled_by[part]} has filled already.")
            self._filled_by[part] = name


def _is_finite(tensor: Tensor) -> bool:
    """By the extremes, which NaN counts as: in one pass and without a mask of the tensor's size."""
    if tensor.dtype == torch.float8_e4m3fn:  # which has no infinity, and one NaN
        return bool((tensor.view(torch.uint8) & 0x7F).amax() < 0x7F)
    return all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _decided_by(names: Collection[str], how: str) -> str:
    """The key of config.json that makes the model what it is, `how`, in respect of one of these tensors."""
    keys = [key for end, key in _DECIDED_BY.items() if any(name.endswith(end) for name in names)]
    return f"; {keys[0]} in config.json makes a model {how}" if keys else ""


def _transposed(name: str, tensor: Tensor, destination: Tensor) -> str:
    """MLX has a convolution's inputs last."""
    if name.endswith("conv1d.weight") and tensor.ndim == 3 and tensor.mT.shape == destination.shape:
        return "; MLX stores it so: serve the checkpoint that this conversion was made from"
    return ""


def dummy_weights(model: Model, seed: int) -> None:
    """Fills `model` with random weights that keep activations finite, the same ones for a seed on every machine.

    Each tensor's numbers follow from the seed and its name, so that models of one shape agree across dtypes (up to
    rounding) and devices. They are drawn where the model is. Quantised and packed as `load_weights` does.
    """
    units = deque(model.tensor_map().units)
    devices = [data.device for unit in units for data, _ in unit.destinations.values()]
    # raw weights that will be quantised wait in the host's memory, which is no place to draw billions of numbers
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    while units:
        pack = _fill_unit(units.popleft(), seed, device)
        pack()


def _fill_unit(unit: Unit, seed: int, device: torch.device) -> Callable[[], None]:
    """Returns its `pack`, to be called when nobody holds the unit's raw weights any longer."""
    for name, (data, fill) in unit.destinations.items():
        key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        _fill(data, fill, struct.unpack("<2i", key), device)
    return unit.pack


def _fill(data: Tensor, fill: Fill, key: tuple[int, ...], device: torch.device) -> None:
    match fill:
        case "one":
            data.fill_(1.0)
        case "a_log":
            data.copy_(torch.arange(1, data.shape[-1] + 1).log())
        case "dt_bias":
            low, high = map(math.log, _DT_RANGE)
            # few numbers, and functions that a GPU rounds otherwise
            fill_uniform(logs := torch.empty(data.shape), (high - low) / 2, key, logs.device)
            data.copy_((logs + (high + low) / 2).exp().expm1().log())  # the inverse of softplus
        case "normed":
            fill_uniform(data, math.sqrt(3 / data.shape[-1]), key, device)
        case "unit":
            fill_uniform(data, math.sqrt(3), key, device)


def fill_uniform(data: Tensor, bound: float, key: tuple[int, ...], device: torch.device) -> None:
    """Uniform in [-bound, bound], of variance bound**2 / 3: a hash of key and index decides every number, in integers
    and in one product, so that it is the same on all devices. In chunks, so that a big tensor exists once."""
    width = data.numel() // len(data)
    rows = min(len(data), max(1, _CHUNK // width))
    steps = torch.arange(rows * width, dtype=torch.int32, device=device) * _STEP
    bits, scratch = torch.empty_like(steps), torch.empty_like(steps)
    numbers = torch.empty(rows * width, device=device)
    start = 0
    for part in data.split(rows):
        if (count := part.numel()) < len(bits):
            steps, bits, scratch, numbers = steps[:count], bits[:count], scratch[:count], numbers[:count]
        _scramble(torch.add(steps, _int32(start * _STEP + key[0]), out=bits), key[1], scratch)
        numbers.copy_(bits).mul_(bound * 2.0**-31)
        # only what goes elsewhere is rounded before: half the bytes
        part.copy_((numbers if part.device == device else numbers.to(part.dtype)).view(part.shape))
        start += count


def _scramble(bits: Tensor, key: int, scratch: Tensor) -> None:
    """A hash of every int32 in place (lowbias32, Wellons 2018, less its last step, which is for the lowest bits).
    Between its products comes a key, since without one all keys' sequences would be pieces of a single one."""
    for shift, factor in ((16, 0x7FEB352D), (15, _int32(0x846CA68B))):
        torch.bitwise_right_shift(bits, shift, out=scratch)  # with copies of the sign, which the mask takes away
        bits.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1)).mul_(factor)
        if shift == 16:
            bits.bitwise_xor_(key)


def _int32(number: int) -> int:
    """What int32 arithmetic makes of it."""
    return (number + 2**31) % 2**32 - 2**31
