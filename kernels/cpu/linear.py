"""This op multiplies inputs by a packed weight matrix in compiled code. The results are batch-invariant."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jamba_server.kernels.arguments import refuse, require
from jamba_server.kernels.cpu.arguments import units, whole
from jamba_server.kernels.cpu.library import DTYPES, INT, POINTER, library
from jamba_server.kernels.ops import QuantizedWeight, Weight

_HUGE_PAGE = 2 << 20
# The int4 kernels process 8 elements along K at once. The number of elements that share one scale must therefore be a
# multiple of 8, unless a whole row shares one scale.
_STEP = 8
_FP8 = -8  # This value of the library's argument `bits` means that a weight has the dtype float8_e4m3fn.


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Contains one or more weights [N, K], packed in panels of 32 rows. `src/gemm.h` describes the layout of a panel.

    For a weight that is not quantised, `dtype` is the dtype of the weight and of x, and `bits` and `group_size` are 0.
    A quantised weight has the `dtype` None, because x may have any of the library's dtypes. It has `bits` bits per
    element (-8 means float8_e4m3fn) and one scale for each group of `group_size` elements along K. `matrices` is the
    number of weights [N, K] (1, or the number of experts) that `panels` contains, one after the other.
    """

    panels: Tensor
    rows: int
    inputs: int
    dtype: torch.dtype | None
    bits: int = 0
    group_size: int = 0
    matrices: int = 1

    def check(self, x: Tensor) -> None:
        """Raises ValueError unless x has the dtype and the row length that this weight requires."""
        units("x", x, x.dtype if self.dtype is None else self.dtype, (x.shape[0], self.inputs))


class Packer:
    """Packs weights into panels of 32 rows. Packed weights of at least 2 MiB are stored in huge pages of memory."""

    def __init__(self) -> None:
        native = library()
        self._packed_bytes = native.function("packed_bytes", INT, INT, INT, result=INT)
        self._packed_quantized_bytes = native.function("packed_quantized_bytes", INT, INT, INT, INT, result=INT)
        self._use_huge_pages = native.function("use_huge_pages", POINTER, INT)
        self._pack = native.function("pack_weight", POINTER, POINTER, INT, INT, INT)
        self._pack_quantized = native.function("pack_quantized", POINTER, POINTER, POINTER, INT, INT, INT, INT)

    def __call__(self, weight: Weight) -> PackedWeight:
        """Packs a weight [N, K], or E weights [E, N, K]. The panels of the E weights are stored one after the other."""
        if isinstance(weight, QuantizedWeight):
            return self._quantized(weight)
        _check_dense(weight)
        rows, inputs = weight.shape[-2:]
        matrices = weight.unsqueeze(0) if weight.dim() == 2 else weight
        size = self._packed_bytes(rows, inputs, DTYPES[weight.dtype])
        panels = self.memory(size * len(matrices))
        for i, matrix in enumerate(matrices):
            whole = matrix.contiguous()
            self._pack(whole.data_ptr(), panels.data_ptr() + i * size, rows, inputs, DTYPES[weight.dtype])
        return PackedWeight(panels, rows, inputs, weight.dtype, matrices=len(matrices))

    def _quantized(self, weight: QuantizedWeight) -> PackedWeight:
        rows, inputs = weight.values.shape[-2:]
        _check(weight)
        bits = weight.bits if weight.values.dtype == torch.int8 else _FP8
        numbers = (rows, inputs, bits, weight.group_size)
        values, scales = weight.values.reshape(-1, rows, inputs), weight.scales.reshape(-1, *weight.scales.shape[-2:])
        size = self._packed_quantized_bytes(*numbers)
        panels = self.memory(size * len(values))
        for i, (matrix, own) in enumerate(zip(values, scales, strict=True)):
            whole, factors = matrix.contiguous(), own.contiguous()
            self._pack_quantized(whole.data_ptr(), factors.data_ptr(), panels.data_ptr() + i * size, *numbers)
        return PackedWeight(panels, rows, inputs, None, bits, weight.group_size, len(values))

    def memory(self, size: int) -> Tensor:
        """Returns a uint8 tensor of `size` bytes. A tensor of at least 2 MiB is stored in huge pages of 2 MiB each."""
        if size < _HUGE_PAGE:
            return torch.empty(size, dtype=torch.uint8)
        memory = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)
        panels = memory[-memory.data_ptr() % _HUGE_PAGE :][:size]
        self._use_huge_pages(panels.data_ptr(), size // _HUGE_PAGE * _HUGE_PAGE)
        return panels


def _check_dense(weight: Tensor) -> None:
    """Raises ValueError unless the tensor is in the CPU's memory and has the shape [N, K] or [E, N, K]."""
    require(weight.dim() in (2, 3) and weight.is_cpu, "weight", weight, "be [N, K] or [E, N, K] in the CPU's memory")


def _check(weight: QuantizedWeight) -> None:
    """Raises ValueError unless the library supports the bits, dtypes, shapes and group size of a quantised weight."""
    values, scales, size, bits = weight[:4]
    _check_dense(values)
    require(scales.is_cpu, "scales", scales, "be in the CPU's memory")
    if bits not in (4, 8):
        raise ValueError(f"the cpu kernels have products for weights of 4 and 8 bits, not {bits}")
    if values.dtype != torch.int8 and (values.dtype != torch.float8_e4m3fn or bits != 8):
        raise ValueError(f"the cpu kernels read int8 values, and float8_e4m3fn of 8 bits, not {values.dtype} of {bits}")
    if size < 1 or (size < values.shape[-1] and size % _STEP):
        raise ValueError(f"the cpu kernels take groups of a multiple of {_STEP} inputs or of whole rows, not of {size}")
    expected = (*values.shape[:-1], -(-values.shape[-1] // size))
    if tuple(scales.shape) != expected or scales.dtype != torch.float32:
        raise ValueError(
            f"quantised values {tuple(values.shape)} in groups of {size} have float32 scales {expected}, "
            f"not {scales.dtype} {tuple(scales.shape)}"
        )


class Linear:
    """Implements the protocol `kernels.ops.Linear` with the compiled library."""

    def __init__(self) -> None:
        self.pack = Packer()
        self._gather = library().function("gather_rows", POINTER, INT, POINTER, POINTER, *[INT] * 3)
        self._run = library().function("linear", POINTER, INT, POINTER, INT, INT, POINTER, POINTER, INT, INT, INT, INT)

    def rows(self, weight: PackedWeight | Tensor, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        if packed := isinstance(weight, PackedWeight):
            memory, inputs = weight.panels, weight.inputs
        else:
            memory, inputs = weight, weight.shape[-1]
            whole("weight", weight, weight.dtype, (weight.shape[0], inputs))
        if weight.dtype is None:
            refuse("weight", memory, "not be quantised, for its rows to be embedded with")
        whole("ids", ids, torch.int64, (ids.shape[0],))
        out = ids.new_empty(len(ids), inputs, dtype=weight.dtype)
        dtype = DTYPES[weight.dtype]
        self._gather(memory.data_ptr(), packed, ids.data_ptr(), out.data_ptr(), len(ids), inputs, dtype)
        return out

    def __call__(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        weight.check(x)
        if bias is not None:
            whole("bias", bias, x.dtype, (weight.rows,))
        y = x.new_empty(x.shape[0], weight.rows)
        self._run(
            x.data_ptr(),
            x.stride(0),
            weight.panels.data_ptr(),
            weight.bits,
            weight.group_size,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.shape[0],
            weight.rows,
            weight.inputs,
            DTYPES[x.dtype],
        )
        return y
