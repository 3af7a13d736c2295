"""The types of tensors in GGUF files, and the numbers that the blocks of each type hold.

A tensor of a block type is a sequence of blocks of equal size. A block has the numbers of 32 or 256 neighbouring
inputs of one row. In every type the numbers of a block are divided into groups, and a number is
`scale * value + offset`, where the value is a small integer, and where scale and offset belong to the group. Many types
have no offset. All arithmetic is in float32 and gives the same bits as the package `gguf`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

SUPER_BLOCK: Final = 256  # number of inputs in a block of the types whose names contain "_K" or "_XS"
_BLOCK: Final = 32  # number of inputs in a block of the other types
# The 16 numbers that the four bits of the types IQ4_NL and IQ4_XS stand for.
_IQ4_TABLE: Final = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8)
_FOUR_BITS: Final = np.uint8(0x0F)


class Groups(NamedTuple):
    """The content of n blocks with g groups of s numbers each: int8 `values` [n, g, s], float32 `scales` [n, g] and
    float32 `offsets` [n, g], which are None for types without offsets."""

    values: npt.NDArray[np.int8]
    scales: Floats
    offsets: Floats | None = None

    def numbers(self) -> Floats:
        """Returns the numbers that the blocks stand for: float32 [n, g * s]."""
        numbers = self.scales[..., None] * self.values.astype(np.float32)
        if self.offsets is not None:
            numbers += self.offsets[..., None]
        return numbers.reshape(len(numbers), -1)


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of tensor. A block has `inputs` numbers and takes `num_bytes` bytes. `unpack` maps blocks, uint8
    [n, num_bytes], to their content; it is None for types of floating-point numbers, whose blocks have one number.

    `bits` is 4 if all values lie between -8 and 7, and 8 otherwise. `group` is the number of inputs that share a
    scale.
    """

    name: str
    inputs: int
    num_bytes: int
    unpack: Callable[[Bytes], Groups] | None = None
    bits: int = 0
    group: int = 0
    has_offset: bool = False


def _halves(blocks: Bytes) -> Floats:
    """Returns the half-precision numbers in the bytes [n, 2 * m] as float32 [n, m]."""
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


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
    return (values.astype(np.int8) - np.int8(zero)).reshape(len(values), groups, -1)


def _unpack_q8_0(blocks: Bytes) -> Groups:
    return Groups(np.ascontiguousarray(blocks[:, 2:]).view(np.int8)[:, None], _halves(blocks[:, :2]))


def _unpack_q4_0(blocks: Bytes) -> Groups:
    return Groups(_signed(_nibbles(blocks[:, 2:], 16), 8, 1), _halves(blocks[:, :2]))


def _unpack_q4_1(blocks: Bytes) -> Groups:
    return Groups(_signed(_nibbles(blocks[:, 4:], 16), 0, 1), _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _five_bits(high: Bytes, low: Bytes) -> Bytes:
    """Returns the 32 numbers of five bits of each block. Their fifth bits are the 32 bits of `high` [n, 4]."""
    fifth = np.unpackbits(np.ascontiguousarray(high), axis=1, bitorder="little")
    return _nibbles(low, 16) | fifth << np.uint8(4)


def _unpack_q5_0(blocks: Bytes) -> Groups:
    return Groups(_signed(_five_bits(blocks[:, 2:6], blocks[:, 6:]), 16, 1), _halves(blocks[:, :2]))


def _unpack_q5_1(blocks: Bytes) -> Groups:
    values = _signed(_five_bits(blocks[:, 4:8], blocks[:, 8:]), 0, 1)
    return Groups(values, _halves(blocks[:, :2]), _halves(blocks[:, 2:4]))


def _unpack_q2_k(blocks: Bytes) -> Groups:
    factors, scale, minimum = blocks[:, :16], _halves(blocks[:, 80:82]), _halves(blocks[:, 82:])
    scales = scale * (factors & _FOUR_BITS).astype(np.float32)
    offsets = -(minimum * (factors >> np.uint8(4)).astype(np.float32))
    return Groups(_signed(_bits(blocks[:, 16:80], 32, 2), 0, 16), scales, offsets)


def _unpack_q3_k(blocks: Bytes) -> Groups:
    # The upper four of the twelve bytes of scales hold the upper two bits of the 16 numbers of six bits.
    factors = _nibbles(blocks[:, 96:104], 8) | _bits(blocks[:, 104:108], 4, 2) << np.uint8(4)
    scales = _halves(blocks[:, 108:]) * (factors.astype(np.int8) - np.int8(32)).astype(np.float32)
    # A bit that is not set in the first 32 bytes subtracts 4 from its number.
    values = _bits(blocks[:, 32:96], 32, 2) | _bits(blocks[:, :32], 32, 1) << np.uint8(2)
    return Groups(_signed(values, 4, 16), scales)


def _scales_and_minimums(blocks: Bytes) -> tuple[Floats, Floats]:
    """Returns the scales and the offsets of the eight groups of the types Q4_K and Q5_K, each float32 [n, 8]. The
    blocks begin with two halves and twelve bytes, which hold eight pairs of numbers of six bits."""
    first, second, rest = (blocks[:, start : start + 4] for start in (4, 8, 12))
    low, high = np.uint8(0x3F), np.uint8(0x30)
    factors = np.concatenate([first & low, rest & _FOUR_BITS | first >> np.uint8(2) & high], axis=1)
    minimums = np.concatenate([second & low, rest >> np.uint8(4) | second >> np.uint8(2) & high], axis=1)
    scales = _halves(blocks[:, :2]) * factors.astype(np.float32)
    return scales, -(_halves(blocks[:, 2:4]) * minimums.astype(np.float32))


def _unpack_q4_k(blocks: Bytes) -> Groups:
    return Groups(_signed(_nibbles(blocks[:, 16:], 32), 0, 8), *_scales_and_minimums(blocks))


def _unpack_q5_k(blocks: Bytes) -> Groups:
    values = _nibbles(blocks[:, 48:], 32) | _bits(blocks[:, 16:48], 32, 1) << np.uint8(4)
    return Groups(_signed(values, 0, 8), *_scales_and_minimums(blocks))


def _unpack_q6_k(blocks: Bytes) -> Groups:
    values = _nibbles(blocks[:, :128], 64) | _bits(blocks[:, 128:192], 32, 2) << np.uint8(4)
    factors = np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return Groups(_signed(values, 32, 16), _halves(blocks[:, 208:]) * factors)


def _unpack_iq4_nl(blocks: Bytes) -> Groups:
    return Groups(_IQ4_TABLE[_nibbles(blocks[:, 2:], 16)][:, None], _halves(blocks[:, :2]))


def _unpack_iq4_xs(blocks: Bytes) -> Groups:
    upper = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    factors = _nibbles(blocks[:, 4:8], 1) | (upper & np.uint16(3)).astype(np.uint8) << np.uint8(4)
    scales = _halves(blocks[:, :2]) * (factors.astype(np.int8) - np.int8(32)).astype(np.float32)
    return Groups(_IQ4_TABLE[_nibbles(blocks[:, 8:], 16)].reshape(len(blocks), 8, -1), scales)


# Maps the number of a type in a GGUF file to the type.
TYPES: Final[Mapping[int, BlockType]] = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", _BLOCK, 18, _unpack_q4_0, 4, 32),
    3: BlockType("Q4_1", _BLOCK, 20, _unpack_q4_1, 8, 32, has_offset=True),
    6: BlockType("Q5_0", _BLOCK, 22, _unpack_q5_0, 8, 32),
    7: BlockType("Q5_1", _BLOCK, 24, _unpack_q5_1, 8, 32, has_offset=True),
    8: BlockType("Q8_0", _BLOCK, 34, _unpack_q8_0, 8, 32),
    10: BlockType("Q2_K", SUPER_BLOCK, 84, _unpack_q2_k, 4, 16, has_offset=True),
    11: BlockType("Q3_K", SUPER_BLOCK, 110, _unpack_q3_k, 4, 16),
    12: BlockType("Q4_K", SUPER_BLOCK, 144, _unpack_q4_k, 8, 32, has_offset=True),
    13: BlockType("Q5_K", SUPER_BLOCK, 176, _unpack_q5_k, 8, 32, has_offset=True),
    14: BlockType("Q6_K", SUPER_BLOCK, 210, _unpack_q6_k, 8, 16),
    20: BlockType("IQ4_NL", _BLOCK, 18, _unpack_iq4_nl, 8, 32),
    23: BlockType("IQ4_XS", SUPER_BLOCK, 136, _unpack_iq4_xs, 8, 32),
    30: BlockType("BF16", 1, 2),
}
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
    with np.errstate(all="ignore"):  # a scale that is not a number is found when the weight is checked
        return kind.unpack(data.reshape(-1, kind.num_bytes))


def dequantize(kind: BlockType, data: Bytes) -> Floats:
    """Returns the numbers in `data`, which has a whole number of blocks: float32 [n]. The numbers are exact except for
    the roundings that the type's definition makes in float32."""
    if kind.unpack is not None:
        with np.errstate(all="ignore"):
            return unpack(kind, data).numbers().reshape(-1)
    dtypes: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    numbers = np.ascontiguousarray(data).view(dtypes[kind.name])
    if kind.name == "BF16":  # a bfloat16 number has the upper 16 bits of the float32 number
        return (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float32)
