"""Encodes float32 numbers as blocks of a GGUF type. The bytes are those that the package `gguf` writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np

from jamba_server.engine.gguf.blocks import TYPES, BlockType, Bytes, Floats

_CHUNK: Final = 1 << 20  # how many numbers are encoded at a time
_NUMBERS: Final[Mapping[str, int]] = {kind.name: number for number, kind in TYPES.items()}


def _inverse(scales: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.where(scales == 0, np.float32(0), np.float32(1) / scales)


def _q8_0(blocks: Floats) -> Bytes:
    scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scales)
    magnitudes = np.abs(scaled)
    whole = np.floor(magnitudes)
    rounded = np.sign(scaled) * (whole + np.floor(2 * (magnitudes - whole)))  # halves are rounded away from zero
    return np.concatenate([scales.astype(np.float16).view(np.uint8), rounded.astype(np.int8).view(np.uint8)], axis=1)


def _q4_0(blocks: Floats) -> Bytes:
    extremes = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scales = extremes / np.float32(-8)
    values = np.trunc(blocks * _inverse(scales) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate(
        [scales.astype(np.float16).view(np.uint8), values[:, :16] | values[:, 16:] << np.uint8(4)], axis=1
    )


def _bf16(numbers: Floats) -> Bytes:
    bits = numbers.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)  # ties go to even numbers


_ENCODERS: Final[Mapping[str, Callable[[Floats], Bytes]]] = {
    "F32": lambda numbers: numbers.view(np.uint8),
    "F16": lambda numbers: numbers.astype(np.float16).view(np.uint8),
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
}


def type_number(name: str) -> int:
    """Returns the number that a GGUF file has for the type `name`."""
    return _NUMBERS[name]


def type_for(name: str, inputs: int) -> str:
    """Returns the type for a matrix with rows of `inputs` numbers: `name`, or F16 if such a row has no whole blocks."""
    return "F16" if inputs % _kind(name).inputs else name


def encode(name: str, numbers: Floats) -> bytes:
    """Returns the numbers, which are finite, as bytes of the type `name`. Rows have whole blocks."""
    kind, flat, parts = _kind(name), np.ascontiguousarray(numbers, dtype=np.float32).reshape(-1), list[Any]()
    for start in range(0, len(flat), _CHUNK):
        parts.append(_ENCODERS[name](flat[start : start + _CHUNK].reshape(-1, kind.inputs)).tobytes())
    return b"".join(parts)


def _kind(name: str) -> BlockType:
    return TYPES[_NUMBERS[name]]
