"""CacheLayout: the tensors that each layer of a model keeps for its sequences. Works without torch."""

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
    """Shape and dtype of a tensor that a layer keeps in the cache."""

    shape: tuple[int, ...]
    dtype: CacheDtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """The tensors that one layer keeps, by name. `page` are those of a page, which holds `block_size` tokens of a
    sequence. `slot` are those of a state slot, which holds the state of a sequence. `saved` are those of a saved state:
    the same as in a slot, unless saved states are compressed."""

    page: Mapping[str, Kept] = field(default_factory=dict[str, Kept])
    slot: Mapping[str, Kept] = field(default_factory=dict[str, Kept])
    saved: Mapping[str, Kept] = field(default_factory=dict[str, Kept])


def attention_cache(*, block_size: int, num_kv_heads: int, head_dim: int, dtype: CacheDtype) -> LayerCache:
    """Returns what an attention layer keeps: `kv`, the keys and values of a page, [2, block_size, num_kv_heads,
    head_dim]."""
    return LayerCache(page={"kv": Kept((2, block_size, num_kv_heads, head_dim), dtype)})


def mamba_cache(*, d_inner: int, d_state: int, d_conv: int, dtype: CacheDtype, compressed: bool) -> LayerCache:
    """Returns what a Mamba layer keeps, where D is d_inner, S d_state and W d_conv. A slot has `conv`, the last W-1
    inputs of the convolution, [W-1, D], and `ssm`, the SSM state in float32, [D, S]. A compressed saved state has the
    SSM state as int8 `values`, [D, S], and float32 `scales`, one a channel, [D]."""
    conv, ssm = Kept((d_conv - 1, d_inner), dtype), Kept((d_inner, d_state), "float32")
    slot = {"conv": conv, "ssm": ssm}
    small = {"conv": conv, "values": Kept(ssm.shape, "int8"), "scales": Kept((d_inner,), "float32")}
    return LayerCache(slot=slot, saved=small if compressed else slot)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The caches of all layers, in the model's order. Tensors of one name have the same shape and dtype in all layers
    that keep them."""

    block_size: int
    layers: tuple[LayerCache, ...]

    @property
    def compresses(self) -> bool:
        """Returns whether saved states are compressed, and so do not lie in state slots."""
        return any(layer.saved != layer.slot for layer in self.layers)

    def stacked(self, unit: Unit, name: str) -> Kept:
        """Returns the shape and dtype of the tensor `name` of one unit, stacked over all layers that keep such a
        tensor: [layers, ...]."""
        tensors: list[Kept] = [kept[name] for layer in self.layers if name in (kept := _kept(layer, unit))]
        assert len(set(tensors)) == 1, f"{name} of a {unit} has {len(set(tensors))} shapes"
        return Kept((len(tensors), *tensors[0].shape), tensors[0].dtype)

    def num_bytes(self, unit: Unit) -> int:
        """Returns the bytes that one unit (a page, a slot or a saved state) needs in all layers together."""
        return sum(kept.num_bytes for layer in self.layers for kept in _kept(layer, unit).values())


def _kept(layer: LayerCache, unit: Unit) -> Mapping[str, Kept]:
    return {"page": layer.page, "slot": layer.slot, "saved": layer.saved}[unit]
