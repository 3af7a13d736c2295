"""Jamba (Lieber et al. 2024): a stack of Mamba and attention layers, each with a dense or an expert feed-forward layer.

Equal to transformers' `modeling_jamba.py` for whole prompts; unlike it, also for prompts fed in chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import chain

from torch import Tensor

from jamba_server.engine.batch import ForwardBatch
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.layers.attention import Attention
from jamba_server.engine.layers.embedding import Embedding
from jamba_server.engine.layers.linear import Linear
from jamba_server.engine.layers.mamba import Mamba
from jamba_server.engine.layers.mlp import Mlp
from jamba_server.engine.layers.moe import Moe
from jamba_server.engine.layers.norm import RmsNorm
from jamba_server.engine.layers.parameter import Backend, TensorMap, Units, keep
from jamba_server.engine.model_config import JambaConfig


class DecoderLayer:
    """A mixer and a feed-forward layer, each after a norm and each added to the residual stream."""

    def __init__(self, backend: Backend, config: JambaConfig, index: int) -> None:
        h, eps = config.hidden_size, config.rms_norm_eps
        self._name = f"model.layers.{index}."
        self._input_norm, self._pre_ff_norm = RmsNorm(backend, h, eps), RmsNorm(backend, h, eps)
        self.is_attention = config.is_attention(index)
        self._mixer = (Attention if self.is_attention else Mamba)(backend, config)
        self._feed_forward = (Moe if config.is_moe(index) else Mlp)(backend, config)

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch, caches: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns (a branch's output [T, H], the residual stream before it [T, H], None at first)."""
        x, residual = self._input_norm.add(x, residual)
        x = self._mixer(x, batch, *caches)
        x, residual = self._pre_ff_norm.add(x, residual)
        return self._feed_forward(x), residual

    def units(self) -> Units:
        yield self._input_norm.unit(f"{self._name}input_layernorm")
        yield from self._mixer.units(f"{self._name}{'self_attn' if self.is_attention else 'mamba'}.")
        yield self._pre_ff_norm.unit(f"{self._name}pre_ff_layernorm")
        yield from self._feed_forward.units(f"{self._name}feed_forward.")

    def ignored(self) -> frozenset[str]:
        """Written by conversions that took the unused rotary helper for a part of the model."""
        return frozenset([f"{self._name}self_attn.rotary_emb.inv_freq"] if self.is_attention else [])


class Jamba(ABC):
    """The model from token ids to hidden states and logits; its architectures differ in the head."""

    def __init__(self, config: JambaConfig, backend: Backend) -> None:
        self.config = config
        self._backend = backend
        self._embed_tokens = Embedding(self._backend, config.vocab_size, config.hidden_size)
        self._layers = [DecoderLayer(self._backend, config, i) for i in range(config.num_hidden_layers)]
        self._final_norm = RmsNorm(self._backend, config.hidden_size, config.rms_norm_eps)
        self._head = self._make_head()

    def forward(self, batch: ForwardBatch, storage: CacheStorage) -> Tensor:
        """Hidden states [T, H] after the final norm. Reads and writes the pages and state slots that `batch` names."""
        kv_caches, states = iter(storage.kv_layers), iter(storage.state_layers)
        x, residual = self._embed_tokens(batch.token_ids), None
        for layer in self._layers:
            x, residual = layer(x, residual, batch, next(kv_caches if layer.is_attention else states))
        return self._final_norm.add(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, H] -> float32 [n, V]; a classifier's [n, num_labels], of which a text's are its last token's."""
        return self._head(hidden).float()

    def tensor_map(self) -> TensorMap:
        """Where the tensors of a checkpoint go. Not after any of them has been packed."""
        tied = self._head.is_shared
        return TensorMap(
            units=(
                self._embed_tokens.unit("model.embed_tokens", self._pack_tied_head if tied else keep),
                *chain.from_iterable(layer.units() for layer in self._layers),
                self._final_norm.unit("model.final_layernorm"),
                *([] if tied else [self._head.unit("")]),
            ),
            ignored=self._other_heads().union(*(layer.ignored() for layer in self._layers)),
        )

    def _pack_tied_head(self) -> None:
        self._head.pack()
        if not self._head.is_quantized:
            self._embed_tokens.tie(self._head)

    @abstractmethod
    def _make_head(self) -> Linear: ...

    @abstractmethod
    def _other_heads(self) -> frozenset[str]:
        """Names of tensors that belong to heads which this architecture does not have."""


class JambaForCausalLM(Jamba):
    """Jamba with a language model head, which a tied one shares with the embedding."""

    def _make_head(self) -> Linear:
        shared = self._embed_tokens.weight if self.config.tie_word_embeddings else None
        parts = {"lm_head": self.config.vocab_size}
        return Linear(self._backend, self.config.hidden_size, parts, role="head", shared=shared)

    def _other_heads(self) -> frozenset[str]:
        # Some files hold a tied head all the same. One that is not equal makes the model untied before it is built.
        return frozenset(["score.weight", "lm_head.weight"] if self.config.tie_word_embeddings else ["score.weight"])


class JambaForSequenceClassification(Jamba):
    """Jamba with a score for each label."""

    def _make_head(self) -> Linear:
        return Linear(self._backend, self.config.hidden_size, {"score": self.config.num_labels}, role="other")

    def _other_heads(self) -> frozenset[str]:
        return frozenset(["lm_head.weight"])
