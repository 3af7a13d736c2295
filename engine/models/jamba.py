"""Jamba (Lieber et al. 2024): a stack of Mamba and attention layers, each with a dense or an expert feed-forward layer.

For a prompt that is computed in one step, the model computes the same logits as the model in transformers
(`modeling_jamba.py`). Unlike the model in transformers, this model also computes the same logits if the prompt is split
into chunks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
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
from jamba_server.engine.layers.parameter import Backend, TensorMap, Unit, Units
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.parallel.stages import FINAL_NORM
from jamba_server.engine.pieces import Piece


class DecoderLayer:
    """One layer of the model: a mixer (Mamba or attention), then a feed-forward layer. The input of the mixer and the
    input of the feed-forward layer are normalised first. The output of the mixer and the output of the feed-forward
    layer are added to the residual stream."""

    def __init__(self, backend: Backend, config: JambaConfig, index: int) -> None:
        h, eps = config.hidden_size, config.rms_norm_eps
        self._name = f"model.layers.{index}."
        self._input_norm, self._pre_ff_norm = RmsNorm(backend, h, eps), RmsNorm(backend, h, eps)
        self.is_attention = config.is_attention(index)
        self._mixer_name = f"{self._name}{'self_attn' if self.is_attention else 'mamba'}."
        self._mixer = (Attention if self.is_attention else Mamba)(backend.under(self._mixer_name), config)
        self._feed_forward_name = f"{self._name}feed_forward."
        self._feed_forward = (Moe if config.is_moe(index) else Mlp)(backend.under(self._feed_forward_name), config)

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch, caches: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Takes and returns two tensors [T, H]. The two tensors that are taken are the output of the previous layer's
        feed-forward layer, and the residual stream, to which this output is not added yet. The two tensors that are
        returned are the output of this layer's feed-forward layer, and the residual stream without this output. The
        first layer of the model takes the embeddings and None. `caches` are this layer's K and V pages, or its
        convolution and SSM states."""
        x, residual = self._input_norm.add(x, residual)
        x = self._mixer(x, batch, *caches)
        x, residual = self._pre_ff_norm.add(x, residual)
        return self._feed_forward(x), residual

    def units(self) -> Units:
        yield self._input_norm.unit(f"{self._name}input_layernorm")
        yield from self._mixer.units(self._mixer_name)
        yield self._pre_ff_norm.unit(f"{self._name}pre_ff_layernorm")
        yield from self._feed_forward.units(self._feed_forward_name)

    def ignored(self) -> frozenset[str]:
        """Returns the names of tensors that some converted checkpoints contain but the model does not use: the
        frequencies of a rotary embedding, which Jamba does not have."""
        return frozenset([f"{self._name}self_attn.rotary_emb.inv_freq"] if self.is_attention else [])


class _Output(NamedTuple):
    """What follows the layers, on the last stage."""

    norm: RmsNorm
    head: Linear


class Jamba(ABC):
    """Computes hidden states from token ids, with the layers that all Jamba architectures share. Each subclass adds its
    own output head."""

    def __init__(self, config: JambaConfig, backend: Backend) -> None:
        self.config, self.dtype = config, backend.dtype
        self._backend, self.parts = backend, backend.parts
        self._stage = stage = backend.parts.stage
        ties = config.tie_word_embeddings and not config.is_classifier
        self._embed_tokens = None
        if stage.is_first or (stage.is_last and ties):
            self._embed_tokens = Embedding(self._backend, config.hidden_size)
        self._layers = [DecoderLayer(self._backend, config, i) for i in stage.layers]
        self._output: _Output | None = None
        if stage.is_last:
            norm = RmsNorm(self._backend, config.hidden_size, config.rms_norm_eps)
            self._output = _Output(norm, self._make_head(self._embed_tokens if ties else None))

    def forward(self, batch: ForwardBatch, storage: CacheStorage, received: Tensor | None = None) -> Tensor:
        """Returns the hidden states [T, H] after the final norm. If another stage has the next layers, returns the
        residual stream [T, H] instead. All stages but the first begin with the residual stream `received`. Reads and
        writes the KV pages and state slots in `storage` that `batch` names."""
        kv_caches, states = iter(storage.kv_layers), iter(storage.state_layers)
        residual: Tensor | None = None
        if received is None:
            assert self._stage.is_first and self._embed_tokens is not None, "other stages than the first one receive x"
            x = self._embed_tokens(batch.token_ids)
        else:
            x = received
        for layer in self._layers:
            x, residual = layer(x, residual, batch, next(kv_caches if layer.is_attention else states))
        if self._output is None:
            assert residual is not None, "every stage has a layer"
            # Within a stage, the norm that comes next adds these two and rounds the sum to the model's dtype, too.
            return x + residual
        return self._output.norm.add(x, residual)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Maps hidden states [n, H] of the last stage to float32 logits [n, V]. A classifier returns [n, num_labels];
        the logits for a text are in the row of the text's last token."""
        assert self._output is not None, "only the last stage computes logits"
        return self._all_columns(self._output.head(hidden)).float()

    def _all_columns(self, logits: Tensor) -> Tensor:
        """Returns the outputs of the head of all ranks, given those of this one."""
        return logits

    def tensor_map(self) -> TensorMap:
        """Returns the map from the name of each checkpoint tensor to the memory that the tensor fills. Must be called
        before any weight is packed."""
        output, units = self._output, list[Unit]()
        tied = output is not None and output.head.is_shared
        if self._embed_tokens is not None:
            units.append(self._embed_tokens.unit(self._pack_tied_head if tied else None))
        for layer in self._layers:
            units += layer.units()
        if output is not None:
            units.append(output.norm.unit(FINAL_NORM))
            units += [] if tied else [output.head.unit("")]
        return TensorMap(
            units=tuple(units),
            ignored=self._other_heads().union(*(layer.ignored() for layer in self._layers)),
            stage=self._stage,
            drawn=self._backend.drawn,
        )

    def _pack_tied_head(self) -> None:
        assert self._output is not None and self._embed_tokens is not None, "a tied head shares the embedding"
        head = self._output.head
        head.pack()
        if not self._stage.is_first:
            self._embed_tokens = None  # this stage needs the matrix for its head only
        elif not head.is_quantized:
            self._embed_tokens.tie(head)

    @abstractmethod
    def _make_head(self, tied_to: Embedding | None) -> Linear:
        """Returns the output head. It shares the matrix of the embedding `tied_to`, if there is one."""

    @abstractmethod
    def _other_heads(self) -> frozenset[str]:
        """Returns the names of the weights of output heads that this architecture does not load, although a checkpoint
        is allowed to contain these weights."""


class JambaForCausalLM(Jamba):
    """Jamba with a language model head. If `tie_word_embeddings` is set, the head shares the embedding's matrix."""

    def _make_head(self, tied_to: Embedding | None) -> Linear:
        shared = None if tied_to is None else tied_to.raw
        own = self._backend.parts.vocabulary
        parts, pieces = {"lm_head": len(own)}, {"lm_head": Piece.of(own, 0)}
        return Linear(self._backend, self.config.hidden_size, parts, role="head", shared=shared, pieces=pieces)

    def _all_columns(self, logits: Tensor) -> Tensor:
        parts = self._backend.parts
        if parts.vocabulary.is_whole:
            return logits
        # The last rank may have fewer rows of the vocabulary than the others.
        padded = torch.nn.functional.pad(logits, (0, parts.vocabulary_rows - len(parts.vocabulary)))
        return self._backend.group.join_columns(padded)[:, : parts.vocabulary.total]

    def _other_heads(self) -> frozenset[str]:
        # Some checkpoints store the head's matrix although the head is tied to the embedding and both matrices are
        # equal. If the two matrices differed, `read_model` would have set `tie_word_embeddings` to false.
        return frozenset(["score.weight", "lm_head.weight"] if self.config.tie_word_embeddings else ["score.weight"])


class JambaForSequenceClassification(Jamba):
    """Jamba as a classifier: the head is a linear layer that gives a score for each label."""

    def _make_head(self, tied_to: Embedding | None) -> Linear:
        labels, bias = {"score": self.config.num_labels}, self.config.score_bias
        return Linear(self._backend, self.config.hidden_size, labels, role="other", bias=bias)

    def _other_heads(self) -> frozenset[str]:
        return frozenset(["lm_head.weight"])
