"""The registry of models: architecture name in `config.json` -> class."""

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
from jamba_server.engine.quantization import UNQUANTIZED, QuantizationPolicy
from jamba_server.kernels.ops import Kernels


class Model(Protocol):
    """What the engine asks of a model. `weights` fills one; until then it must not run."""

    config: JambaConfig

    def __init__(self, config: JambaConfig, backend: Backend) -> None: ...

    def forward(self, batch: ForwardBatch, storage: CacheStorage) -> Tensor: ...

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
) -> Model:
    """The model of `config.architecture`, its weights not yet filled."""
    return MODELS[config.architecture](config, Backend(kernels, dtype, device, policy))
