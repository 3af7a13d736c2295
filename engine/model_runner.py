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
        sampling = [chunk.samples for chunk in output.chunks]
        rows = [_sampling_row(chunk) for chunk, samples in zip(output.chunks, sampling, strict=True) if samples]
        # as many as there are tokens: then they are all rows in order, as in a step of decodes only
        chosen = hidden if len(rows) == len(hidden) else hidden[batch.logit_rows]
        tokens = iter(self.sampler.sample(self.model.logits(chosen), rows) if rows else ())
        results: list[ChunkResult] = []
        row = 0
        for chunk, samples in zip(output.chunks, sampling, strict=True):
            end = row + chunk.end - chunk.start
            wanted = chunk.sequence.params.prompt_logprobs is not None
            prompt = tuple(self._prompt_logprobs(chunk, hidden[row:end])) if wanted else ()
            token_id, logprob = next(tokens) if samples else (None, None)
            results.append(ChunkResult(token_id, logprob, prompt))
            row = end
        return results

    def _copy(self, pairs: list[tuple[int, int]], tensors: tuple[Tensor, ...]) -> None:
        if pairs:
            sources, destinations = torch.tensor(pairs, dtype=torch.int64, device=self.device).unbind(1)
            self.kernels.copy_slots(tensors, sources, destinations)

    def _prompt_logprobs(self, chunk: Chunk, hidden: Tensor) -> Iterable[TokenLogprob | None]:
        """Entries of the prompt tokens that this chunk's rows predict and that were not delivered before. The row of
        position p predicts token p + 1; the first token of all has no prediction."""
        seq = chunk.sequence
        k = seq.params.prompt_logprobs
        assert k is not None, "nobody asked"
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
    return SamplingRow(seq.params, seq.tokens, seq.num_prompt, seq.request.index)
