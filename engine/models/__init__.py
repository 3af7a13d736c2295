"""The registry of models: architecture name in `config.json` -> class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import torch
from torch import Tensor

from engine.batch import ForwardBatch
from engine.cache.storage import CacheStorage
from engine.layers.parameter import TensorMap
from engine.model_config import CAUSAL_LM, SEQUENCE_CLASSIFICATION, JambaConfig
from engine.models.jamba import JambaForCausalLM, JambaForSequenceClassification
from kernels.ops import Kernels


class Model(Protocol):
    """What the engine asks of a model. `weights` fills one; until then it must not run."""

    config: JambaConfig

    def __init__(self, config: JambaConfig, kernels: Kernels, *, dtype: torch.dtype, device: torch.device) -> None: ...

    def forward(self, batch: ForwardBatch, storage: CacheStorage) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def tensor_map(self) -> TensorMap: ...

    def finish_loading(self) -> None: ...


MODELS: Final[Mapping[str, type[Model]]] = {
    CAUSAL_LM: JambaForCausalLM,
    SEQUENCE_CLASSIFICATION: JambaForSequenceClassification,
}


def build_model(config: JambaConfig, kernels: Kernels, *, dtype: torch.dtype, device: torch.device) -> Model:
    """The model of `config.architecture`, its weights not yet filled."""
    return MODELS[config.architecture](config, kernels, dtype=dtype, device=device)
