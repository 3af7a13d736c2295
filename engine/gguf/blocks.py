"""The types of tensors in GGUF files, and the numbers that the blocks of each type hold.

A tensor of a block type is a sequence of blocks of equal size. A block has the numbers of 32 or 256 neighbouring
inputs of one row. In every type the numbers of a block are divided into groups, and a number is
`scale * value + offset`, where the value is a small integer, and where scale and offset belong to the group. Many types
have no offset.

In types with blocks of 32 numbers, scale and offset are half-precision numbers. In types with blocks of 256 numbers
they have two levels: the group has a small integer, and the block has a half-precision number; the scale or offset is
the product of both. All arithmetic is in float32 and gives the same bits as the package `gguf`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]

SUPER_BLOCK: Final = 256  # number of inputs in a block of the types whose names contain "_K" or "_XS"
_BLOCK: Final = 32  # number of inputs in a block of the other types
# The 16 numbers that the four bits of the types IQ4_NL and IQ4_XS stand for.
_IQ4_TABLE: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FOUR_BITS: Final = np.uint8(0x0F)


class Groups(NamedTuple):
    """The content of n blocks with g groups of s numbers each.

    `values` [n, g, s] are int8; they are uint8 in types with offsets or with a table, from which a value then selects a
    number. `scales` and `offsets` [n, g] are float16, or int8 if there are two levels. `super_scales` and
    `super_offsets` [n, 1] are the float16 numbers of the second level. What a type does not have is None.
    """

    values: npt.NDArray[np.int8 | np.uint8]
    scales: npt.NDArray[np.float16 | np.int8]
    offsets: npt.NDArray[np.float16 | np.int8] | None = None
    super_scales: Halves | None = None
    super_offsets: Halves | None = None

    def numbers(self, table: tuple[int, ...] | None) -> Floats:
        """Returns the numbers that the blocks stand for: float32 [n, g * s]. `table` is the table of the type."""
        values = self.values if table is None else np.array(table, np.int8)[self.values]
        numbers = _product(self.scales, self.super_scales)[..., None] * values.astype(np.float32)
        if self.offsets is not None:
            numbers += _product(self.offsets, self.super_offsets)[..., None]
        return numbers.reshape(len(numbers), -1)


def _product(factors: npt.NDArray[np.float16 | np.int8], supers: Halves | None) -> Floats:
    """Returns scales or offsets in float32, the product of their levels."""
    numbers = factors.astype(np.float32)
    return numbers if supers is None else supers.astype(np.float32) * numbers


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of tensor. `number` is its number in GGUF files. A block has `inputs` numbers and takes `num_bytes` bytes.
    `unpack` maps blocks, uint8 [n, num_bytes], to their content; it is None for types of floating-point numbers, whose
    blocks have one number.

    `bits` is 4 if all values lie between -8 and 7, or between 0 and 15, and 8 otherwise. `limit` is the largest value.
    `group` is the number of inputs that share a scale. If there is a `table`, a value is an index of this table.
    """

    number: int
    name: str
    inputs: int
    num_bytes: int
    unpack: Callable[[Bytes], Groups] | None = None
    bits: int = 0
    limit: int = 0
    group: int = 0
    has_offset: bool = False
    table: tuple[int, ...] | None = None


def _halves(blocks: Bytes) -> Halves:
    """Returns the half-precision numbers in the bytes [n, 2 * m] as float16 [n, m]."""
    return np.ascontiguousarray(blocks).view(np.float16)


def _nibbles(packed: Bytes, run: int) -> Bytes:
    """Returns the numbers of four bits in the bytes [n, m] as uint8 [n, 2 * m]. Each run of `run` bytes holds first
    `run` numbers in the low halves of its bytes, and then `run` numbers in the high halves."""
    runs = packed.reshape(len(packed), -1, 1, run)
    return np.concatenate([runs & _FOUR_BITS, runs >> np.uint8(4)], axis=2).reshape(len(packed), -1)


def _bits(packed: Bytes, run: int, width: int) -> Bytes:
    """Returns the numbers of `width` bits (1 or 2) in the bytes [n, m] as uint8 [n, m * 8 // width]. Each run of `run`
    bytes holds first `run` numbers in the lowest bits of its bytes, then `run` numbers in the next bits, and so on."""
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, -1, 1)
    numbers = packed.reshape(len(packed), -1, 1, run) >> shifts
    return (numbers & np.uint8((1 << width) - 1)).reshape(len(packed), -1)


def _signed(values: Bytes, zero: int, groups: int) -> npt.NDArray[np.int8]:
    """Returns uint8 [n, m] minus `zero`, as int8 [n, groups, m // groups]."""
    return (values.view(np.int8) - np.int8(zero)).reshape(len(values), groups, -1)


def _unpack_q8_0(blocks: Bytes) -> Groups:
    return Groups(blocks[:, None, 2:].view(np.int8), _halves(blocks[:, :2]))


def _unpack_q4_0(blocks: Bytes) -> Groups:
    return Groups(_signed(_nibbles(blocks[:, 2:], 16), 8, 1), _halves(blocks[:, :2]))


def _unpack_q4_1(blocks: Bytes) -> Groups:
    return Groups(_nibbles(blocks[:, 4:], 16)[:, None], _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _five_bits(high: Bytes, low: Bytes) -> Bytes:
    """Returns the 32 numbers of five bits of each block. Their fifth bits are the 32 bits of `high` [n, 4]."""
    fifth = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")
    return _nibbles(low, 16) | fifth << np.uint8(4)


def _unpack_q5_0(blocks: Bytes) -> Groups:
    return Groups(_signed(_five_bits(blocks[:, 2:6], blocks[:, 6:]), 16, 1), _halves(blocks[:, :2]))


def _unpack_q5_1(blocks: Bytes) -> Groups:
    values = _five_bits(blocks[:, 4:8], blocks[:, 8:])
    return Groups(values[:, None], _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _unpack_q2_k(blocks: Bytes) -> Groups:
    values, factors = _bits(blocks[:, 16:80], 32, 2).reshape(len(blocks), 16, -1), blocks[:, :16]
    scales, minimums = (factors & _FOUR_BITS).view(np.int8), (factors >> np.uint8(4)).view(np.int8)
    return Groups(values, scales, minimums, _halves(blocks[:, 80:82]), -_halves(blocks[:, 82:]))


def _unpack_q3_k(blocks: Bytes) -> Groups:
    # The upper four of the twelve bytes of scales hold the upper two bits of the 16 numbers of six bits.
    factors = _nibbles(blocks[:, 96:104], 8) | _bits(blocks[:, 104:108], 4, 2) << np.uint8(4)
    # A bit that is not set in the first 32 bytes subtracts 4 from its number.
    values = _bits(blocks[:, 32:96], 32, 2) | _bits(blocks[:, :32], 32, 1) << np.uint8(2)
    scales = factors.view(np.int8) - np.int8(32)
    return Groups(_signed(values, 4, 16), scales, super_scales=_halves(blocks[:, 108:]))


def _k_groups(blocks: Bytes, values: Bytes) -> Groups:
    """Returns the content of blocks of the types Q4_K and Q5_K with the given values [n, 256]. The blocks begin with
    two halves and twelve bytes, which hold a pair of numbers of six bits for each of the eight groups."""
    first, second, rest = (blocks[:, start : start + 4] for start in (4, 8, 12))
    low, high = np.uint8(0x3F), np.uint8(0x30)
    scales = np.concatenate([first & low, rest & _FOUR_BITS | first >> np.uint8(2) & high], axis=1)
    minimums = np.concatenate([second & low, rest >> np.uint8(4) | second >> np.uint8(2) & high], axis=1)
    supers = _halves(blocks[:, :2]), -_halves(blocks[:, 2:4])  # a minimum is subtracted, and an offset is added
    return Groups(values.reshape(len(values), 8, -1), scales.view(np.int8), minimums.view(np.int8), *supers)


def _unpack_q4_k(blocks: Bytes) -> Groups:
    return _k_groups(blocks, _nibbles(blocks[:, 16:], 32))


def _unpack_q5_k(blocks: Bytes) -> Groups:
    return _k_groups(blocks, _nibbles(blocks[:, 48:], 32) | _bits(blocks[:, 16:48], 32, 1) << np.uint8(4))


def _unpack_q6_k(blocks: Bytes) -> Groups:
    values = _nibbles(blocks[:, :128], 64) | _bits(blocks[:, 128:192], 32, 2) << np.uint8(4)
    scales = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8)
    return Groups(_signed(values, 32, 16), scales, super_scales=_halves(blocks[:, 208:]))


def _unpack_iq4_nl(blocks: Bytes) -> Groups:
    return Groups(_nibbles(blocks[:, 2:], 16)[:, None], _halves(blocks[:, :2]))


def _unpack_iq4_xs(blocks: Bytes) -> Groups:
    upper = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    factors = _nibbles(blocks[:, 4:8], 1) | (upper & np.uint16(3)).astype(np.uint8) << np.uint8(4)
    values = _nibbles(blocks[:, 8:], 16).reshape(len(blocks), 8, -1)
    return Groups(values, factors.view(np.int8) - np.int8(32), super_scales=_halves(blocks[:, :2]))


_TYPES: Final = (
    BlockType(0, "F32", 1, 4),
    BlockType(1, "F16", 1, 2),
    BlockType(2, "Q4_0", _BLOCK, 18, _unpack_q4_0, 4, 7, 32),
    BlockType(3, "Q4_1", _BLOCK, 20, _unpack_q4_1, 4, 15, 32, has_offset=True),
    BlockType(6, "Q5_0", _BLOCK, 22, _unpack_q5_0, 8, 15, 32),
    BlockType(7, "Q5_1", _BLOCK, 24, _unpack_q5_1, 8, 31, 32, has_offset=True),
    BlockType(8, "Q8_0", _BLOCK, 34, _unpack_q8_0, 8, 127, 32),
    BlockType(10, "Q2_K", SUPER_BLOCK, 84, _unpack_q2_k, 4, 3, 16, has_offset=True),
    BlockType(11, "Q3_K", SUPER_BLOCK, 110, _unpack_q3_k, 4, 3, 16),
    BlockType(12, "Q4_K", SUPER_BLOCK, 144, _unpack_q4_k, 4, 15, 32, has_offset=True),
    BlockType(13, "Q5_K", SUPER_BLOCK, 176, _unpack_q5_k, 8, 31, 32, has_offset=True),
    BlockType(14, "Q6_K", SUPER_BLOCK, 210, _unpack_q6_k, 8, 31, 16),
    BlockType(20, "IQ4_NL", _BLOCK, 18, _unpack_iq4_nl, 4, 15, 32, table=_IQ4_TABLE),
    BlockType(23, "IQ4_XS", SUPER_BLOCK, 136, _unpack_iq4_xs, 4, 15, 32, table=_IQ4_TABLE),
    BlockType(30, "BF16", 1, 2),
)
# Maps the number of a type in a GGUF file to the type.
TYPES: Final[Mapping[int, BlockType]] = {kind.number: kind for kind in _TYPES}
# The names of types that other programs write and this server does not read.
OTHER_TYPES: Final[Mapping[int, str]] = {
    4: "Q4_2",
    5: "Q4_3",
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}


def unpack(kind: BlockType, data: Bytes) -> Groups:
    """Returns the content of the blocks in `data`, which has a whole number of blocks. `kind` is a block type."""
    assert kind.unpack is not None, "a floating-point type has no blocks"
    return kind.unpack(data.reshape(-1, kind.num_bytes))


def dequantize(kind: BlockType, data: Bytes) -> Floats:
    """Returns the numbers in `data`, which has a whole number of blocks: float32 [n]. The numbers are exact except for
    the roundings that the type's definition makes in float32."""
    if kind.unpack is not None:
        with np.errstate(all="ignore"):
            return unpack(kind, data).numbers(kind.table).reshape(-1)
    dtypes: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    numbers = np.ascontiguousarray(data).view(dtypes[kind.name])
    if kind.name == "BF16":  # a bfloat16 number has the upper 16 bits of the float32 number
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float32)
