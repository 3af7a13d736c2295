"""These functions raise ValueError for tensors whose dtype, shape, strides or device a kernel does not support.

A compiled kernel receives only the address of a tensor. With unexpected strides, for example, the kernel would read or
write wrong memory. The checks are not `assert` statements, because `python -O` removes `assert` statements. The numbers
inside index tensors (slots, pages, token ids) are not checked: the engine guarantees that they are within bounds.
"""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor


def require(holds: bool, name: str, tensor: Tensor, must: str) -> None:
    """Raises ValueError if the condition `holds` is false.

    The message says that the tensor must satisfy `must`, a phrase such as "have contiguous rows".
    """
    if not holds:
        refuse(name, tensor, must)


def refuse(name: str, tensor: Tensor, must: str) -> NoReturn:
    """Raises ValueError. The message gives the requirement `must` and the tensor's dtype, shape, strides and device."""
    kind = str(tensor.dtype).removeprefix("torch.")
    raise ValueError(
        f"{name} must {must}; it is {kind} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
    )
