"""This module refuses tensors whose layout compiled code cannot handle.

Compiled code receives only addresses, and would read or write wrong memory. The checks raise ValueError and are no
assertions, because `python -O` removes assertions. Only layouts are checked: the engine guarantees that the numbers in
an index tensor (slots, pages, token ids) are within bounds.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor


def require(holds: bool, name: str, tensor: Tensor, must: str) -> None:
    """Raises ValueError unless `holds`. `must` is what the tensor must do, for example "have contiguous rows"."""
    if not holds:
        refuse(name, tensor, must)


def refuse(name: str, tensor: Tensor, must: str) -> NoReturn:
    """Raises ValueError, whose message describes the tensor `name` and says what it must do."""
    kind = str(tensor.dtype).removeprefix("torch.")
    raise ValueError(
        f"{name} must {must}; it is {kind} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
    )
