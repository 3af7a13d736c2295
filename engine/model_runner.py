"""ModelRunner: one scheduled step on the device. Tensors live here; decisions are the scheduler's."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.batch import build_batch
from engine.cache.storage import CacheStorage
from engine.models import Model
from engine.sampling.logprobs import token_logprobs
from engine.sampling.sampler import Sampler, SamplingRow
from engine.scheduler import Chunk, ChunkResult, SchedulerOutput
from engine.types import TokenLogprob
from kernels.ops import Kernels

PROMPT_LOGITS_ROWS = 128  # prompt logits are computed in slices: [128, V] in float32 is 32 MiB for V = 65,536


class ModelRunner:
    """Runs the model over the storage and turns its rows into tokens and log-probabilities."""

    def __init__(self, model: Model, storage: CacheStorage, sampler: Sampler, kernels: Kernels) -> None:
        self.model, self.storage, self.sampler, self.kernels = model, storage, sampler, kernels
        self.device = storage.kv.device

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> list[ChunkResult]:
        """One result per chunk, in their order."""
        self._copy(output.copies.pages, (self.storage.kv,))
        self._copy(output.copies.states, (self.storage.conv, self.storage.ssm))
        batch = build_batch(output.chunks, block_size=self.storage.block_size, device=self.device)
        hidden = self.model.forward(batch, self.storage)
        sampling = [chunk for chunk in output.chunks if chunk.samples]
        rows = [_sampling_row(chunk) for chunk in sampling]
        tokens = iter(self.sampler.sample(self.model.logits(hidden[batch.logit_rows]), rows) if rows else ())
        results: list[ChunkResult] = []
        first_row = 0
        for chunk in output.chunks:
            prompt = tuple(self._prompt_logprobs(chunk, hidden[first_row : first_row + chunk.end - chunk.start]))
            token = next(tokens) if chunk.samples else None
            results.append(
                ChunkResult(None, None, prompt) if token is None else ChunkResult(token.token_id, token.logprob, prompt)
            )
            first_row += chunk.end - chunk.start
        return results

    def _copy(self, pairs: list[tuple[int, int]], tensors: tuple[Tensor, ...]) -> None:
        if pairs:
            sources, destinations = torch.tensor(pairs, dtype=torch.int64, device=self.device).unbind(1)
            self.kernels.copy_slots(tensors, sources, destinations)

    def _prompt_logprobs(self, chunk: Chunk, hidden: Tensor) -> Iterable[TokenLogprob | None]:
        """Entries of the prompt tokens that this chunk's rows predict and that were not delivered before. The row of
        position p predicts token p + 1; the first token of all has no prediction."""
        seq = chunk.sequence
        if (k := seq.params.prompt_logprobs) is None:
            return
        if seq.num_prompt_logprobs == 0:
            yield None
        first = max(chunk.start + 1, seq.num_prompt_logprobs, 1)
        last = min(chunk.end, seq.num_prompt - 1)
        for start in range(first, last + 1, PROMPT_LOGITS_ROWS):
            end = min(start + PROMPT_LOGITS_ROWS, last + 1)
            rows = hidden[start - 1 - chunk.start : end - 1 - chunk.start]
            yield from token_logprobs(self.model.logits(rows), seq.tokens[start:end], [k] * len(rows))


def _sampling_row(chunk: Chunk) -> SamplingRow:
    seq = chunk.sequence
    return SamplingRow(params=seq.params, tokens=seq.tokens, num_prompt=seq.num_prompt, choice=seq.request.index)
