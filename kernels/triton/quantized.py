"""This module defines how quantised weights are stored on the GPU, and how a matrix product reads such weights.

The numbers of a row are cut into chunks of up to 128, and the last chunk is padded. A chunk has two parts of 8-bit
numbers, or four parts of 4-bit numbers. No part has numbers of more than one group, which is why a part has only 16 or
32 numbers where the groups are small. Number 2w + h of a part is in half h of word w of the chunk, and the first part
is in the lowest bits of each half. A shift and a mask move two numbers of a part to the places of two bfloat16 in one
register. One more instruction then converts both numbers:

* A 4-bit number becomes the lowest mantissa bits of 128, which is subtracted. A signed number is stored with 8 added,
  so 136 is subtracted.
* The lower seven bits of an 8-bit number become the lowest mantissa bits of 128. If the number's sign bit is set, 256
  is subtracted, else 128. An unsigned number is stored with 128 subtracted, which is added again.
* The sign, exponent and mantissa of an fp8 number move to their places in a bfloat16. A multiplication by 2^120
  corrects the exponent, also of subnormal numbers.
* An index into a table is replaced by the table's number, in float32, which is rounded to the dtype of x.

Zeros are subtracted from the numbers. All such numbers but those of a table are exact in bfloat16 and in every other
dtype of x. The scales are applied after the products.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from jamba_server.kernels.ops import SUPER_GROUP, QuantizedWeight
from jamba_server.kernels.triton.formats import bits_of, chunk_of, format_of, group_of, has, kind_of, part_of
from jamba_server.kernels.triton.launch import INTERPRETED, cdiv, jit, rounded

SUPER = tl.constexpr(SUPER_GROUP)
# The largest number of weight elements that are packed at a time. Packing needs 4 bytes of temporary memory for each
# element.
CHUNK: Final = 1 << 22


class PackedWeight(NamedTuple):
    """Holds a packed quantised weight [..., N, K]. `rows` below counts the rows of all matrices.

    `words`: int32 [..., N, words per row]. `scales` [groups, 1, rows] has the dtype of the weight's scales. With
    offsets it is [groups, 2, rows], and the offset of a group follows its scale. `supers`, float16 [groups of 256, 1 or
    2, rows], has the factors of the second level. `zeros`: uint8 [groups, rows]. `table`: float32 [16]. A tensor that
    the format does not have is any tensor, and kernels do not read it. The scales of neighbouring rows are neighbours,
    because they are those of one tile. `format` is as in the module `formats`, or "" if the weight is not quantised.
    """

    words: Tensor
    scales: Tensor
    supers: Tensor
    zeros: Tensor
    table: Tensor
    inputs: int
    format: str

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Returns the tensors in the order in which kernels take them."""
        return self[:5]


def read(weight: Tensor | PackedWeight) -> PackedWeight:
    """Returns a weight [..., N, K] as a PackedWeight. The weight is already packed, or it is not quantised."""
    if isinstance(weight, PackedWeight):
        return weight
    return PackedWeight(weight, weight, weight, weight, weight, weight.shape[-1], "")


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Packs a quantised weight for the Triton kernels. Raises ValueError if there is no kernel for its format."""
    format, inputs = format_of(weight), weight.values.shape[-1]
    chunks, group = cdiv(inputs, chunk_of(format)), group_of(format)
    words = weight.values.new_empty(*weight.values.shape[:-1], chunks * part_of(format) // 2, dtype=torch.int32)
    step = len(words.flatten(0, -2)) if words.is_meta else max(1, CHUNK // inputs)
    pieces = (rows.flatten(0, -2).split(step) for rows in (weight.values.view(torch.int8), words))
    for some_values, some_words in zip(*pieces, strict=True):
        some_words.copy_(_words(some_values, format))
    # A group that is larger than those of the kernels becomes several groups with the same scale.
    groups = chunks * chunk_of(format) // group if group else 1
    repeats = min(cdiv(weight.group_size, group), groups) if group else 1
    scales, supers, zeros, table = _by_group(weight.scales, weight.offsets, groups, repeats), words, words, words
    if weight.super_scales is not None:
        supers = _by_group(weight.super_scales, weight.super_offsets, weight.super_scales.shape[-1])
    if weight.zeros is not None:
        zeros = _by_group(weight.zeros, None, groups, repeats).squeeze(1)
    if weight.table is not None:
        table = torch.tensor(weight.table, dtype=torch.float32, device=words.device)
    return PackedWeight(words, scales, supers, zeros, table, inputs, format)


def _by_group(scales: Tensor, offsets: Tensor | None, groups: int, repeats: int = 1) -> Tensor:
    """Returns the scales [..., N, G] and the offsets of all groups as one tensor [groups, 1 or 2, rows].

    Each group is repeated `repeats` times. Groups beyond the last one get zeros.
    """
    pair = torch.stack([scales] if offsets is None else [scales, offsets]).flatten(1, -2)
    pair = pair.repeat_interleave(repeats, dim=-1)[..., :groups]
    return F.pad(pair, (0, groups - pair.shape[-1])).permute(2, 0, 1).contiguous()


def _words(values: Tensor, format: str) -> Tensor:
    """Packs values [rows, K], which are passed as int8 bits, into int32 words [rows, words per row]."""
    bits, shift = bits_of(format), {"int4": 8, "uint8": -128}.get(kind_of(format), 0)
    numbers = (F.pad(values, (0, -values.shape[-1] % chunk_of(format))).int() + shift) & ((1 << bits) - 1)
    # The last dimension is split. The new shape is [rows, chunks, parts, words per chunk, halves per word].
    numbers = numbers.unflatten(-1, (-1, 16 // bits, part_of(format) // 2, 2))
    shifts = torch.arange(16 // bits, dtype=torch.int32, device=values.device) * bits
    halves = (numbers << shifts[:, None, None]).sum(2, dtype=torch.int32)
    return (halves[..., 0] | (halves[..., 1] << 16)).flatten(-2)


@jit
def numbers(
    words: tl.tensor, zero: tl.tensor, table: tl.tensor, part: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr
) -> tl.tensor:
    """Returns the numbers of one part of a chunk, minus the zeros: DTYPE [rows, inputs of a part].

    words: int32 [rows, words of a chunk]; zero: uint8 [rows, 1], which only a format with zeros reads.
    """
    kind: tl.constexpr = kind_of(FORMAT)
    if kind == "table":
        shifted = words >> (4 * part)
        index = tl.join(shifted & 15, (shifted >> 16) & 15)
        # A load of each number by its index would take much shared memory, because it would be prefetched.
        entries = tl.load(table + tl.arange(0, 16))[None, :] + tl.zeros((words.shape[0], 1), tl.float32)
        found = tl.gather(entries, tl.reshape(index, (words.shape[0], 2 * words.shape[1])), 1)
        x = rounded(found, DTYPE)
    else:
        if bits_of(FORMAT) == 4:
            x = int4_part(words, part, kind)
        elif part == 0:
            x = byte_part(words << 8, kind)
        else:
            x = byte_part(words, kind)
        if has(FORMAT, "zeros"):  # The number of the kind uint8 is stored with 128 subtracted.
            x = minus(x, (zero.to(tl.float32) - (128.0 if kind == "uint8" else 0.0)).to(tl.bfloat16))
        elif kind == "uint8":
            x = minus(x, tl.full((1, 1), -128.0, tl.float32).to(tl.bfloat16))
        x = x.to(DTYPE)
    return x


@jit
def factors(scales: tl.tensor, supers: tl.tensor, mask: tl.tensor, FORMAT: tl.constexpr) -> tl.tensor:
    """Returns the scales or the offsets at the pointers `scales`: float32. With two levels they are multiplied by the
    factors of the second level at the pointers `supers`."""
    x = tl.load(scales, mask=mask, other=0).to(tl.float32)
    if has(FORMAT, "two_levels"):
        x *= tl.load(supers, mask=mask, other=0.0).to(tl.float32)
    return x


@jit
def int4_part(words: tl.tensor, PART: tl.constexpr, KIND: tl.constexpr) -> tl.tensor:
    """Returns the 4-bit numbers in bits 4 * PART to 4 * PART + 3 of the two 16-bit halves of each word."""
    zero: tl.constexpr = 0x43084308 if KIND == "int4" else 0x43004300
    return difference((words >> (4 * PART)) & 0x000F000F | 0x43004300, tl.full(words.shape, zero, tl.int32))


@jit
def byte_part(words: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Returns the 8-bit numbers in the upper bytes of the two 16-bit halves of each word. An unsigned number is
    returned with 128 subtracted."""
    if KIND == "fp8":
        x = scaled((words >> 4) & 0x07F007F0 | words & -0x7FFF8000)
    else:
        lower = words >> 8
        x = difference(lower & 0x007F007F | 0x43004300, lower & 0x00800080 | 0x43004300)
    return x


# Triton's interpreter cannot compute in bfloat16. In the interpreter, the functions `difference`, `minus` and `scaled`
# compute in float32.


@jit
def difference(words: tl.tensor, others: tl.tensor) -> tl.tensor:
    """Returns words - others without rounding errors. Each word of the two tensors holds two bfloat16 numbers."""
    return minus(pairs(words), pairs(others))


@jit
def minus(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Returns x - y in bfloat16. The result must be exact."""
    if INTERPRETED:
        return (x.to(tl.float32) - y.to(tl.float32)).to(tl.bfloat16)
    return x - y


@jit
def scaled(words: tl.tensor) -> tl.tensor:
    """Multiplies by 2^120 without rounding errors. Each word of the tensor `words` holds two bfloat16 numbers."""
    x = pairs(words)
    if INTERPRETED:  # The interpreter's conversion to float32 turns subnormal numbers into zeros.
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return (bits.to(tl.float32, bitcast=True) * 2.0**120).to(tl.bfloat16)
    return x * 2.0**120


@jit
def pairs(words: tl.tensor) -> tl.tensor:
    """Unpacks the two bfloat16 numbers of each word, the number in the lower half first: [rows, 2 * words]."""
    lower = (words & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    upper = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(lower, upper), (words.shape[0], 2 * words.shape[1]))
