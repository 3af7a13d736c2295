"""This op multiplies inputs by a packed weight matrix in compiled code. The results are batch-invariant."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.cpu.arguments import units, whole
from jamba_server.kernels.cpu.formats import Description, describe
from jamba_server.kernels.cpu.library import DTYPES, INT, POINTER, level_number, library
from jamba_server.kernels.ops import QuantizedWeight, StackedWeight, Weight

_HUGE_PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """Contains one or more weights [N, K], packed in panels of 32 rows. `src/gemm.h` describes the layout of a panel.

    `dtype` is the dtype of the weight and of x, or None for a quantised weight, because x may then have any of the
    library's dtypes. `address` is the address of `description`. `matrices` is the number of weights [N, K] (1, or the
    number of experts) that `panels` contains, one after the other.
    """

    panels: Tensor
    description: Description
    address: int
    dtype: torch.dtype | None
    matrices: int = 1

    @classmethod
    def of(cls, panels: Tensor, description: Description, dtype: torch.dtype | None, matrices: int) -> PackedWeight:
        description.panels = panels.data_ptr()
        return cls(panels, description, ctypes.addressof(description), dtype, matrices)

    @property
    def rows(self) -> int:
        return self.description.n

    @property
    def inputs(self) -> int:
        return self.description.k

    def check(self, x: Tensor) -> None:
        """Raises ValueError unless x has the dtype and the row length that this weight requires."""
        units("x", x, x.dtype if self.dtype is None else self.dtype, (x.shape[0], self.inputs))


@dataclass(frozen=True, slots=True)
class PackedStack:
    """Contains packed matrices that multiply the same input. `rows` is the number of outputs of all matrices."""

    parts: tuple[PackedWeight, ...]
    rows: int


class Packer:
    """Packs weights into panels of 32 rows. Packed weights of at least 2 MiB are stored in huge pages of memory.

    Products with the packed weights use the instruction set `level`, or the library's if `level` is None. Raises
    KernelUnavailable if the CPU lacks `level`.
    """

    def __init__(self, level: str | None = None) -> None:
        native, self.level = library(), level_number(level)
        self._packed_bytes = native.function("packed_bytes", INT, INT, INT, result=INT)
        self._packed_quantized_bytes = native.function("packed_quantized_bytes", POINTER, result=INT)
        self._native, self._place = native, native.function("place_memory", POINTER, INT, INT)
        self._use_huge_pages = native.function("use_huge_pages", POINTER, INT)
        self._pack = native.function("pack_weight", POINTER, POINTER, INT, INT, INT)
        self._pack_quantized = native.function("pack_quantized", *[POINTER] * 6)

    def __call__(self, weight: Tensor | QuantizedWeight) -> PackedWeight:
        """Packs a weight [N, K], or E weights [E, N, K]. The panels of the E weights are stored one after the other."""
        if isinstance(weight, QuantizedWeight):
            return self._quantized(weight)
        _check_dense(weight)
        rows, inputs = weight.shape[-2:]
        matrices = weight.unsqueeze(0) if weight.dim() == 2 else weight
        size = self._packed_bytes(rows, inputs, DTYPES[weight.dtype])
        panels = self.memory(size, len(matrices))
        for i, matrix in enumerate(matrices):
            whole = matrix.contiguous()
            self._pack(whole.data_ptr(), panels.data_ptr() + i * size, rows, inputs, DTYPES[weight.dtype])
        description = Description(n=rows, k=inputs, level=self.level)
        return PackedWeight.of(panels, description, weight.dtype, len(matrices))

    def _quantized(self, weight: QuantizedWeight) -> PackedWeight:
        description = describe(weight)
        description.level = self.level
        address = ctypes.addressof(description)
        size = self._packed_quantized_bytes(address)
        shifts = weight.zeros if weight.offsets is None else weight.offsets
        tensors = (weight.values, weight.scales, shifts, weight.super_scales, weight.super_offsets)
        parts = [None if t is None else t.reshape(-1, *t.shape[-2:]) for t in tensors]
        matrices = len(weight.values) if weight.values.dim() == 3 else 1
        panels = self.memory(size, matrices)
        for i in range(matrices):
            own = [None if part is None else part[i].contiguous() for part in parts]
            description.panels = panels.data_ptr() + i * size
            self._pack_quantized(address, *(None if tensor is None else tensor.data_ptr() for tensor in own))
        return PackedWeight.of(panels, description, None, matrices)

    def memory(self, size: int, matrices: int = 1) -> Tensor:
        """Returns a uint8 tensor of `size` bytes for each of `matrices` packed matrices. A tensor of at least 2 MiB is
        stored in huge pages of 2 MiB each. If the threads run on several memory nodes, each node has the part of each
        matrix that its threads read."""
        whole = size * matrices
        if whole < _HUGE_PAGE:
            return torch.empty(whole, dtype=torch.uint8)
        if several := self._native.nodes > 1:
            # The memory comes from the system, because pages that were in use before have a node already.
            memory = torch.frombuffer(mmap.mmap(-1, whole + _HUGE_PAGE), dtype=torch.uint8)
        else:
            memory = torch.empty(whole + _HUGE_PAGE, dtype=torch.uint8)
        panels = memory[-memory.data_ptr() % _HUGE_PAGE :][:whole]
        self._use_huge_pages(panels.data_ptr(), whole // _HUGE_PAGE * _HUGE_PAGE)
        if several:
            self._place(panels.data_ptr(), size, matrices)
        return panels


def _check_dense(weight: Tensor) -> None:
    """Raises ValueError unless the tensor is in the CPU's memory and has the shape [N, K] or [E, N, K]."""
    require(weight.dim() in (2, 3) and weight.is_cpu, "weight", weight, "be [N, K] or [E, N, K] in the CPU's memory")


class Linear:
    """Implements the protocol `kernels.ops.Linear` with the compiled library, at the level that `Packer` describes."""

    def __init__(self, level: str | None = None) -> None:
        self.packer = Packer(level)
        native = library()
        self._gather = native.function("gather_rows", POINTER, INT, POINTER, POINTER, *[INT] * 3)
        self._gather_quantized = native.function("gather_quantized", *[POINTER] * 3, INT, INT)
        self._run = native.function("linear", POINTER, INT, *[POINTER] * 3, *[INT] * 3)
        self._run_sums = native.function("linear_sums", POINTER, INT, *[POINTER] * 2, *[INT] * 3)

    def pack(self, weight: Weight) -> PackedWeight | PackedStack:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        if not isinstance(weight, StackedWeight):
            return self.packer(weight)
        parts = tuple(self.packer(part) for part in weight.parts)
        return PackedStack(parts, sum(part.rows for part in parts))

    def rows(self, weight: PackedWeight | Tensor, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        whole("ids", ids, torch.int64, (ids.shape[0],))
        if packed := isinstance(weight, PackedWeight):
            memory, inputs = weight.panels, weight.inputs
        else:
            memory, inputs = weight, weight.shape[-1]
            whole("weight", weight, weight.dtype, (weight.shape[0], inputs))
        kind = weight.dtype or dtype
        if kind is None:
            raise TypeError("dtype must be given for rows of a quantised weight")
        out = ids.new_empty(len(ids), inputs, dtype=kind)
        if isinstance(weight, PackedWeight) and weight.dtype is None:
            self._gather_quantized(weight.address, ids.data_ptr(), out.data_ptr(), len(ids), DTYPES[kind])
        else:
            self._gather(memory.data_ptr(), packed, ids.data_ptr(), out.data_ptr(), len(ids), inputs, DTYPES[kind])
        return out

    def __call__(self, x: Tensor, weight: PackedWeight | PackedStack, bias: Tensor | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        if bias is not None:
            whole("bias", bias, x.dtype, (weight.rows,))
        y = x.new_empty(x.shape[0], weight.rows)
        start = 0
        for part in weight.parts if isinstance(weight, PackedStack) else (weight,):
            part.check(x)
            self._run(
                x.data_ptr(),
                x.stride(0),
                part.address,
                None if bias is None else bias.data_ptr() + start * x.element_size(),
                y.data_ptr() + start * x.element_size(),
                weight.rows,
                x.shape[0],
                DTYPES[x.dtype],
            )
            start += part.rows
        return y

    def sums(self, x: Tensor, weight: PackedWeight, out: Tensor) -> None:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        weight.check(x)
        whole("out", out, torch.float32, (x.shape[0], weight.rows))
        self._run_sums(
            x.data_ptr(), x.stride(0), weight.address, out.data_ptr(), weight.rows, x.shape[0], DTYPES[x.dtype]
        )
