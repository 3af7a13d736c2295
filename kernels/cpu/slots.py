"""These ops write KV pages, and copy, compress and restore states between slots."""

from __future__ import annotations

from torch import Tensor

from jamba_server.kernels.cpu.library import INT, POINTER, library
from jamba_server.kernels.ops import CompressedStates


class WriteKv:
    """See `kernels.ops.WriteKv`."""

    def __init__(self) -> None:
        self._run = library().function("write_kv", *[POINTER] * 5, *[INT] * 6)

    def __call__(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, kv_slots: Tensor) -> None:
        """See `kernels.ops.WriteKv`."""
        rows, kv_heads, size = k.shape
        row, item = kv_heads * size, k.element_size()
        assert k.stride()[1:] == v.stride()[1:] == (size, 1), "heads of a row lie side by side"
        assert k_pages.stride() == v_pages.stride() and k_pages.stride()[1:] == (row, size, 1), "tokens of a page too"
        self._run(
            k.data_ptr(),
            v.data_ptr(),
            k_pages.data_ptr(),
            v_pages.data_ptr(),
            kv_slots.data_ptr(),
            rows,
            row * item,
            k.stride(0) * item,
            v.stride(0) * item,
            k_pages.shape[1],
            k_pages.stride(0) * item,
        )


class CopySlots:
    """See `kernels.ops.CopySlots`."""

    def __init__(self) -> None:
        self._run = library().function("copy_slots", POINTER, INT, INT, POINTER, POINTER, INT)

    def __call__(self, tensors: tuple[Tensor, ...], sources: Tensor, destinations: Tensor) -> None:
        """See `kernels.ops.CopySlots`."""
        sources, destinations = sources.contiguous(), destinations.contiguous()
        for tensor in tensors:
            unit, item = tensor[0], tensor.element_size()
            assert unit.is_contiguous(), "a unit is one piece of memory"
            self._run(
                tensor.data_ptr(),
                unit.numel() * item,
                tensor.stride(0) * item,
                sources.data_ptr(),
                destinations.data_ptr(),
                sources.shape[0],
            )


class CompressStates:
    """See `kernels.ops.CompressStates`."""

    def __init__(self) -> None:
        self._run = library().function("compress_states", *[POINTER, INT] * 3, *[POINTER] * 2, *[INT] * 3)

    def __call__(self, states: Tensor, compressed: CompressedStates, sources: Tensor, destinations: Tensor) -> None:
        """See `kernels.ops.CompressStates`."""
        values, scales = compressed
        sources, destinations = sources.contiguous(), destinations.contiguous()
        self._run(
            *_units(states),
            *_units(values),
            *_units(scales),
            sources.data_ptr(),
            destinations.data_ptr(),
            sources.shape[0],
            scales[0].numel(),
            states.shape[-1],
        )


class RestoreStates:
    """See `kernels.ops.RestoreStates`."""

    def __init__(self) -> None:
        self._run = library().function("restore_states", *[POINTER, INT] * 3, *[POINTER] * 2, *[INT] * 3)

    def __call__(self, compressed: CompressedStates, states: Tensor, sources: Tensor, destinations: Tensor) -> None:
        """See `kernels.ops.RestoreStates`."""
        values, scales = compressed
        sources, destinations = sources.contiguous(), destinations.contiguous()
        self._run(
            *_units(values),
            *_units(scales),
            *_units(states),
            sources.data_ptr(),
            destinations.data_ptr(),
            sources.shape[0],
            scales[0].numel(),
            states.shape[-1],
        )


def _units(tensor: Tensor) -> tuple[int, int]:
    """(address, numbers from one unit to the next)."""
    assert tensor[0].is_contiguous(), "a unit is one piece of memory"
    return tensor.data_ptr(), tensor.stride(0)
