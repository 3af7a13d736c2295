"""Sampler: chooses the next tokens of a step's sequences from their logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jamba_server.engine.grammar.masks import PendingMasks
from jamba_server.engine.sampling.keys import row_key
from jamba_server.engine.sampling.logprobs import gather, read
from jamba_server.engine.sampling.penalties import adjust_logits
from jamba_server.engine.sampling.row import SamplingRow
from jamba_server.engine.staging import Array, HostCopy, upload
from jamba_server.engine.types import TokenLogprob
from jamba_server.kernels.ops import Kernels, SampleInputs

__all__ = ["SampledToken", "Sampler", "SamplingRow"]


class SampledToken(NamedTuple):
    """A sampled token and its log-probability. The log-probability is None unless the request asked for
    log-probabilities."""

    token_id: int
    logprob: TokenLogprob | None = None


class PendingTokens:
    """The sampled tokens of N rows, which the device may still be computing: `token_ids`, int64 [N]. The argument
    `requested` maps the index of each row whose log-probabilities are requested to the number of most likely tokens to
    report. The argument `table` is the table that the function `logprobs.gather` returned, with one row for each entry
    of `requested`; it is None if `requested` is empty."""

    def __init__(self, token_ids: Tensor, table: Tensor | None, requested: dict[int, int]) -> None:
        self.token_ids, self._requested = token_ids, requested
        # float64 holds token ids exactly, so ids and log-probabilities travel to the host in one copy.
        both = token_ids if table is None else torch.cat([token_ids.to(torch.float64), table.flatten()])
        self._width = 0 if table is None else table.shape[1]
        self._host_copy = HostCopy(both)

    def read(self) -> list[SampledToken]:
        """Waits until the device has sampled the tokens, and returns one token for each row."""
        values = self._host_copy.tolist()
        if not self._requested:
            return [SampledToken(token_id) for token_id in values]
        end, width = len(values) - len(self._requested) * self._width, self._width
        token_ids = [int(value) for value in values[:end]]
        rows = [values[start : start + width] for start in range(end, len(values), width)]
        chosen = [token_ids[n] for n in self._requested]
        logprobs = dict(zip(self._requested, read(rows, chosen, list(self._requested.values())), strict=True))
        return [SampledToken(token_id, logprobs.get(n)) for n, token_id in enumerate(token_ids)]


class Sampler:
    """Samples tokens. A sampled token depends only on its own row: on the row's logits, parameters, previous tokens and
    number of the reply (`choice`). The sampler keeps no state between steps."""

    def __init__(self, kernels: Kernels, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.kernels, self.vocab_size, self.eos_token_ids = kernels, vocab_size, eos_token_ids

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Samples one token for each row and waits for the result. `logits`, float32 [N, V], are overwritten."""
        return self.launch(logits, rows).read()

    def launch(self, logits: Tensor, rows: Sequence[SamplingRow], masks: PendingMasks | None = None) -> PendingTokens:
        """Starts to sample one token for each row, as the method `sample` does, but does not wait for the device. The
        result is read with `PendingTokens.read`. `masks` has the allowed tokens of constrained rows. Log-probabilities
        do not depend on the masks."""
        assert logits.shape == (len(rows), self.vocab_size), f"logits of {len(rows)} rows have shape {logits.shape}"
        assert logits.dtype == torch.float32, f"logits have dtype {logits.dtype}, not float32"
        requested = {n: row.params.logprobs for n, row in enumerate(rows) if row.params.logprobs is not None}
        if not requested:
            self._adjust(logits, rows, masks)
            return PendingTokens(self.kernels.sample(logits, self._inputs(rows, logits.device)), None, requested)
        [chosen] = upload([np.array(list(requested), dtype=np.int64)], logits.device)
        raw = logits[chosen].log_softmax(dim=-1)
        self._adjust(logits, rows, masks)
        token_ids = self.kernels.sample(logits, self._inputs(rows, logits.device))
        return PendingTokens(token_ids, gather(raw, token_ids[chosen], max(requested.values())), requested)

    def _adjust(self, logits: Tensor, rows: Sequence[SamplingRow], masks: PendingMasks | None) -> None:
        """Applies to `logits` the masks, penalties, biases and forbidden tokens of the requests. The temperature and
        filters such as top-p are not applied here; the kernel that samples applies them."""
        if masks is None:
            adjust_logits(logits, rows, self.eos_token_ids)
            return
        allowed = masks.read()
        adjust_logits(logits, rows, self.eos_token_ids, frozenset(allowed.rows.tolist()))
        where, bits = upload([allowed.rows, allowed.masks], logits.device)
        self.kernels.apply_bitmask(logits, bits, where)

    def _inputs(self, rows: Sequence[SamplingRow], device: torch.device) -> SampleInputs:
        params = [row.params for row in rows]
        columns = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]]
        arrays: list[Array] = [np.array(column, dtype=np.float32) for column in columns]
        # Greedy rows are sampled without noise, so they need no key.
        keys = [
            row_key(row.params.seed or 0, row.choice, row.position) if row.params.temperature else 0 for row in rows
        ]
        # A top_k of at least the vocabulary's size excludes no token. The kernels expect top_k 0 in that case.
        top_k = [p.top_k if p.top_k < self.vocab_size else 0 for p in params]
        arrays += [np.array(top_k, dtype=np.int32), np.array(keys, dtype=np.int64)]
        temperature, top_p, min_p, top_ks, key_column = upload(arrays, device)
        return SampleInputs(temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_ks, keys=key_column)
