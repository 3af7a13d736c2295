"""Sampler: logits of a step's sequences in, their next tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.sampling.keys import row_key
from engine.sampling.logprobs import gather, read
from engine.sampling.penalties import adjust_logits
from engine.sampling.row import SamplingRow
from engine.types import TokenLogprob
from kernels.ops import Kernels, SampleInputs

__all__ = ["SampledToken", "Sampler", "SamplingRow"]


class SampledToken(NamedTuple):
    """`logprob` is None unless the request asked for it."""

    token_id: int
    logprob: TokenLogprob | None = None


class Sampler:
    """A token depends on its row's logits, parameters, tokens and choice alone; the sampler keeps nothing of a step."""

    def __init__(self, kernels: Kernels, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self.kernels, self.vocab_size, self.eos_token_ids = kernels, vocab_size, eos_token_ids

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """One token a row, in order. logits: float32 [N, V], overwritten. Waits for the device once, at the end."""
        assert logits.shape == (len(rows), self.vocab_size), f"one row of the vocabulary each, not {logits.shape}"
        assert logits.dtype == torch.float32, f"float32 expected, not {logits.dtype}"
        wanted = [n for n, row in enumerate(rows) if row.params.logprobs is not None]
        counts = [rows[n].params.logprobs or 0 for n in wanted]
        raw = logits[wanted].log_softmax(dim=-1) if wanted else None
        adjust_logits(logits, rows, self.eos_token_ids)
        sampled = self.kernels.sample(logits, self._inputs(rows, logits.device))
        if raw is None:
            return [SampledToken(token_id) for token_id in sampled.tolist()]
        table = gather(raw, sampled[wanted], max(counts))
        # float64 holds token ids exactly: one transfer for both
        values: list[float] = torch.cat([sampled.to(torch.float64), table.flatten()]).tolist()
        token_ids = [int(value) for value in values[: len(rows)]]
        width = table.shape[1]
        table_rows = [values[start : start + width] for start in range(len(rows), len(values), width)]
        logprobs = dict(zip(wanted, read(table_rows, [token_ids[n] for n in wanted], counts), strict=True))
        return [SampledToken(token_id, logprobs.get(n)) for n, token_id in enumerate(token_ids)]

    def _inputs(self, rows: Sequence[SamplingRow], device: torch.device) -> SampleInputs:
        params = [row.params for row in rows]
        columns = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]]
        temperature, top_p, min_p = torch.tensor(columns, dtype=torch.float32).to(device, non_blocking=True)
        # greedy rows have no noise
        keys = [row_key(row.params.seed, row.choice, len(row.tokens)) if row.params.temperature else 0 for row in rows]
        # a top_k as large as the vocabulary keeps all, which is said by 0
        top_k = [p.top_k if p.top_k < self.vocab_size else 0 for p in params]
        return SampleInputs(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            top_k=torch.tensor(top_k, dtype=torch.int32).to(device, non_blocking=True),
            keys=torch.tensor(keys, dtype=torch.int64).to(device, non_blocking=True),
        )
