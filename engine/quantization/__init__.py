"""The table of quantised weight formats, and the policy that says which weights of a model are quantised.

This module works without torch, so that the command `jamba plan` does not need torch. The arithmetic is in the module
`quantize` and in one module for each format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from jamba_server.engine.config import EngineConfig, Quantization
from jamba_server.engine.errors import ConfigError

Role = Literal["attention", "mlp", "experts", "head", "mamba", "other"]
"""The part of the model that contains a weight matrix. "mamba" are in_proj and out_proj of the Mamba mixers. "other"
are matrices that this server never quantises itself: the embedding, x_proj, dt_proj, the router, and the head of a
classifier. The matrices x_proj, dt_proj and the matrix of the router are small, and rounding errors in these three
matrices would change the model's outputs strongly. If a checkpoint has them quantised, they stay as they are."""


Scale = Literal["float32", "float16", "two_levels"]
"""How a format stores the scales, and the offsets if it has them. With two levels, each group has a whole number of 8
bits, and 256 inputs share a float16 factor of these numbers."""

SUPER_GROUP: Final = 256
_SCALE_BYTES: Final[Mapping[Scale, int]] = {"float32": 4, "float16": 2, "two_levels": 1}


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A format of quantised weights. Each quantised number has `bits` bits. The numbers that this server makes lie
    between -limit and limit; a number of a file may also be one less. In each output row, every `group_size`
    consecutive inputs share one scale; if `group_size` is None, the whole row shares one scale.

    If `is_unsigned`, the numbers are 0 or more. If `has_offset`, a group also has an offset, which is stored as the
    scale is and is added to the product of scale and number. If `has_zero`, a group has a whole number of 8 bits, which
    is subtracted from the numbers. If there is a `table` of 16 numbers, the four bits of a number select one of them.
    `kernels.ops.QuantizedWeight` defines the weights of each format.
    """

    bits: int
    limit: int
    group_size: int | None
    scale: Scale = "float32"
    is_unsigned: bool = False
    has_offset: bool = False
    has_zero: bool = False
    table: tuple[float, ...] | None = None

    def num_bytes(self, rows: int, inputs: int) -> int:
        """Returns the size in bytes of a quantised weight [rows, inputs], with its scales, offsets and zeros."""
        groups = 1 if self.group_size is None else -(-inputs // self.group_size)
        factors = 2 if self.has_offset else 1
        per_row = groups * (factors * _SCALE_BYTES[self.scale] + self.has_zero)
        if self.scale == "two_levels":
            per_row += factors * 2 * -(-inputs // SUPER_GROUP)
        return rows * (-(-inputs * self.bits // 8) + per_row)


FORMATS: Final[Mapping[Quantization, Format]] = {
    "int8": Format(bits=8, limit=127, group_size=None),
    "int4": Format(bits=4, limit=7, group_size=128),
    "int4-g32": Format(bits=4, limit=7, group_size=32, scale="float16"),
    "fp8": Format(bits=8, limit=448, group_size=None),
}

NO_BLOCKS: Final[Mapping[str, Format]] = {}


@dataclass(frozen=True, slots=True)
class QuantizationPolicy:
    """The policy that says which weights are quantised, and in which format. This server itself quantises only matrices
    that multiply activations. The norms, the convolutions, and A and D of the Mamba layers are never quantised.

    The projections of the Mamba mixers are quantised only if `mamba` is set. The int8 recipe on the model cards of
    Jamba skips these projections as well: they are a small part of a large model, and their rounding errors accumulate
    in the recurrent state.

    If the checkpoint has quantised weights already, `stored` names the parts of the model that have them, and the
    weights of all other parts stay unquantised.

    If the checkpoint has quantised matrices of several formats, `blocks` maps the names of their weights to the formats
    in which the weights stay. All other weights are then unquantised.
    """

    quantization: Quantization | None = None
    mamba: bool = False
    stored: frozenset[Role] = frozenset()
    blocks: Mapping[str, Format] = field(default_factory=dict[str, Format], hash=False)

    @classmethod
    def of(
        cls,
        engine: EngineConfig,
        stored: frozenset[Role] = frozenset(),
        made_at_load: str | None = None,
        blocks: Mapping[str, Format] = NO_BLOCKS,
        stored_format: Quantization = "fp8",
    ) -> QuantizationPolicy:
        """Returns the policy for the options in `engine`. `stored` names the parts of the model whose weights have the
        format `stored_format` in the checkpoint. `made_at_load` is the quantisation method that config.json names if
        other servers apply this method while they load the weights, else None. `blocks` has the formats of weights that
        are stored in blocks. If a format is requested, such weights are converted to it.

        Raises ConfigError in three cases: `quantize_mamba` is set without a format, a format is requested although the
        checkpoint has `stored` weights, or no format is requested although config.json names a `made_at_load` method.
        """
        if made_at_load is not None and engine.quantization is None:
            raise ConfigError(
                f"The quantization_config of config.json asks for {made_at_load}, which quantises plain weights to "
                "int8 as they are loaded; add --quantization int8 to do the same here."
            )
        if engine.quantize_mamba and engine.quantization is None:
            raise ConfigError(f"quantize_mamba needs quantization, one of {', '.join(FORMATS)}.")
        if stored:
            if engine.quantization is not None:
                raise ConfigError(
                    f"quantization is {engine.quantization!r}, but the checkpoint's weights are {stored_format} "
                    "already (quantization_config in its config.json); leave the option out."
                )
            return cls(stored_format, "mamba" in stored, stored)
        kept = blocks if engine.quantization is None else NO_BLOCKS
        return cls(engine.quantization, engine.quantize_mamba, blocks=kept)

    def quantization_of(self, role: Role) -> Quantization | None:
        if self.stored:
            return self.quantization if role in self.stored else None
        if role == "other" or (role == "mamba" and not self.mamba):
            return None
        return self.quantization

    def num_bytes(self, role: Role, rows: int, inputs: int, *, dtype_bytes: int) -> int:
        """Returns the size in bytes of a weight [rows, inputs] in the part of the model that `role` names. Each number
        of an unquantised weight takes `dtype_bytes` bytes."""
        quantization = self.quantization_of(role)
        return rows * inputs * dtype_bytes if quantization is None else FORMATS[quantization].num_bytes(rows, inputs)


UNQUANTIZED: Final = QuantizationPolicy()
