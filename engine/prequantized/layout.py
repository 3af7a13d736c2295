"""What a loader returns for a folder: which matrices are quantised, and how each is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.prequantized.settings import Settings
from jamba_server.engine.quantization import Format
from jamba_server.engine.quantization.blocks import StoredMatrix
from jamba_server.engine.weight_files import StoredTensor

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = Mapping[str, StoredTensor]
"""The tensors of all files of a folder by their names."""


class Numbers(NamedTuple):
    """A quantised matrix with N rows of K inputs: integers [N, K] in int8 or uint8, and scales [N, G], one for each of
    G groups of inputs. Zeros and offsets have the scales' shape. `kernels.ops.QuantizedWeight` says what they mean."""

    values: Array
    scales: Array
    zeros: Array | None = None
    offsets: Array | None = None


class Matrix(NamedTuple):
    """A quantised matrix of a folder. `tensors` are the tensors in the files that it consists of. `read` returns the
    numbers as they are stored, or the dequantised float32 matrix [N, K] if `stored` has no format."""

    stored: StoredMatrix
    tensors: tuple[str, ...]
    read: Callable[[], Numbers | Array]


class Plain(NamedTuple):
    """A weight that is not quantised, but is stored under a name or in a shape of its own. `read` returns the weight as
    float32. `tensor` is the name of the tensor in the files."""

    tensor: str
    read: Callable[[], Array]


class Layout(NamedTuple):
    """The contents of a folder. The keys of `matrices` and `plain` are the names of weights in a checkpoint of Hugging
    Face's format. Tensors that no entry mentions are loaded as they are, but those in `unused` are not loaded. `notes`
    says in sentences without a full stop what differs from what other servers compute with the folder."""

    matrices: Mapping[str, Matrix]
    plain: Mapping[str, Plain] = {}
    unused: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()


class Loader(Protocol):
    """The interface of a module for one method. `MARKS` are ends of names of tensors. A quantised module has a tensor
    of one of these names."""

    @property
    def MARKS(self) -> tuple[str, ...]: ...  # noqa: N802

    def recognises(self, settings: Settings) -> bool:
        """Returns whether the settings are those of the method."""
        ...

    def layout(self, settings: Settings, tensors: Tensors) -> Layout:
        """Returns what the tensors of a folder hold. There are no tensors if the weight files are absent. Raises
        CheckpointError for settings that this server does not support, and for tensors that do not fit to them."""
        ...

    def usual(self, settings: Settings, module: str) -> tuple[str, Format]:
        """Returns the name and the format of a quantised matrix, as far as the settings tell them. The settings are
        those of a folder for which `layout` raises no error."""
        ...


def require(tensors: Tensors, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> StoredTensor:
    """Returns the tensor `name`. Raises CheckpointError if it is missing, or if it lacks one of `dtypes` (as
    safetensors names them) or the `shape`, in which None stands for any size."""
    tensor = tensors.get(name)
    if tensor is None:
        module = name.rpartition(".")[0]
        path = next(stored.path for other, stored in tensors.items() if other.startswith(module))
        raise CheckpointError(f"{path}: tensor {name} is missing, although other parts of this weight are there.")
    fits = len(shape) == len(tensor.shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if tensor.dtype not in dtypes or not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise CheckpointError(
            f"{tensor.path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}; {' or '.join(dtypes)} [{sizes}] is "
            "expected."
        )
    return tensor
