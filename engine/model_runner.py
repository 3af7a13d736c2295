"""ModelRunner: runs a scheduled step on the device. The scheduler decides which tokens a step computes. This module
makes the input tensors of the step, runs the model and samples tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from jamba_server.engine.batch import ForwardBatch, SampledTokens, build_batch
from jamba_server.engine.cache.manager import CacheCopies
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.config import PROMPT_LOGITS_ROWS
from jamba_server.engine.device_tables import DeviceTables
from jamba_server.engine.grammar.masks import ConstrainedRow, MaskFiller, PendingMasks
from jamba_server.engine.graphs import StepGraphs
from jamba_server.engine.launched_step import LaunchedStep, ReadStep
from jamba_server.engine.models import Model
from jamba_server.engine.out_of_memory import first_attempt
from jamba_server.engine.pooling.pooler import PendingVector, Pooler
from jamba_server.engine.sampling.logprobs import PendingLogprobs
from jamba_server.engine.sampling.sampler import PendingTokens, Sampler, SamplingRow
from jamba_server.engine.scheduler import Chunk, ChunkResult, SchedulerOutput
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.state_copies import columns, state_copies
from jamba_server.engine.types import TokenLogprob
from jamba_server.kernels.ops import Kernels


@dataclass(frozen=True, slots=True)
class PendingPrompt:
    """Log-probabilities of the prompt tokens in a chunk. The device may still be computing these log-probabilities. If
    `first` is true, the first entry of the result of `read` is that of the prompt's first token. This entry is None,
    because no token precedes the first token."""

    first: bool
    slices: tuple[PendingLogprobs, ...]

    def read(self) -> tuple[TokenLogprob | None, ...]:
        """Waits until the device has computed the log-probabilities, and returns one entry for each of the prompt
        tokens."""
        return (*((None,) if self.first else ()), *(entry for part in self.slices for entry in part.read()))


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A launched step whose results have not been read. The field `tokens` has the sampled tokens of all chunks, in the
    order of the chunks. The field `prompts` maps the index of a chunk to the log-probabilities of the chunk's prompt
    tokens. The field `prompts` has only chunks whose requests ask for prompt log-probabilities. The field `vectors`
    does the same for requests that ask for a vector. The copies of saved states to slots took `restore_seconds`."""

    output: SchedulerOutput
    tokens: PendingTokens | None
    prompts: dict[int, PendingPrompt]
    vectors: dict[int, PendingVector]
    restore_seconds: float = 0.0

    def results(self) -> list[ChunkResult]:
        """Waits for the device and returns one result for each chunk, in the order of the chunks."""
        tokens = self.tokens.read() if self.tokens is not None else []
        results: list[ChunkResult] = []
        first = 0
        for i, chunk in enumerate(self.output.chunks):
            prompt = self.prompts[i].read() if i in self.prompts else ()
            if chunk.num_sampled == 1:  # the usual case; this branch is faster than the general code below
                token_id, logprob = tokens[first]
                results.append(ChunkResult((token_id,), () if logprob is None else (logprob,), prompt))
            else:
                chosen = tokens[first : first + chunk.num_sampled]
                logprobs = [token.logprob for token in chosen if token.logprob is not None]
                vector = self.vectors[i].read() if i in self.vectors else None
                results.append(ChunkResult(tuple(token.token_id for token in chosen), tuple(logprobs), prompt, vector))
            first += chunk.num_sampled
        return results


class ModelRunner:
    """Runs the model with the cache storage, and turns the model's outputs into tokens and log-probabilities.

    `masks` computes, while the model runs, which tokens may come next in sequences that have a grammar or another
    constraint.

    `graphs` runs steps as graphs, if graphs are enabled. `sampled` keeps the sampled tokens on the device for the next
    step, if asynchronous scheduling is enabled. `tables` keeps the page tables on the device, if it is a GPU. `states`
    copies Mamba states between the slots of running sequences and the saved states.
    """

    def __init__(
        self,
        model: Model,
        storage: CacheStorage,
        sampler: Sampler,
        kernels: Kernels,
        masks: MaskFiller,
        *,
        graphs: StepGraphs | None = None,
        sampled: SampledTokens | None = None,
        tables: DeviceTables | None = None,
    ) -> None:
        self.model, self.storage, self.sampler, self.kernels = model, storage, sampler, kernels
        self.masks = masks
        self.graphs, self.sampled, self.tables = graphs, sampled, tables
        self.states = state_copies(storage, kernels)
        self.device = storage.kv.device
        self.pooler = Pooler(model)

    @property
    def num_stages(self) -> int:
        """Returns how many stages run a step one after the other."""
        return 1

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        """Launches a step and does not wait for the step's results. Must be called before the method
        `Scheduler.advance`, which changes the sequences."""
        restore_seconds = self._copy_units(output.copies)
        if not output.chunks:
            return ReadStep(output, restore_seconds)
        rows = [row for chunk in output.chunks for row in _sampling_rows(chunk)]
        constrained = [
            ConstrainedRow(n, row, seq.constraint)
            for n, (row, seq) in enumerate(rows)
            if seq.constraint is not None and seq.constraint.restricts
        ]
        with self.masks.filling(constrained) as masks:
            hidden, chosen = self._run(output.chunks)
            tokens = self._sample(chosen, rows, masks) if rows else None
        prompts, vectors = self._prompt_logprobs(output.chunks, hidden), self.pooler.launch(output.chunks, hidden)
        return PendingStep(output, tokens, prompts, vectors, restore_seconds)

    @torch.inference_mode()
    def capture_graphs(self, reply: Chunk) -> int:
        """Captures the graphs that most requests need, before there are requests. `reply` is a chunk that decodes, with
        page 0 and state slot 0. Returns the number of graphs."""
        return 0 if self.graphs is None else self.graphs.capture_ladder(reply, self.sampled)

    def _run(self, chunks: Many[Chunk]) -> tuple[Tensor, Tensor]:
        """Returns the result of `_forward`. If the memory was short, a step that only begins prompts is tried again: it
        reads no state, so what the first attempt has written does not matter. A step of other sequences may have moved
        some of their states on already."""
        try:
            with first_attempt("a step that begins prompts", is_last=self._is_last(chunks)):
                return self._forward(chunks)
            self._forget_tables()
            return self._forward(chunks)
        except BaseException:
            self._forget_tables()
            raise

    def _is_last(self, chunks: Many[Chunk] = ()) -> bool:
        """Returns whether work must not be tried again: with several ranks, the others would wait for another exchange
        than this one, and a step that continues sequences may have changed their states."""
        return self.model.parts.num_ranks > 1 or any(chunk.start for chunk in chunks)

    def _forget_tables(self) -> None:
        if self.tables is not None:
            self.tables.invalidate()

    def _forward(self, chunks: Many[Chunk]) -> tuple[Tensor, Tensor]:
        """Returns the hidden states of all rows, and the hidden states of the rows from which tokens are sampled. With
        a graph, both are the latter: a graph runs only steps of which nothing else is needed."""
        graphs = self.graphs
        if graphs is not None and (key := graphs.key(chunks)) is not None and graphs.is_ready(key):
            hidden = graphs.forward(key, chunks, self.sampled)
            return hidden, hidden
        batch = build_batch(
            chunks,
            block_size=self.storage.block_size,
            device=self.device,
            sampled=self.sampled,
            tables=self.tables,
        )
        hidden = self._run_layers(batch)
        # In a step in which all sequences decode, every row is a logit row, so no rows need to be selected.
        return hidden, hidden if len(batch.logit_rows) == len(hidden) else hidden[batch.logit_rows]

    def _run_layers(self, batch: ForwardBatch) -> Tensor:
        """Returns what `Model.forward` returns."""
        return self.model.forward(batch, self.storage)

    def _sample(
        self, hidden: Tensor, rows: Many[tuple[SamplingRow, Sequence]], masks: PendingMasks | None
    ) -> PendingTokens:
        inputs = [row for row, _ in rows]
        tokens = self._sampled_tokens(hidden, inputs, masks)
        if self.sampled is not None:
            self.sampled.put(tokens.token_ids, [seq for _, seq in rows])
        return tokens

    def _sampled_tokens(self, hidden: Tensor, inputs: Many[SamplingRow], masks: PendingMasks | None) -> PendingTokens:
        with first_attempt("sampling", is_last=self._is_last()):
            return self.sampler.launch(self.model.logits(hidden), inputs, masks)
        return self.sampler.launch(self.model.logits(hidden), inputs, masks)

    def _copy_units(self, copies: CacheCopies) -> float:
        """Launches the copies of a step. Returns how many seconds the copies of saved states to slots took; on a GPU,
        this is the time of their launch."""
        if copies.pages and self.storage.kv_layers:
            self.kernels.copy_slots((self.storage.kv,), *columns(copies.pages, self.device))
        if copies.saves:
            self.states.save(copies.saves)
        if not copies.states:
            return 0.0
        began = time.monotonic()
        self.states.restore(copies.states)
        return time.monotonic() - began

    def _prompt_logprobs(self, chunks: Many[Chunk], hidden: Tensor) -> dict[int, PendingPrompt]:
        """Returns the log-probabilities of prompt tokens, as a dict from the index of a chunk to the log-probabilities
        of the prompt tokens in that chunk. The dict has only chunks whose requests ask for prompt log-probabilities."""
        prompts: dict[int, PendingPrompt] = {}
        row = 0
        for i, chunk in enumerate(chunks):
            end = row + chunk.end - chunk.start
            if (count := chunk.sequence.params.prompt_logprobs) is not None:
                prompts[i] = self._score_prompt(chunk, hidden[row:end], count)
            row = end
        return prompts

    def _score_prompt(self, chunk: Chunk, hidden: Tensor, count: int) -> PendingPrompt:
        """Launches the computation of log-probabilities for the prompt tokens that this chunk predicts, except tokens
        whose log-probability an earlier engine process has already sent. The hidden state at position p predicts the
        token at position p + 1, and no hidden state predicts the first token of the prompt."""
        seq = chunk.sequence
        first = max(chunk.start + 1, seq.num_prompt_logprobs, 1)
        last = min(chunk.end, seq.num_prompt - 1)
        slices: list[PendingLogprobs] = []
        for start in range(first, last + 1, PROMPT_LOGITS_ROWS):
            end = min(start + PROMPT_LOGITS_ROWS, last + 1)
            logits = self.model.logits(hidden[start - 1 - chunk.start : end - 1 - chunk.start])
            slices.append(PendingLogprobs(logits, seq.tokens[start:end], [count] * (end - start)))
        return PendingPrompt(chunk.start == 0 and seq.num_prompt_logprobs == 0, tuple(slices))


def _sampling_rows(chunk: Chunk) -> list[tuple[SamplingRow, Sequence]]:
    """Returns one row of the sampler, with its sequence, for each token that the chunk samples."""
    if not chunk.num_sampled:
        return []
    seq = chunk.sequence
    # `pending` is the number of tokens that the host does not know yet and that precede the last token that the chunk
    # samples.
    pending = chunk.end - len(seq.tokens)
    row = SamplingRow(seq.params, seq.tokens, seq.num_prompt, seq.request.index, pending)
    earlier = [row._replace(num_pending=pending - i) for i in range(chunk.num_sampled - 1, 0, -1)]
    return [(row, seq) for row in (*earlier, row)]
