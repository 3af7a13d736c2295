"""Embedding: looks up the vectors of token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from torch import Tensor

from jamba_server.engine.layers.linear import Linear
from jamba_server.engine.layers.parameter import Backend, Destination, Raw, Unit, leave_unpacked

NAME: Final = "model.embed_tokens.weight"


class Embedding:
    """Maps token ids, int64 [T], to vectors [T, H] in the model's dtype. The field `raw` is the matrix [V, H], one row
    for each of the V token ids, as the checkpoint stores it, or None after the matrix was packed.

    The matrix is packed in two cases. If the checkpoint has it quantised, it keeps its format, and vectors are
    dequantised when they are looked up. If the language model head shares the matrix and is not quantised by this
    server, the head packs the matrix, and vectors are read from the packed matrix of the head.
    """

    def __init__(self, backend: Backend, vocab_size: int, hidden_size: int) -> None:
        # A head that shares the matrix packs it with the same operation.
        self._backend, self._linear = backend, backend.kernels.linear
        self._form = backend.format(NAME)
        self.raw: Raw | None = backend.raw("other", vocab_size, hidden_size, stored=self._form)
        self._packed: Any = None

    def __call__(self, token_ids: Tensor) -> Tensor:
        weight = self._packed if self.raw is None else self.raw
        return self._linear.rows(weight, token_ids, self._backend.dtype)

    def unit(self, pack_head: Callable[[], None] | None) -> Unit:
        """Returns the embedding's weights as a unit for the weight loader. If a language model head shares the weight,
        the loader calls `pack_head` when the weight is filled."""
        assert self.raw is not None
        own = leave_unpacked if self._form is None else self._pack
        return Unit({NAME: Destination(self.raw, "unit")}, pack_head or own)

    def tie(self, head: Linear) -> None:
        """Makes the embedding read its vectors from the packed weight of `head`. Drops the embedding's reference to the
        raw weight, so that the shared matrix is in memory only once."""
        self.raw, self._packed = None, head.weight

    def _pack(self) -> None:
        raw, self.raw = self.raw, None
        assert raw is not None, "a weight is packed once"
        self._packed = self._linear.pack(self._backend.quantize("other", raw))
