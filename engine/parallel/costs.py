"""Counts what ranks exchange in a step. Works without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.parallel.shards import SECTIONS, Parts

_FLOAT32: Final = 4


@dataclass(frozen=True, slots=True)
class Exchanges:
    """The number of exchanges of the ranks of a stage in a step, and the bytes that a rank sends in them: in a step in
    which one sequence decodes a token, and for each sequence in a step of many."""

    count: int
    bytes_alone: int
    bytes_among_many: int


def exchanges(config: JambaConfig, parts: Parts, dtype_bytes: int) -> Exchanges:
    """Returns what the rank that owns `parts` of a model exchanges in a decode step with the ranks of its stage.

    Each row-parallel product is one exchange: x_proj, out_proj and o_proj of the mixers, and the feed-forward layers.
    In exact mode, a rank sends the float32 sums of its sections to each other rank, or, in a step of many sequences,
    those of some sequences to each of them, and then the results. Otherwise the cost is that of a ring that adds
    numbers of the model's dtype. Two more exchanges are the embedding and the logits.
    """
    shard, stage, size = parts.shard, parts.stage, parts.shard.size
    if size == 1:
        return Exchanges(0, 0, 0)
    layers, attention = len(stage.layers), sum(map(config.is_attention, stage.layers))
    mamba = layers - attention
    h, projected = config.hidden_size, config.mamba_dt_rank + 2 * config.mamba_d_state
    numbers = (mamba + attention + layers) * h + mamba * projected
    ring = alone = many = 2 * (size - 1) / size * dtype_bytes
    if shard.exact:
        alone = (size - 1) * SECTIONS // size * _FLOAT32
        many = (size - 1) / size * (SECTIONS // size * _FLOAT32 + dtype_bytes)
    logits = (size - 1) * -(-config.vocab_size // size) * dtype_bytes
    others = stage.is_first * h * ring + stage.is_last * logits
    count = 2 * mamba + attention + layers + stage.is_first + stage.is_last
    return Exchanges(count, round(numbers * alone + others), round(numbers * many + others))
