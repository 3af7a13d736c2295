"""Log-probabilities of the raw distribution: the float32 log-softmax of the model's logits before any penalty or bias.

The function `gather` runs on the device, and the function `read` runs on the host. The two functions are separate, so
that a step can copy its sampled tokens and their log-probabilities to the host together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from jamba_server.engine.staging import HostCopy, upload
from jamba_server.engine.types import TokenLogprob
from jamba_server.kernels.reference.sample import best_ids


class PendingLogprobs:
    """Log-probabilities that the device may still be computing. Each row n of `logits` (float32 [N, V], N at least 1)
    gives the log-probability of token_ids[n] and the log-probabilities of the counts[n] most likely tokens, the most
    likely token first. Equally likely tokens are sorted by increasing token id. The result of a row does not depend on
    the other rows of `logits`."""

    def __init__(self, logits: Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> None:
        self._token_ids, self._counts = token_ids, counts
        [chosen] = upload([np.array(token_ids, dtype=np.int64)], logits.device)
        self._table = HostCopy(gather(logits.log_softmax(dim=-1), chosen, max(counts)))

    def read(self) -> list[TokenLogprob]:
        """Waits until the device has computed the log-probabilities, and returns the log-probabilities of each row of
        `logits`."""
        return read(self._table.tolist(), self._token_ids, self._counts)


def gather(logprobs: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Returns a table, float64 [N, 1 + 2 * count], of `logprobs` (float32 [N, V]). A row has the log-probability of the
    token `chosen` (int64 [N]), then the ids of the `count` most likely tokens (at most V), then the log-probabilities
    of these tokens. float64 holds token ids and float32 values exactly."""
    count = min(count, logprobs.shape[1])
    top_ids = best_ids(logprobs, count) if count > 0 else chosen.new_empty((len(chosen), 0))
    columns = logprobs.gather(1, torch.cat([chosen[:, None], top_ids], dim=1)).to(torch.float64)
    return torch.cat([columns[:, :1], top_ids.to(torch.float64), columns[:, 1:]], dim=1)


def read(table: list[list[float]], token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprob]:
    """Converts the table that the function `gather` returned to one entry for each row. Entry n has the counts[n] most
    likely tokens. If the table has fewer than counts[n] tokens in a row, entry n has all of these tokens."""
    results: list[TokenLogprob] = []
    for values, token_id, count in zip(table, token_ids, counts, strict=True):
        gathered = len(values) // 2
        top_ids, top_logprobs = map(int, values[1 : 1 + gathered]), values[1 + gathered :]
        top = tuple(zip(top_ids, top_logprobs, strict=True))[:count]
        results.append(TokenLogprob(token_id, values[0], top))
    return results
