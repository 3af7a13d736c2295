"""Memory in huge pages, with which one core reads half as fast again."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import INT, POINTER, library

_HUGE_PAGE = 2 << 20


def huge_pages(size: int) -> Tensor:
    """uint8 [size]; from one huge page on it starts at a page's border, and its whole pages are huge ones."""
    if size < _HUGE_PAGE:
        return torch.empty(size, dtype=torch.uint8)
    memory = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)
    aligned = memory[-memory.data_ptr() % _HUGE_PAGE :][:size]
    library().function("use_huge_pages", POINTER, INT)(aligned.data_ptr(), size // _HUGE_PAGE * _HUGE_PAGE)
    return aligned
