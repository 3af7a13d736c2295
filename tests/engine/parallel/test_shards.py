"""Which part of a model a rank owns: the parts fit together, and sections do not depend on the number of ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.parallel.shards import SECTIONS, SIZES, Own, Parts, Shard, head_borders, section_borders
from jamba_server.engine.pieces import Piece, section
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.quantization.quantize import quantize
from jamba_server.engine.weight_sizes import rank_weight_bytes, weight_bytes
from jamba_server.kernels.ops import QuantizedWeight
from tests.geometries import write_geometry


def config_of(folder: Path, name: str, **changes: Any) -> JambaConfig:
    return replace(load_model_config(write_geometry(folder, name)), **changes)


@pytest.mark.parametrize("total", [1, 7, 8, 24, 48, 96, 100, 640, 5120, 24576])
@pytest.mark.parametrize("group", [1, 32, 128, 256])
def test_sections_are_all_inputs_in_order(total: int, group: int) -> None:
    borders = section_borders(total, group)
    assert len(borders) == SECTIONS + 1
    assert (borders[0], borders[-1]) == (0, total)
    assert all(a <= b for a, b in pairwise(borders))
    assert all(border % group == 0 for border in borders[:-1])
    if total >= SECTIONS * 32 * group:
        sizes = [b - a for a, b in pairwise(borders)]
        assert all(border % 32 == 0 for border in borders[:-1])
        assert max(sizes) - min(sizes) <= 32 * group, "sections are as equal as the unit allows"


@pytest.mark.parametrize("size", SIZES)
def test_ranks_have_the_sections_of_one_rank(size: int) -> None:
    borders = section_borders(5120)
    whole = Shard(exact=True).own(borders)
    parts = [Shard(rank, size, exact=True).own(borders) for rank in range(size)]
    absolute = [(part.start + a, part.start + b) for part in parts for a, b in part.sections]
    assert absolute == list(whole.sections) == list(pairwise(borders))
    assert sum(map(len, parts)) == 5120


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(20, 1), (32, 8), (64, 8), (4, 2), (32, 32), (24, 3), (48, 12), (40, 4)]
)
def test_query_heads_stay_with_their_kv_head(heads: int, kv_heads: int) -> None:
    """In a rank's attention, query head h reads KV head h // (Q // G), as in the whole model."""
    borders, group = head_borders(heads, kv_heads), heads // kv_heads
    assert borders is not None
    for size in SIZES:
        for rank in range(size):
            own = Shard(rank, size).own(borders)
            if not len(own):
                continue
            kv = range(own.start // group, -(-own.stop // group))
            assert len(own) % len(kv) == 0
            for local in range(len(own)):
                assert kv[local // (len(own) // len(kv))] == (own.start + local) // group


@pytest.mark.parametrize("name", ["mini", "large", "3b"])
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_weights_of_ranks_add_up(name: str, size: int, quantization: Any, tmp_path: Path) -> None:
    """Only what every rank has is counted again: norms, routers, KV heads, and scales of whole rows."""
    config, policy = config_of(tmp_path, name), QuantizationPolicy(quantization)
    parts = [Parts.of(config, Shard(rank, size), policy) for rank in range(size)]
    total = sum(rank_weight_bytes(config, 2, parts=own, policy=policy) for own in parts)
    whole = weight_bytes(config, 2, policy=policy)
    assert whole <= total <= 1.02 * whole
    if quantization is None:
        h, layers, experts = config.hidden_size, config.num_hidden_layers, config.num_experts
        small = (2 * layers + 1) * h + len(config.mamba_layers) * (config.mamba_dt_rank + 2 * config.mamba_d_state)
        small += sum(config.is_moe(i) for i in range(layers)) * h * experts
        kv = len(config.attention_layers) * 2 * config.head_dim * h
        copies = sum(len(own.kv_heads) for own in parts) - config.num_key_value_heads
        assert total == whole + 2 * ((size - 1) * small + kv * copies)


def test_what_a_rank_would_have_nothing_of_is_an_error(tmp_path: Path) -> None:
    config = config_of(tmp_path, "3b", num_attention_heads=4)
    with pytest.raises(ConfigError, match="num_attention_heads is 4, and rank 0 would have none of it"):
        Parts.of(config, Shard(0, 8))
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3; it must be one of 1, 2, 4, 8"):
        Parts.of(config, Shard(0, 3))
    odd_heads = config_of(tmp_path, "3b", head_dim=80)
    with pytest.raises(ConfigError, match="groups of 128 inputs, which do not end where"):
        Parts.of(odd_heads, Shard(0, 2), QuantizationPolicy("int4"))
    assert Parts.of(odd_heads, Shard(0, 2), QuantizationPolicy("int4-g32")).heads.stop == 10


def test_pieces_of_tensors() -> None:
    tensor = torch.arange(24).view(2, 12)
    assert Piece.of(Own(12, 0, 12), 1) is None
    halves = Piece.of(Own(6, 2, 5), 1, times=2)
    assert halves is not None
    assert halves == Piece(1, 12, ((2, 5), (8, 11)))
    assert halves.cut_tensor(tensor).tolist() == [[2, 3, 4, 8, 9, 10], [14, 15, 16, 20, 21, 22]]


@pytest.mark.parametrize("quantization", ["int8", "int4-g32", "fp8"])
def test_sections_of_quantised_weights_stand_for_the_same_numbers(quantization: Any) -> None:
    weight = torch.randn(3, 5, 100, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight, quantization)
    parts = [section(whole, start, stop) for start, stop in ((0, 32), (32, 96), (96, 100))]
    assert all(isinstance(part, QuantizedWeight) for part in parts)
    numbers = torch.cat([part.dequantized() for part in parts if isinstance(part, QuantizedWeight)], dim=-1)
    assert (numbers == whole.dequantized()).all()


def test_two_levels_of_scales_are_divided_at_their_own_borders() -> None:
    values = torch.randint(-100, 100, (4, 600), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    weight = QuantizedWeight(
        values,
        torch.randint(1, 60, (4, 38), dtype=torch.int8, generator=torch.Generator().manual_seed(2)),
        16,
        8,
        super_scales=torch.rand(4, 3, generator=torch.Generator().manual_seed(3)).half(),
    )
    parts = [section(weight, start, stop) for start, stop in ((0, 256), (256, 512), (512, 600))]
    numbers = torch.cat([part.dequantized() for part in parts if isinstance(part, QuantizedWeight)], dim=-1)
    assert (numbers == weight.dequantized()).all()
