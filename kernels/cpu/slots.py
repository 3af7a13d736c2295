"""These ops write KV pages, and copy, compress and restore states between slots."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.cpu.arguments import units, whole
from jamba_server.kernels.cpu.library import INT, POINTER, library
from jamba_server.kernels.ops import CompressedStates


class WriteKv:
    """Implements the protocol `kernels.ops.WriteKv` with the compiled library."""

    def __init__(self) -> None:
        self._run = library().function("write_kv", *[POINTER] * 5, *[INT] * 6)

    def __call__(self, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, kv_slots: Tensor) -> None:
        """See the protocol `kernels.ops.WriteKv` for the arguments and the effect."""
        require(k.dim() == 3 and k_pages.dim() == 4, "k", k, "have three dimensions, and k_pages four")
        rows, kv_heads, size = k.shape
        row, item = kv_heads * size, k.element_size()
        units("k", k, k.dtype, k.shape)
        units("v", v, k.dtype, k.shape)
        pages = (*k_pages.shape[:2], kv_heads, size)
        units("k_pages", k_pages, k.dtype, pages)
        units("v_pages", v_pages, k.dtype, pages)
        require(k_pages.stride(0) == v_pages.stride(0), "v_pages", v_pages, "have pages as far apart as k_pages")
        whole("kv_slots", kv_slots, torch.int64, (rows,))
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
    """Implements the protocol `kernels.ops.CopySlots` with the compiled library."""

    def __init__(self) -> None:
        self._run = library().function("copy_slots", POINTER, INT, INT, POINTER, POINTER, INT)

    def __call__(self, tensors: tuple[Tensor, ...], sources: Tensor, destinations: Tensor) -> None:
        """See the protocol `kernels.ops.CopySlots` for the arguments and the effect."""
        sources, destinations = _pairs(sources, destinations)
        for i, tensor in enumerate(tensors):
            item = tensor.element_size()
            units(f"tensors[{i}]", tensor, tensor.dtype, tensor.shape)
            self._run(
                tensor.data_ptr(),
                math.prod(tensor.shape[1:]) * item,
                tensor.stride(0) * item,
                sources.data_ptr(),
                destinations.data_ptr(),
                sources.shape[0],
            )


class CompressStates:
    """Implements the protocol `kernels.ops.CompressStates` with the compiled library."""

    def __init__(self) -> None:
        self._run = library().function("compress_states", *[POINTER, INT] * 3, *[POINTER] * 2, *[INT] * 3)

    def __call__(self, states: Tensor, compressed: CompressedStates, sources: Tensor, destinations: Tensor) -> None:
        """See the protocol `kernels.ops.CompressStates` for the arguments and the effect."""
        sources, destinations = _pairs(sources, destinations)
        channels, size = _check(states, compressed)
        self._run(
            *_units(states),
            *_units(compressed.values),
            *_units(compressed.scales),
            sources.data_ptr(),
            destinations.data_ptr(),
            sources.shape[0],
            channels,
            size,
        )


class RestoreStates:
    """Implements the protocol `kernels.ops.RestoreStates` with the compiled library."""

    def __init__(self) -> None:
        self._run = library().function("restore_states", *[POINTER, INT] * 3, *[POINTER] * 2, *[INT] * 3)

    def __call__(self, compressed: CompressedStates, states: Tensor, sources: Tensor, destinations: Tensor) -> None:
        """See the protocol `kernels.ops.RestoreStates` for the arguments and the effect."""
        sources, destinations = _pairs(sources, destinations)
        channels, size = _check(states, compressed)
        self._run(
            *_units(compressed.values),
            *_units(compressed.scales),
            *_units(states),
            sources.data_ptr(),
            destinations.data_ptr(),
            sources.shape[0],
            channels,
            size,
        )


def _pairs(sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Returns contiguous versions of `sources` and `destinations`.

    Raises ValueError unless `sources` and `destinations` are int64 vectors of the same length.
    """
    sources, destinations = sources.contiguous(), destinations.contiguous()
    whole("sources", sources, torch.int64, (sources.shape[0],))
    whole("destinations", destinations, torch.int64, (sources.shape[0],))
    return sources, destinations


def _check(states: Tensor, compressed: CompressedStates) -> tuple[int, int]:
    """Returns (total number of channels of all layers, number of SSM states per channel).

    Raises ValueError unless `states` and `compressed` have matching shapes: the same layers, channels and SSM states.
    """
    values, scales = compressed
    unit = states.shape[1:]
    units("states", states, torch.float32, states.shape)
    units("values", values, torch.int8, (values.shape[0], *unit))
    units("scales", scales, torch.float32, (scales.shape[0], *unit[:-1]))
    return math.prod(unit[:-1]), unit[-1]


def _units(tensor: Tensor) -> tuple[int, int]:
    """Returns (the address of a tensor, the stride of the tensor's dimension 0 in elements)."""
    return tensor.data_ptr(), tensor.stride(0)
