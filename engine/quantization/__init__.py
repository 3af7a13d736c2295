"""Weight formats: THE table of them, and the policy that says which weights are stored so.

No torch here, so that a plan can be made without it; `quantize` and one module a format do the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from jamba_server.engine.config import EngineConfig, Quantization
from jamba_server.engine.errors import ConfigError

Role = Literal["attention", "mlp", "experts", "head", "mamba", "other"]
"""What a weight is for. "mamba" are the mixers' in_proj and out_proj; "other" is never quantised: x_proj, dt_proj and
the router, which are small and to which the model is sensitive, and a classifier's scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """Numbers of `bits` bits from -limit to limit; `group_size` inputs of a row (None: all of them) share a float32
    scale."""

    bits: int
    limit: int
    group_size: int | None

    def num_bytes(self, rows: int, inputs: int) -> int:
        """Of a weight [rows, inputs] with its scales."""
        groups = 1 if self.group_size is None else -(-inputs // self.group_size)
        return rows * (-(-inputs * self.bits // 8) + 4 * groups)


FORMATS: Final[Mapping[Quantization, Format]] = {
    "int8": Format(bits=8, limit=127, group_size=None),
    "int4": Format(bits=4, limit=7, group_size=128),
    "fp8": Format(bits=8, limit=448, group_size=None),
}


@dataclass(frozen=True, slots=True)
class QuantizationPolicy:
    """Which weights are quantised, and how. Embedding, norms, convolution, A and D are no matrix products: never.

    The Mamba mixers are left alone unless `mamba`, as the model's authors advise (their model cards' int8 recipe skips
    them): they are a small part of a large model, and their errors go on in the recurrent state.

    Where the checkpoint holds weights in fp8 already, it has decided: `stored` are the roles of those.
    """

    quantization: Quantization | None = None
    mamba: bool = False
    stored: frozenset[Role] = frozenset()

    @classmethod
    def of(
        cls, engine: EngineConfig, stored: frozenset[Role] = frozenset(), made_at_load: str | None = None
    ) -> QuantizationPolicy:
        """Raises ConfigError for `quantize_mamba` without a format, for any wish where weights are `stored`, and for
        none where config.json wishes for weights `made_at_load` by a method that is not this server's."""
        if made_at_load is not None and engine.quantization is None:
            raise ConfigError(
                f"The quantization_config of config.json asks for {made_at_load}, which makes int8 of plain weights as "
                "they are loaded; ask for that with --quantization int8."
            )
        if engine.quantize_mamba and engine.quantization is None:
            raise ConfigError(f"quantize_mamba needs quantization, one of {', '.join(FORMATS)}.")
        if stored:
            if engine.quantization is not None:
                raise ConfigError(
                    f"quantization is {engine.quantization!r}, but the checkpoint's weights are fp8 already "
                    "(quantization_config in its config.json); leave it out."
                )
            return cls("fp8", "mamba" in stored, stored)
        return cls(engine.quantization, engine.quantize_mamba)

    def quantization_of(self, role: Role) -> Quantization | None:
        if self.stored:
            return self.quantization if role in self.stored else None
        if role == "other" or (role == "mamba" and not self.mamba):
            return None
        return self.quantization

    def num_bytes(self, role: Role, rows: int, inputs: int, *, dtype_bytes: int) -> int:
        """Of a weight [rows, inputs], which has `dtype_bytes` a number where it is not quantised."""
        quantization = self.quantization_of(role)
        return rows * inputs * dtype_bytes if quantization is None else FORMATS[quantization].num_bytes(rows, inputs)


UNQUANTIZED: Final = QuantizationPolicy()
