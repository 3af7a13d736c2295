"""Matrix product with a weight, the same bits for a row whatever stands beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cpu.library import DTYPES, INT, POINTER, library

_HUGE_PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [N, K] in panels of 32 rows (`src/gemm.h`). `panels`: uint8 memory; `rows` is N, `inputs` K."""

    panels: Tensor
    rows: int
    inputs: int
    dtype: torch.dtype


class Packer:
    """Brings weights into panels, in memory of huge pages."""

    def __init__(self) -> None:
        native = library()
        self._packed_bytes = native.function("packed_bytes", INT, INT, INT, result=INT)
        self._use_huge_pages = native.function("use_huge_pages", POINTER, INT)
        self._pack = native.function("pack_weight", POINTER, POINTER, INT, INT, INT)

    def __call__(self, weight: Tensor) -> PackedWeight:
        """weight: [N, K], or [E, N, K], whose E matrices' panels lie one after the other."""
        rows, inputs = weight.shape[-2:]
        matrices = weight.unsqueeze(0) if weight.dim() == 2 else weight
        size = self._packed_bytes(rows, inputs, DTYPES[weight.dtype])
        panels = self._memory(size * len(matrices))
        for i, matrix in enumerate(matrices):
            whole = matrix.contiguous()
            self._pack(whole.data_ptr(), panels.data_ptr() + i * size, rows, inputs, DTYPES[weight.dtype])
        return PackedWeight(panels, rows, inputs, weight.dtype)

    def _memory(self, size: int) -> Tensor:
        """uint8 [size]; from one huge page on it starts at a page's border, and its whole pages are huge ones."""
        if size < _HUGE_PAGE:
            return torch.empty(size, dtype=torch.uint8)
        memory = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)
        panels = memory[-memory.data_ptr() % _HUGE_PAGE :][:size]
        self._use_huge_pages(panels.data_ptr(), size // _HUGE_PAGE * _HUGE_PAGE)
        return panels


class Linear:
    """See `kernels.ops.Linear`."""

    def __init__(self) -> None:
        self.pack = Packer()
        self._run = library().function("linear", POINTER, INT, POINTER, POINTER, POINTER, INT, INT, INT, INT)

    def __call__(self, x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
        """See `kernels.ops.Linear`."""
        assert x.dtype == weight.dtype and x.shape[1] == weight.inputs
        y = x.new_empty(x.shape[0], weight.rows)
        self._run(
            x.data_ptr(),
            x.stride(0),
            weight.panels.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            x.shape[0],
            weight.rows,
            weight.inputs,
            DTYPES[x.dtype],
        )
        return y
