"""Log-probabilities of the raw distribution: float32 log-softmax of the model's logits, before anything changes them.

Two halves, so that a step can fetch tokens and log-probabilities together: `gather` on the device, `read` on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jamba_server.engine.staging import Fetch, upload
from jamba_server.engine.types import TokenLogprob
from jamba_server.kernels.reference.sample import best_ids


class PendingLogprobs:
    """Of row n of `logits` (float32 [N, V], N at least 1): token_ids[n] and the counts[n] most likely, best first, ties
    to lower ids. A row's result does not depend on the others."""

    def __init__(self, logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> None:
        self._token_ids, self._counts = token_ids, counts
        [chosen] = upload([np.array(token_ids, dtype=np.int64)], logits.device)
        self._table = Fetch(gather(logits.log_softmax(dim=-1), chosen, max(counts)))

    def read(self) -> list[TokenLogprob]:
        """Waits for them."""
        return read(self._table.tolist(), self._token_ids, self._counts)


def gather(logprobs: Tensor, chosen: Tensor, count: int) -> Tensor:
    """logprobs: float32 [N, V]; chosen: int64 [N]. Returns float64 [N, 1 + 2 * count], which holds ids and float32
    values exactly: the chosen token's log-probability, then the best `count` ids (at most all V), then theirs."""
    count = min(count, logprobs.shape[1])
    top_ids = best_ids(logprobs, count) if count > 0 else chosen.new_empty((len(chosen), 0))
    columns = logprobs.gather(1, torch.cat([chosen[:, None], top_ids], dim=1)).to(torch.float64)
    return torch.cat([columns[:, :1], top_ids.to(torch.float64), columns[:, 1:]], dim=1)


def read(table: list[list[float]], token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """The rows of `gather`, each with its own count of alternatives, or all that were gathered if these are fewer."""
    results: list[TokenLogprob] = []
    for values, token_id, count in zip(table, token_ids, counts, strict=True):
        gathered = len(values) // 2
        top_ids, top_logprobs = map(int, values[1 : 1 + gathered]), values[1 + gathered :]
        top = tuple(zip(top_ids, top_logprobs, strict=True))[:count]
        results.append(TokenLogprob(token_id, values[0], top))
    return results
