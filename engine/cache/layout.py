"""CacheLayout: what each layer of a model keeps of its sequences. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

CacheDtype = Literal["bfloat16", "float16", "float32", "float8_e4m3fn", "int8"]  # torch's names
Unit = Literal["page", "slot", "saved"]
DTYPE_BYTES: Final[Mapping[CacheDtype, int]] = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "int8": 1,
}


class Kept(NamedTuple):
    """A tensor."""

    shape: tuple[int, ...]
    dtype: CacheDtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """The tensors that one layer keeps, by name: in each page, which has some tokens of a sequence; in each slot, which
    has the state of a sequence; and in each saved state, which are those of a slot unless it is compressed."""

    page: Mapping[str, Kept] = field(default_factory=dict[str, Kept])
    slot: Mapping[str, Kept] = field(default_factory=dict[str, Kept])
    saved: Mapping[str, Kept] = field(default_factory=dict[str, Kept])


def attention_cache(*, block_size: int, num_kv_heads: int, head_dim: int, dtype: CacheDtype) -> LayerCache:
    """kv: K and V of a block of tokens, [2, block_size, G, Z]."""
    return LayerCache(page={"kv": Kept((2, block_size, num_kv_heads, head_dim), dtype)})


def mamba_cache(*, d_inner: int, d_state: int, d_conv: int, dtype: CacheDtype, compressed: bool) -> LayerCache:
    """conv: the last W-1 inputs of the convolution, [W-1, D]; ssm: the SSM state in float32, [D, S]. Compressed, this
    is values in one byte each, [D, S], and a float32 scale for each channel, [D]."""
    conv, ssm = Kept((d_conv - 1, d_inner), dtype), Kept((d_inner, d_state), "float32")
    slot = {"conv": conv, "ssm": ssm}
    small = {"conv": conv, "values": Kept(ssm.shape, "int8"), "scales": Kept((d_inner,), "float32")}
    return LayerCache(slot=slot, saved=small if compressed else slot)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Layers in the model's order. Those that keep a tensor of one name keep it in one shape and dtype."""

    block_size: int
    layers: tuple[LayerCache, ...]

    @property
    def compresses(self) -> bool:
        """Whether saved states take places of their own."""
        return any(layer.saved != layer.slot for layer in self.layers)

    def stacked(self, unit: Unit, name: str) -> Kept:
        """That tensor of all layers that keep it, one after the other: [layers, ...]."""
        tensors: list[Kept] = [kept[name] for layer in self.layers if name in (kept := _kept(layer, unit))]
        assert len(set(tensors)) == 1, f"{name} of a {unit} has {len(set(tensors))} shapes"
        return Kept((len(tensors), *tensors[0].shape), tensors[0].dtype)

    def num_bytes(self, unit: Unit) -> int:
        """What one unit takes, of all layers."""
        return sum(kept.num_bytes for layer in self.layers for kept in _kept(layer, unit).values())


def _kept(layer: LayerCache, unit: Unit) -> Mapping[str, Kept]:
    return {"page": layer.page, "slot": layer.slot, "saved": layer.saved}[unit]
