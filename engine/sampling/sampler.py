"""Sampler: logits of a step's sequences in, their next tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jamba_server.engine.sampling.keys import row_key
from jamba_server.engine.sampling.logprobs import gather, read
from jamba_server.engine.sampling.penalties import adjust_logits
from jamba_server.engine.sampling.row import SamplingRow
from jamba_server.engine.staging import Array, Fetch, upload
from jamba_server.engine.types import TokenLogprob
from jamba_server.kernels.ops import Kernels, SampleInputs

__all__ = ["SampledToken", "Sampler", "SamplingRow"]


class SampledToken(NamedTuple):
    """`logprob` is None unless the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None


class PendingTokens:
    """One token a row, in order, chosen on the device: `token_ids` int64 [N]. Each row of `table` is that of `gather`
    for one of the rows `wanted`, with its count of alternatives."""

    def __init__(self, token_ids: Tensor, table: Tensor | None, wanted: dict[int, int]) -> None:
        self.token_ids, self._wanted = token_ids, wanted
        # float64 holds token ids exactly: one transfer for both
        both = token_ids if table is None else torch.cat([token_ids.to(torch.float64), table.flatten()])
        self._width = 0 if table is None else table.shape[1]
        self._fetch = Fetch(both)

    def read(self) -> list[SampledToken]:
        """Waits for them."""
        values = self._fetch.tolist()
        if not self._wanted:
            return [SampledToken(token_id) for token_id in values]
        end, width = len(values) - len(self._wanted) * self._width, self._width
        token_ids = [int(value) for value in values[:end]]
        rows = [values[start : start + width] for start in range(end, len(values), width)]
        chosen = [token_ids[n] for n in self._wanted]
        logprobs = dict(zip(self._wanted, read(rows, chosen, list(self._wanted.values())), strict=True))
        return [SampledToken(token_id, logprobs.get(n)) for n, token_id in enumerate(token_ids)]


class Sampler:
    """A token depends on its row's logits, parameters, tokens and choice alone; the sampler keeps nothing of a step."""

    def __init__(self, kernels: Kernels, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.kernels, self.vocab_size, self.eos_token_ids = kernels, vocab_size, eos_token_ids

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """One token a row, in order. logits: float32 [N, V], overwritten. Waits for the device once, at the end."""
        return self.launch(logits, rows).read()

    def launch(self, logits: Tensor, rows: Sequence[SamplingRow]) -> PendingTokens:
        """`sample` without waiting for the device."""
        assert logits.shape == (len(rows), self.vocab_size), f"one row of the vocabulary each, not {logits.shape}"
        assert logits.dtype == torch.float32, f"float32 expected, not {logits.dtype}"
        wanted = {n: row.params.logprobs for n, row in enumerate(rows) if row.params.logprobs is not None}
        if not wanted:
            adjust_logits(logits, rows, self.eos_token_ids)
            return PendingTokens(self.kernels.sample(logits, self._inputs(rows, logits.device)), None, wanted)
        [chosen] = upload([np.array(list(wanted), dtype=np.int64)], logits.device)
        raw = logits[chosen].log_softmax(dim=-1)
        adjust_logits(logits, rows, self.eos_token_ids)
        token_ids = self.kernels.sample(logits, self._inputs(rows, logits.device))
        return PendingTokens(token_ids, gather(raw, token_ids[chosen], max(wanted.values())), wanted)

    def _inputs(self, rows: Sequence[SamplingRow], device: torch.device) -> SampleInputs:
        params = [row.params for row in rows]
        columns = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]]
        arrays: list[Array] = [np.array(column, dtype=np.float32) for column in columns]
        # greedy rows have no noise
        keys = [
            row_key(row.params.seed or 0, row.choice, row.position) if row.params.temperature else 0 for row in rows
        ]
        # a top_k as large as the vocabulary keeps all, which is said by 0
        top_k = [p.top_k if p.top_k < self.vocab_size else 0 for p in params]
        arrays += [np.array(top_k, dtype=np.int32), np.array(keys, dtype=np.int64)]
        temperature, top_p, min_p, top_ks, key_column = upload(arrays, device)
        return SampleInputs(temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_ks, keys=key_column)
