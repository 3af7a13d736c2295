"""CacheLayout: lists the cache tensors of each layer of a model, with shape and dtype. Works without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

# The dtypes that cache tensors may have, under the names that torch gives them.
CacheDtype = Literal["bfloat16", "float16", "float32", "float8_e4m3fn", "int8"]
Unit = Literal["page", "slot", "saved"]
DTYPE_BYTES: Final[Mapping[CacheDtype, int]] = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "int8": 1,
}


class Kept(NamedTuple):
    """Shape and dtype of a tensor that a layer stores in the cache."""

    shape: tuple[int, ...]
    dtype: CacheDtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCache:
    """The cache tensors of one layer, each found by its name. The field `page` has the tensors of one KV page, which
    holds `block_size` tokens of a sequence. The field `slot` has the tensors of one state slot, which holds the Mamba
    state of a running sequence. The field `saved` has the tensors of one saved state, from which later requests can
    continue. A saved state has the same tensors as a slot, unless saved states are compressed."""

    page: Mapping[str, Kept] = field(default_factory=dict[str, Kept])
    slot: Mapping[str, Kept] = field(default_factory=dict[str, Kept])
    saved: Mapping[str, Kept] = field(default_factory=dict[str, Kept])


def attention_cache(*, block_size: int, num_kv_heads: int, head_dim: int, dtype: CacheDtype) -> LayerCache:
    """Returns the cache tensors of an attention layer: each page has one tensor `kv` of shape [2, block_size,
    num_kv_heads, head_dim], which holds the keys and then the values."""
    return LayerCache(page={"kv": Kept((2, block_size, num_kv_heads, head_dim), dtype)})


def mamba_cache(*, d_inner: int, d_state: int, d_conv: int, dtype: CacheDtype, compressed: bool) -> LayerCache:
    """Returns the cache tensors of a Mamba layer. D stands for d_inner, S for d_state and W for d_conv. A slot has
    `conv` [W-1, D], the last W-1 inputs of the convolution, and `ssm` [D, S], the SSM state in float32. A compressed
    saved state has two tensors instead of `ssm`: int8 `values` [D, S], and float32 `scales` [D] with one scale for each
    channel."""
    conv, ssm = Kept((d_conv - 1, d_inner), dtype), Kept((d_inner, d_state), "float32")
    slot = {"conv": conv, "ssm": ssm}
    small = {"conv": conv, "values": Kept(ssm.shape, "int8"), "scales": Kept((d_inner,), "float32")}
    return LayerCache(slot=slot, saved=small if compressed else slot)


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """The cache tensors of all layers, in the order of the model's layers. If several layers have a tensor of the same
    name, its shape and dtype are the same in all of them."""

    block_size: int
    layers: tuple[LayerCache, ...]

    @property
    def compresses(self) -> bool:
        """Returns whether saved states are compressed. Compressed states are stored outside the state slots."""
        return any(layer.saved != layer.slot for layer in self.layers)

    def stacked(self, unit: Unit, name: str) -> Kept:
        """Returns the shape and dtype of the tensor that holds the tensors called `name` of all layers, for one page,
        one slot or one saved state. Its first dimension is the number of layers that have a tensor of this name. If no
        layer has one, as in a stage of a pipeline without attention layers, the result is a tensor without elements."""
        tensors: list[Kept] = [kept[name] for layer in self.layers if name in (kept := _kept(layer, unit))]
        if not tensors:
            return Kept((0, 0, 0, 0, 0) if unit == "page" else (0, 0, 0), "float32")
        assert len(set(tensors)) == 1, f"{name} of a {unit} has {len(set(tensors))} shapes"
        return Kept((len(tensors), *tensors[0].shape), tensors[0].dtype)

    def num_bytes(self, unit: Unit) -> int:
        """Returns the size in bytes of one page, one slot or one saved state, summed over all layers."""
        return sum(kept.num_bytes for layer in self.layers for kept in _kept(layer, unit).values())


def _kept(layer: LayerCache, unit: Unit) -> Mapping[str, Kept]:
    return {"page": layer.page, "slot": layer.slot, "saved": layer.saved}[unit]
