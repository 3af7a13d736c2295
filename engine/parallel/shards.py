"""Says which part of a model each rank owns, and where the sections of a sum begin. Works without torch.

A matrix product whose inputs are divided among ranks is a sum over the ranks. The order of floating-point additions
decides the last bits of a sum. In exact mode, the inputs of such a product are therefore divided into eight sections at
borders that do not depend on the number of ranks. Each section is summed by one rank, and the eight results are added
in one order. So 1, 2, 4 and 8 ranks compute the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.parallel.stages import Stage
from jamba_server.engine.quantization import FORMATS, SUPER_GROUP, UNQUANTIZED, Format, QuantizationPolicy, Role

SECTIONS: Final = 8
SIZES: Final = (1, 2, 4, 8)  # the numbers of ranks among which eight sections can be divided evenly
_UNIT: Final = 32  # sections begin at multiples of this number of inputs, unless a product has few inputs
_VOCABULARY_UNIT: Final = 32
_LARGE_VOCABULARY: Final = 4096  # from this size on, the parts of a vocabulary are multiples of `_VOCABULARY_UNIT`


@dataclass(frozen=True, slots=True)
class Own:
    """What a rank owns of `total` neighbouring rows, heads, channels or inputs: those from `start` to `stop` - 1.

    `sections` are the sections that the rank sums. Each is given by its start and its stop, counted from `start`.
    """

    total: int
    start: int
    stop: int
    sections: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return len(self) == self.total

    def times(self, factor: int) -> Own:
        """Returns the same part where each of the numbers stands for `factor` neighbouring numbers."""
        sections = tuple((start * factor, stop * factor) for start, stop in self.sections)
        return Own(self.total * factor, self.start * factor, self.stop * factor, sections)


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `size` ranks. `exact` says whether sums have the same order for every number of ranks."""

    rank: int = 0
    size: int = 1
    exact: bool = False

    def own(self, borders: tuple[int, ...]) -> Own:
        """Returns what this rank owns if sections begin and end at the nine numbers `borders`."""
        each = SECTIONS // self.size
        mine = borders[self.rank * each : (self.rank + 1) * each + 1]
        sections = tuple((start - mine[0], stop - mine[0]) for start, stop in pairwise(mine))
        return Own(borders[-1], mine[0], mine[-1], sections)


WHOLE: Final = Shard()


def check_size(size: int) -> None:
    """Raises ConfigError unless `size` is a number of ranks that is supported."""
    if size not in SIZES:
        raise ConfigError(f"tensor_parallel_size is {size}; it must be one of {', '.join(map(str, SIZES))}.")


def section_borders(total: int, group: int = 1) -> tuple[int, ...]:
    """Returns the borders of the sections of `total` inputs: nine numbers from 0 to `total`, in ascending order.

    If the weight is quantised in groups of inputs, `group` is their size, and borders are multiples of it. They are
    also multiples of 32, unless that would make fewer than eight sections. Sections may differ in size.
    """
    unit = math.lcm(_UNIT, group)
    while group == 1 and unit > 2 and total // unit < SECTIONS:
        unit //= 2
    units = -(-total // unit)
    return tuple(min(total, i * units // SECTIONS * unit) for i in range(SECTIONS + 1))


def head_borders(heads: int, kv_heads: int, unit: int = 1) -> tuple[int, ...] | None:
    """Returns the borders of the sections of the query heads of attention, or None if there are none.

    A section has either whole groups of query heads, each group with its KV head, or a part of one group. `unit` is a
    number of heads, and all borders are multiples of it.
    """
    group = heads // kv_heads
    if SECTIONS % kv_heads:
        return None if group % unit else tuple(i * kv_heads // SECTIONS * group for i in range(SECTIONS + 1))
    if group % unit:
        return None
    each = SECTIONS // kv_heads  # the number of sections of a group
    inside = [i * (group // unit) // each * unit for i in range(each)]
    return (*(kv * group + start for kv in range(kv_heads) for start in inside), heads)


@dataclass(frozen=True, slots=True)
class Parts:
    """What one rank owns of a model.

    `heads` are the query heads of attention and `kv_heads` its KV heads, which several ranks may own. `channels` are
    those of the Mamba layers. `inner` are the intermediate activations of dense feed-forward layers and `experts` those
    of each expert. `vocabulary` are rows of the embedding and of the language model head; `vocabulary_rows` is the
    largest number of rows that a rank owns. The rank owns these parts of the layers of its `stage` only.
    """

    shard: Shard
    heads: Own
    kv_heads: Own
    channels: Own
    inner: Own
    experts: Own
    vocabulary: Own
    vocabulary_rows: int
    stage: Stage

    @classmethod
    def of(
        cls,
        config: JambaConfig,
        shard: Shard = WHOLE,
        policy: QuantizationPolicy = UNQUANTIZED,
        stage: Stage | None = None,
    ) -> Parts:
        """Returns what `shard` owns of a model whose weights have the formats that `policy` says. If `stage` is None,
        the rank owns a part of every layer.

        Raises ConfigError if a rank would own nothing of some layer, or if a group of a quantised weight would be
        divided between two sections.
        """
        check_size(shard.size)
        heads = _own_heads(config, shard, _group(config, policy, ("o_proj",), "attention"))
        group = config.num_attention_heads // config.num_key_value_heads
        channel_group = math.lcm(
            _group(config, policy, ("out_proj",), "mamba"), _group(config, policy, ("x_proj",), "other")
        )
        per_rank = -(-config.vocab_size // shard.size)
        if config.vocab_size >= _LARGE_VOCABULARY:
            per_rank = -(-per_rank // _VOCABULARY_UNIT) * _VOCABULARY_UNIT
        start, stop = (min(i * per_rank, config.vocab_size) for i in (shard.rank, shard.rank + 1))
        down = "down_proj"
        parts = cls(
            shard,
            heads=heads,
            kv_heads=Own(config.num_key_value_heads, heads.start // group, -(-heads.stop // group)),
            channels=shard.own(section_borders(config.d_inner, channel_group)),
            inner=shard.own(section_borders(config.intermediate_size, _group(config, policy, (down,), "mlp"))),
            experts=shard.own(section_borders(config.intermediate_size, _group(config, policy, (down,), "experts"))),
            vocabulary=Own(config.vocab_size, start, stop),
            vocabulary_rows=per_rank,
            stage=Stage.whole(config.num_hidden_layers) if stage is None else stage,
        )
        parts._check()
        return parts

    @property
    def is_whole(self) -> bool:
        """Returns whether this is all of the model, with sums that are not divided into sections."""
        return not self.divides_sums and self.num_ranks == 1

    @property
    def divides_sums(self) -> bool:
        """Returns whether products are summed in sections or by several ranks."""
        return self.shard != WHOLE

    @property
    def num_ranks(self) -> int:
        """Returns the number of ranks that run the model."""
        return self.shard.size * self.stage.count

    def _check(self) -> None:
        owned = {
            "num_attention_heads": self.heads,
            "mamba_expand * hidden_size": self.channels,
            "intermediate_size": self.inner,
            "intermediate_size of the experts": self.experts,
            "vocab_size": self.vocabulary,
        }
        for name, own in owned.items():
            if not len(own):
                raise ConfigError(
                    f"tensor_parallel_size {self.shard.size} is too large for this model: {name} is {own.total}, and "
                    f"rank {self.shard.rank} would have none of it. Sections of sums end at groups of quantised "
                    "weights and at multiples of 32, or at heads."
                )


def _own_heads(config: JambaConfig, shard: Shard, group: int) -> Own:
    borders = head_borders(
        config.num_attention_heads, config.num_key_value_heads, group // math.gcd(group, config.head_dim)
    )
    if borders is not None:
        return shard.own(borders)
    if shard.size > 1 or shard.exact:
        raise ConfigError(
            f"tensor_parallel_size {shard.size} does not work with this model's o_proj: its weights are quantised in "
            f"groups of {group} inputs, which do not end where the {config.num_attention_heads} heads of size "
            f"{config.head_dim} can be divided. Use --quantization int4-g32 or another format."
        )
    return Own(config.num_attention_heads, 0, config.num_attention_heads)


def _group(config: JambaConfig, policy: QuantizationPolicy, names: tuple[str, ...], role: Role) -> int:
    """Returns the number of inputs at whose multiples the matrices `names` of a part of the model can be divided."""
    if policy.blocks:
        is_expert = role == "experts"
        formats: Iterable[Format] = (
            form
            for name, form in policy.blocks.items()
            if name.rsplit(".", 2)[-2] in names and (".experts." in name) == is_expert
        )
    else:
        quantization = policy.quantization_of(role)
        formats = () if quantization is None else (FORMATS[quantization],)
    sizes = [SUPER_GROUP if form.scale == "two_levels" else form.group_size or 1 for form in formats]
    return math.lcm(*sizes) if sizes else 1
