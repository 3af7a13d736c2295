"""Says which layers of a model each stage of a pipeline owns. Works without torch.

A stage is a rank, or several ranks that divide its layers among each other. The first stage looks up the embeddings,
the last one computes the logits and samples. Each stage hands the hidden states of a step to the next stage.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from jamba_server.engine.errors import ConfigError

EMBEDDING: Final = "model.embed_tokens"
FINAL_NORM: Final = "model.final_layernorm"
HEADS: Final = ("lm_head", "score")
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Stage:
    """One of `count` stages, which owns the layers in `layers` of a model with `total` layers."""

    index: int
    count: int
    layers: range
    total: int

    @classmethod
    def whole(cls, num_layers: int) -> Stage:
        """Returns the only stage of a model that is not divided by layers."""
        return cls(0, 1, range(num_layers), num_layers)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def is_elsewhere(self, name: str) -> bool:
        """Returns whether a tensor of a checkpoint belongs to another stage. A head that is tied to the embedding makes
        the last stage load the embedding, too; that is for the caller to know."""
        if (found := _LAYER.match(name)) is not None:
            return int(found[1]) < self.total and int(found[1]) not in self.layers
        module = name.rpartition(".")[0]
        if module == EMBEDDING:
            return not self.is_first
        return module in (FINAL_NORM, *HEADS) and not self.is_last

    def __str__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        which = f"layer {first}" if first == last else f"layers {first} to {last}"
        return f"stage {self.index + 1} of {self.count} with {which}"


def even_stages(num_layers: int, count: int) -> tuple[Stage, ...]:
    """Returns `count` stages whose numbers of layers differ by one at most; later stages have more. Raises ConfigError
    if there are fewer layers than stages."""
    if not 1 <= count <= num_layers:
        raise ConfigError(
            f"pipeline_parallel_size is {count}; it must be at least 1 and at most {num_layers}, the number of the "
            "model's layers."
        )
    return stages_with_borders(tuple(i * num_layers // count for i in range(count + 1)))


def stages_with_borders(borders: tuple[int, ...]) -> tuple[Stage, ...]:
    """Returns stages that begin and end at the layers `borders`, which ascend from 0 to the number of layers."""
    count, total = len(borders) - 1, borders[-1]
    return tuple(Stage(i, count, range(borders[i], borders[i + 1]), total) for i in range(count))
