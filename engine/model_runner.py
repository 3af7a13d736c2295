"""ModelRunner: one scheduled step on the device. Tensors live here; decisions are the scheduler's."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jamba_server.engine.batch import SampledTokens, build_batch
from jamba_server.engine.cache.manager import CacheCopies
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.config import PROMPT_LOGITS_ROWS
from jamba_server.engine.graphs import DecodeGraphs
from jamba_server.engine.models import Model
from jamba_server.engine.sampling.logprobs import PendingLogprobs
from jamba_server.engine.sampling.sampler import PendingTokens, Sampler, SamplingRow
from jamba_server.engine.scheduler import Chunk, ChunkResult, SchedulerOutput
from jamba_server.engine.staging import upload
from jamba_server.engine.types import TokenLogprob
from jamba_server.kernels.ops import Kernels


@dataclass(frozen=True, slots=True)
class PendingPrompt:
    """Log-probabilities of a chunk's prompt tokens; `first`: with the entry of the very first token, which is None."""

    first: bool
    slices: tuple[PendingLogprobs, ...]

    def read(self) -> tuple[TokenLogprob | None, ...]:
        """Waits for them."""
        return (*((None,) if self.first else ()), *(entry for part in self.slices for entry in part.read()))


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that the device works on. `samples`: which of its chunks get a token, `prompts`: which have more."""

    output: SchedulerOutput
    samples: list[bool]
    tokens: PendingTokens | None
    prompts: dict[int, PendingPrompt]

    def results(self) -> list[ChunkResult]:
        """One result per chunk, in their order. Waits for the device."""
        tokens = iter(self.tokens.read() if self.tokens is not None else ())
        results: list[ChunkResult] = []
        for i, samples in enumerate(self.samples):
            token_id, logprob = next(tokens) if samples else (None, None)
            results.append(ChunkResult(token_id, logprob, self.prompts[i].read() if i in self.prompts else ()))
        return results


class ModelRunner:
    """Runs the model over the storage and turns its rows into tokens and log-probabilities.

    `graphs` runs the steps that it can; `sampled` keeps tokens for a next step that is launched before they are known.
    """

    def __init__(
        self,
        model: Model,
        storage: CacheStorage,
        sampler: Sampler,
        kernels: Kernels,
        *,
        graphs: DecodeGraphs | None = None,
        sampled: SampledTokens | None = None,
    ) -> None:
        self.model, self.storage, self.sampler, self.kernels = model, storage, sampler, kernels
        self.graphs, self.sampled = graphs, sampled
        self.device = storage.kv.device

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> PendingStep:
        """Launches a step and waits for nothing. Before `Scheduler.advance`."""
        self._copy_units(output.copies)
        samples = [chunk.samples for chunk in output.chunks]
        sampling = [chunk for chunk, wanted in zip(output.chunks, samples, strict=True) if wanted]
        hidden, chosen = self._forward(output.chunks)
        tokens = self._sample(chosen, sampling) if sampling else None
        return PendingStep(output, samples, tokens, self._prompt_logprobs(output.chunks, hidden))

    def _forward(self, chunks: Many[Chunk]) -> tuple[Tensor, Tensor]:
        """Hidden states of all rows, and those from which tokens are sampled."""
        if self.graphs is not None and (key := self.graphs.key(chunks)) is not None:
            hidden = self.graphs.forward(key, chunks, self.sampled)
            return hidden, hidden
        block_size = self.storage.block_size
        batch = build_batch(chunks, block_size=block_size, device=self.device, sampled=self.sampled)
        hidden = self.model.forward(batch, self.storage)
        # as many as there are tokens: then they are all rows in order, as in a step of decodes only
        return hidden, hidden if len(batch.logit_rows) == len(hidden) else hidden[batch.logit_rows]

    def _sample(self, hidden: Tensor, chunks: Many[Chunk]) -> PendingTokens:
        tokens = self.sampler.launch(self.model.logits(hidden), [_sampling_row(chunk) for chunk in chunks])
        if self.sampled is not None:
            self.sampled.put(tokens.token_ids, [chunk.sequence for chunk in chunks])
        return tokens

    def _copy_units(self, copies: CacheCopies) -> None:
        kv, conv, ssm, compressed = self.storage.kv, self.storage.conv, self.storage.ssm, self.storage.compressed
        self._copy(copies.pages, (kv,))
        if compressed is None:
            self._copy(copies.states, (conv, ssm))
            return
        first = self.storage.num_slots  # unit of the saved states' convolutions
        if copies.saves:
            self.kernels.compress_states(ssm, compressed, *self._columns(copies.saves))
            self._copy([(slot, first + state_id) for slot, state_id in copies.saves], (conv,))
        if copies.states:
            self.kernels.restore_states(compressed, ssm, *self._columns(copies.states))
            self._copy([(first + state_id, slot) for state_id, slot in copies.states], (conv,))

    def _copy(self, pairs: list[tuple[int, int]], tensors: tuple[Tensor, ...]) -> None:
        if pairs:
            self.kernels.copy_slots(tensors, *self._columns(pairs))

    def _columns(self, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        [columns] = upload([np.array(pairs, dtype=np.int64).T.copy()], self.device)
        return columns[0], columns[1]

    def _prompt_logprobs(self, chunks: Many[Chunk], hidden: Tensor) -> dict[int, PendingPrompt]:
        """Of the chunks that ask for any, by number."""
        prompts: dict[int, PendingPrompt] = {}
        row = 0
        for i, chunk in enumerate(chunks):
            end = row + chunk.end - chunk.start
            if (count := chunk.sequence.params.prompt_logprobs) is not None:
                prompts[i] = self._score_prompt(chunk, hidden[row:end], count)
            row = end
        return prompts

    def _score_prompt(self, chunk: Chunk, hidden: Tensor, count: int) -> PendingPrompt:
        """The prompt tokens that this chunk's rows predict and that were not delivered before. The row of position p
        predicts token p + 1; the first token of all has no prediction."""
        seq = chunk.sequence
        first = max(chunk.start + 1, seq.num_prompt_logprobs, 1)
        last = min(chunk.end, seq.num_prompt - 1)
        slices: list[PendingLogprobs] = []
        for start in range(first, last + 1, PROMPT_LOGITS_ROWS):
            end = min(start + PROMPT_LOGITS_ROWS, last + 1)
            logits = self.model.logits(hidden[start - 1 - chunk.start : end - 1 - chunk.start])
            slices.append(PendingLogprobs(logits, seq.tokens[start:end], [count] * (end - start)))
        return PendingPrompt(chunk.start == 0 and seq.num_prompt_logprobs == 0, tuple(slices))


def _sampling_row(chunk: Chunk) -> SamplingRow:
    seq = chunk.sequence
    return SamplingRow(seq.params, seq.tokens, seq.num_prompt, seq.request.index, seq.num_pending)
