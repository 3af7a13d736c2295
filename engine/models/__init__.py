"""The table of supported models: maps the architecture name in `config.json` to the class that implements it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

import torch
from torch import Tensor

from jamba_server.engine.batch import ForwardBatch
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.layers.parameter import Backend, TensorMap
from jamba_server.engine.model_config import CAUSAL_LM, SEQUENCE_CLASSIFICATION, JambaConfig
from jamba_server.engine.models.jamba import JambaForCausalLM, JambaForSequenceClassification
from jamba_server.engine.parallel.group import ALONE, Group
from jamba_server.engine.parallel.shards import Parts
from jamba_server.engine.parallel.stages import Stage
from jamba_server.engine.quantization import UNQUANTIZED, QuantizationPolicy
from jamba_server.kernels.ops import Kernels


class Model(Protocol):
    """The methods that the engine needs of a model. A model must not run before its weights are filled."""

    config: JambaConfig
    dtype: torch.dtype
    parts: Parts

    def __init__(self, config: JambaConfig, backend: Backend) -> None: ...

    def forward(self, batch: ForwardBatch, storage: CacheStorage, received: Tensor | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def tensor_map(self) -> TensorMap: ...


MODELS: Final[Mapping[str, type[Model]]] = {
    CAUSAL_LM: JambaForCausalLM,
    SEQUENCE_CLASSIFICATION: JambaForSequenceClassification,
}


def build_model(
    config: JambaConfig,
    kernels: Kernels,
    *,
    dtype: torch.dtype,
    device: torch.device,
    policy: QuantizationPolicy = UNQUANTIZED,
    group: Group = ALONE,
    stage: Stage | None = None,
) -> Model:
    """Returns a model of the class that implements `config.architecture`, or what a rank of `group` owns of it and of
    the layers of its `stage`. The weights of the model are not loaded yet. Raises ConfigError if the model cannot be
    divided among the ranks."""
    parts = Parts.of(config, group.shard, policy, stage)
    return MODELS[config.architecture](config, Backend(kernels, dtype, device, policy, parts, group))
