"""Embedding: looks up the vectors of token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

from jamba_server.engine.layers.linear import Linear
from jamba_server.engine.layers.parameter import Backend, Destination, Raw, Unit, leave_unpacked
from jamba_server.engine.pieces import Piece

NAME: Final = "model.embed_tokens.weight"


class Embedding:
    """Maps token ids, int64 [T], to vectors [T, H] in the model's dtype. The field `raw` is the matrix [V, H], one row
    for each of the V token ids, as the checkpoint stores it, or None after the matrix was packed.

    The matrix is packed in two cases. If the checkpoint has it quantised, it keeps its format, and vectors are
    dequantised when they are looked up. If the language model head shares the matrix and is not quantised by this
    server, the head packs the matrix, and vectors are read from the packed matrix of the head.

    Ranks divide the vocabulary among each other.
    """

    def __init__(self, backend: Backend, hidden_size: int) -> None:
        # A head that shares the matrix packs it with the same operation.
        self._backend, self._linear = backend, backend.kernels.linear
        self._form = backend.format(NAME)
        self._own = backend.parts.vocabulary
        self.raw: Raw | None = backend.raw("other", len(self._own), hidden_size, stored=self._form)
        self._packed: Any = None

    def __call__(self, token_ids: Tensor) -> Tensor:
        weight = self._packed if self.raw is None else self.raw
        if self._own.is_whole:
            return self._linear.rows(weight, token_ids, self._backend.dtype)
        local = token_ids - self._own.start
        is_own = (local >= 0) & (local < len(self._own))
        rows = self._linear.rows(weight, local * is_own, self._backend.dtype)
        return self._backend.group.join_disjoint(rows.masked_fill_(~is_own[:, None], 0.0))

    def unit(self, pack_head: Callable[[], None] | None) -> Unit:
        """Returns the embedding's weights as a unit for the weight loader. If a language model head shares the weight,
        the loader calls `pack_head` when the weight is filled."""
        assert self.raw is not None
        own = leave_unpacked if self._form is None else self._pack
        return Unit({NAME: Destination(self.raw, "unit", Piece.of(self._own, 0))}, pack_head or own)

    def tie(self, head: Linear) -> None:
        """Makes the embedding read its vectors from the packed weight of `head`. Drops the embedding's reference to the
        raw weight, so that the shared matrix is in memory only once."""
        self.raw, self._packed = None, head.weight

    def _pack(self) -> None:
        raw, self.raw = self.raw, None
        assert raw is not None, "a weight is packed once"
        self._packed = self._linear.pack(self._backend.quantize("other", raw))
