"""Products of quantised weights with activations of 8 bits, in compiled code. `src/a8.h` says what is computed.

All instruction sets compute the same bits, which are those of `kernels.reference.a8`, and the results are
batch-invariant.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jamba_server.kernels.cpu.arguments import units, whole
from jamba_server.kernels.cpu.formats import check
from jamba_server.kernels.cpu.library import DTYPES, INT, POINTER, library
from jamba_server.kernels.cpu.linear import Linear as PlainLinear
from jamba_server.kernels.cpu.linear import Packer as PanelPacker
from jamba_server.kernels.cpu.moe import RunExperts as PlainExperts
from jamba_server.kernels.int8_activations import ALL_KINDS, Kind, int8_parts
from jamba_server.kernels.ops import QuantizedWeight, StackedWeight, Weight

UNITS = ("portable", "avx2", "avx_vnni", "avx512", "avx512_vnni", "neon", "neon_dot", "neon_i8mm")
"""The instruction sets for which these products are compiled, in the order of the C++ enum `Units`."""

_FACTORS = {torch.float32: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}  # as in the C++ enum `Factor`


def units_of(level: str) -> str:
    """Returns the instruction set of products with 8-bit activations where other products use the level `level`.

    Raises KernelUnavailable if there is no compiled library, and ValueError if the machine lacks the level.
    """
    native = library()
    return UNITS[native.function("a8_units", INT, result=INT)(native.number(level))]


def machine_units() -> str:
    """Returns the instruction set of products with 8-bit activations at the library's own level.

    Raises KernelUnavailable if there is no compiled library.
    """
    return units_of(library().level())


class _Format(ctypes.Structure):
    """Contains the address and the format of a packed weight, with the layout of the C++ struct `A8Weights`."""

    _fields_ = (
        ("panels", POINTER),
        ("n", INT),
        ("k", INT),
        ("bits", INT),
        ("group_size", INT),
        ("scales", INT),
        ("offsets", INT),
        ("has_zeros", INT),
        ("bias", INT),
        ("level", INT),
        ("has_table", INT),
        ("table", ctypes.c_uint8 * 16),
    )


@dataclass(frozen=True, slots=True)
class PackedA8:
    """Contains one or more weights [N, K], packed for products with 8-bit activations. `src/a8.h` has the layout.

    `address` is the address of `form`, which describes the weights. `matrices` is the number of weights [N, K] that
    `panels` contains, one after the other.
    """

    panels: Tensor
    form: _Format
    address: int
    rows: int
    inputs: int
    matrices: int

    def check(self, x: Tensor) -> None:
        """Raises ValueError unless the rows of x have the length that this weight requires."""
        units("x", x, x.dtype, (x.shape[0], self.inputs))


class StackedA8(NamedTuple):
    """Contains one or more packed matrices that multiply the same input. Their outputs are stored one after the
    other."""

    parts: tuple[PackedA8, ...]


class Packer:
    """Packs weights for products with 8-bit activations, which use the instruction set of the packer `other`."""

    def __init__(self, other: PanelPacker) -> None:
        native, source = library(), [POINTER] * 6
        self._level, self._memory = other.level, other.memory
        self._bytes = native.function("a8_packed_bytes", POINTER, result=INT)
        self._pack = native.function("a8_pack", POINTER, *source, POINTER)

    def __call__(self, weight: QuantizedWeight) -> PackedA8:
        """Packs a weight [N, K], or E weights [E, N, K]. The panels of the E weights are stored one after the other."""
        rows, inputs = weight.values.shape[-2:]
        check(weight)
        form = _format(weight)
        form.level = self._level
        address = ctypes.addressof(form)
        tensors = (weight.values, weight.scales, weight.super_scales)
        parts = [_flat(part) for part in (*tensors, weight.offsets, weight.super_offsets, weight.zeros)]
        matrices, size = weight.values.numel() // (rows * inputs), self._bytes(address)
        panels = self._memory(size, matrices)
        for i in range(matrices):
            own = [None if part is None else part[i].contiguous() for part in parts]
            pointers = [None if part is None else part.data_ptr() for part in own]
            self._pack(address, *pointers, panels.data_ptr() + i * size)
        form.panels = panels.data_ptr()
        return PackedA8(panels, form, address, rows, inputs, matrices)


def _format(weight: QuantizedWeight) -> _Format:
    """Returns the description of a weight that is not packed yet. The struct keeps its address."""
    rows, inputs = weight.values.shape[-2:]
    is_signed = weight.values.dtype == torch.int8
    bias = 128 if weight.table is not None or (is_signed and weight.bits == 8) else 8 if is_signed else 0
    return _Format(
        n=rows,
        k=inputs,
        bits=weight.bits,
        group_size=min(weight.group_size, inputs),
        scales=_FACTORS[weight.scales.dtype],
        offsets=0 if weight.offsets is None else _FACTORS[weight.offsets.dtype],
        has_zeros=weight.zeros is not None,
        bias=bias,
        has_table=weight.table is not None,
        table=(ctypes.c_uint8 * 16)(*(int(number) + bias for number in weight.table or ())),
    )


def _flat(part: Tensor | None) -> Tensor | None:
    """Returns a tensor [..., N, G] of a weight as [number of matrices, N, G]."""
    return None if part is None else part.reshape(-1, *part.shape[-2:])


class Linear:
    """Implements the protocol `kernels.ops.Linear`: with 8-bit activations for the weights that
    `kernels.int8_activations.int8_parts` chooses, and with the implementation `other` for all other weights."""

    def __init__(self, other: PlainLinear, kinds: frozenset[Kind] = ALL_KINDS) -> None:
        self._other, self._kinds, self._pack = other, kinds, Packer(other.packer)
        self._rows = library().function("a8_rows", POINTER, POINTER, POINTER, INT, INT)
        self._run = library().function("a8_linear", POINTER, INT, *[POINTER] * 3, *[INT] * 3)

    @property
    def other(self) -> PlainLinear:
        """Returns the implementation of the products with activations of the model's dtype."""
        return self._other

    def pack(self, weight: Weight) -> Any:
        """Returns the weight in the layout of the implementation that computes products with it."""
        parts = int8_parts(weight.parts if isinstance(weight, StackedWeight) else (weight,), self._kinds)
        return self._other.pack(weight) if parts is None else StackedA8(tuple(map(self._pack, parts)))

    def rows(self, weight: Any, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        if not isinstance(weight, StackedA8):
            return self._other.rows(weight, ids, dtype)
        if dtype is None:
            raise TypeError("dtype must be given for rows of a quantised weight")
        [part] = weight.parts
        whole("ids", ids, torch.int64, (ids.shape[0],))
        out = ids.new_empty(len(ids), part.inputs, dtype=dtype)
        self._rows(part.address, ids.data_ptr(), out.data_ptr(), len(ids), DTYPES[dtype])
        return out

    def __call__(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """See the protocol `kernels.ops.Linear` for the arguments and the result."""
        if not isinstance(weight, StackedA8):
            return self._other(x, weight, bias)
        rows, item = sum(part.rows for part in weight.parts), x.element_size()
        if bias is not None:
            whole("bias", bias, x.dtype, (rows,))
        y = x.new_empty(x.shape[0], rows)
        start = 0  # the address of the first output of a part, in bytes from that of the first part
        for part in weight.parts:
            part.check(x)
            self._run(
                x.data_ptr(),
                x.stride(0),
                part.address,
                None if bias is None else bias.data_ptr() + start,
                y.data_ptr() + start,
                rows,
                x.shape[0],
                DTYPES[x.dtype],
            )
            start += part.rows * item
        return y

    def sums(self, x: Tensor, weight: Any, out: Tensor) -> None:
        """See the protocol `kernels.ops.Linear`. The weight is one that `other.pack` has packed."""
        self._other.sums(x, weight, out)


class Experts(NamedTuple):
    """Contains the packed weights of E experts: gate_up [E, 2F, H] and down [E, H, F].

    In gate_up, the F rows of each expert's gate come before the F rows of its up projection.
    """

    gate_up: PackedA8
    down: PackedA8


class RunExperts:
    """Implements the protocol `kernels.ops.RunExperts`: with 8-bit activations for the weights that
    `kernels.int8_activations.int8_parts` chooses, and with the implementation `other` for all other weights. One call
    reads each expert's weights only once, for all tokens."""

    def __init__(self, other: PlainExperts, kinds: frozenset[Kind] = ALL_KINDS) -> None:
        self._other, self._kinds, self._pack = other, kinds, Packer(other.packer)
        self._run = library().function("a8_experts", POINTER, INT, *(POINTER,) * 5, *(INT,) * 4)

    def pack(self, gate_up: Tensor | QuantizedWeight, down: Tensor | QuantizedWeight) -> Any:
        """Returns the experts' weights in the layout of the implementation that runs the experts.

        Raises ValueError if the shapes of gate_up and down do not match.
        """
        parts = int8_parts((gate_up, down), self._kinds)
        if parts is None:
            return self._other.pack(gate_up, down)
        first, second = map(self._pack, parts)
        if (first.rows, first.inputs) != (2 * second.inputs, second.rows) or first.matrices != second.matrices:
            raise ValueError(
                f"gate_up must be [E, 2F, H] and down [E, H, F]; they are {[first.matrices, first.rows, first.inputs]} "
                f"and {[second.matrices, second.rows, second.inputs]}"
            )
        return Experts(first, second)

    def __call__(self, x: Tensor, experts: Any, weights: Tensor, ids: Tensor) -> Tensor:
        """See the protocol `kernels.ops.RunExperts` for the arguments and the result."""
        if not isinstance(experts, Experts):
            return self._other(x, experts, weights, ids)
        experts.gate_up.check(x)
        weights, ids = weights.contiguous(), ids.contiguous()
        tokens, top_k = shape = x.shape[0], ids.shape[-1]
        whole("weights", weights, torch.float32, shape)
        whole("ids", ids, torch.int32, shape)
        y = x.new_empty(tokens, experts.down.rows)
        self._run(
            x.data_ptr(),
            x.stride(0),
            experts.gate_up.address,
            experts.down.address,
            weights.data_ptr(),
            ids.data_ptr(),
            y.data_ptr(),
            tokens,
            top_k,
            experts.down.matrices,
            DTYPES[x.dtype],
        )
        return y

    def sums(self, x: Tensor, experts: Any, weights: Tensor, ids: Tensor, out: Tensor) -> None:
        """See the protocol `kernels.ops.RunExperts`. The experts are those that `other.pack` has packed."""
        self._other.sums(x, experts, weights, ids, out)
