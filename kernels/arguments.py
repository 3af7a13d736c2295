"""Refusals of tensors that compiled code cannot take: it is handed addresses, and reads or writes whatever is there.

They raise and are no assertions, which `python -O` removes. They look at layouts only. That the numbers in an index
tensor (slots, pages, token ids) are within bounds is an invariant of the engine, which makes them.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor


def require(holds: bool, name: str, tensor: Tensor, must: str) -> None:
    """ValueError unless `holds`: the tensor `name` must `must`, for example "have contiguous rows"."""
    if not holds:
        refuse(name, tensor, must)


def refuse(name: str, tensor: Tensor, must: str) -> NoReturn:
    """ValueError that tells what the tensor is and what it must be."""
    kind = str(tensor.dtype).removeprefix("torch.")
    raise ValueError(
        f"{name} must {must}; it is {kind} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
    )
