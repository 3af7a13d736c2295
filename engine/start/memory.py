"""Builds dummy steps, which need no requests, and measures how much GPU memory the largest of these steps need. The
measurement precedes the allocation of the caches, so that the caches can take the remaining memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from jamba_server.engine.cache.manager import CacheCopies
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.scheduler import Chunk, SchedulerOutput
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.start.memory_plan import Measured, usable_bytes
from jamba_server.engine.types import MAX_LOGPROBS, Request, RequestKind, SamplingParams

# With these parameters a request needs the most memory. Penalties are left out: the memory that penalties need grows
# with the lengths of all contexts in the batch, and contexts of the greatest length do not all fit into memory at once.
# The limit on reasoning tokens is 0, so that a mask of allowed tokens is applied to every row.
PARAMS = SamplingParams(
    max_tokens=1,
    top_p=0.9,
    logprobs=MAX_LOGPROBS,
    prompt_logprobs=MAX_LOGPROBS,
    thinking_token_budget=0,
    thinking_end=(0,),
)


class DeviceMemory(Protocol):
    """Reports the memory of a GPU in bytes."""

    def free_and_total(self) -> tuple[int, int]:
        """Returns (free, total) in bytes: the size of the GPU memory that no process uses now, and the size of the
        GPU's whole memory."""
        ...

    def allocated(self) -> int:
        """Returns how many bytes of GPU memory the tensors of this process use now."""
        ...

    def reset_peak(self) -> None: ...

    def peak(self) -> int:
        """Returns the largest amount of memory that the tensors of this process used at one time since `reset_peak`."""
        ...


class CudaMemory:
    """Reports the memory of a CUDA device, as torch's memory functions return it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_and_total(self) -> tuple[int, int]:
        torch.cuda.empty_cache()  # memory that torch's allocator caches for reuse must count as free
        return torch.cuda.mem_get_info(self._device)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


def usable_memory(memory: DeviceMemory, utilization: float) -> int:
    """Returns how many bytes this process may still allocate until the fraction `utilization` of the GPU's memory is in
    use."""
    return usable_bytes(*memory.free_and_total(), utilization)


class DummySteps:
    """Builds dummy steps of the sizes that decide how much memory a step needs and which kernels it runs. The steps use
    only KV page 0 and state slot 0, which no sequence owns. `kind` is the kind of their requests: a classifier samples
    no tokens. `gathered_tokens` is the largest number of tokens whose keys and values attention copies, or 0 if it
    copies none."""

    def __init__(
        self,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        kind: RequestKind = "generate",
        gathered_tokens: int = 0,
    ) -> None:
        self._gathered_tokens = gathered_tokens
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs, self._max_model_len, self.block_size = max_num_seqs, max_model_len, block_size
        self._kind: RequestKind = kind
        self._params = PARAMS if kind == "generate" else SamplingParams(max_tokens=0)

    def __str__(self) -> str:
        return (
            f"max_num_batched_tokens {self.max_num_batched_tokens}, or max_num_seqs {self.max_num_seqs} at "
            f"max_model_len {self._max_model_len}"
        )

    def largest(self) -> Iterator[SchedulerOutput]:
        """Yields the steps that need the most memory: prompts that fill a step, the last chunk of the longest prompt,
        the last chunk of the longest prompt whose keys and values attention copies (it copies none of longer ones), and
        a full batch of decodes at the end of the longest context. The smallest step, a decode of one sequence, follows,
        because it might run other kernels than the large steps."""
        # The step gets `max_num_seqs` additional prompt tokens, as substitutes for the decodes that can run in the same
        # step.
        yield self._output(self.prompts(self.max_num_batched_tokens + self.max_num_seqs, self._max_model_len))
        if (last := self._max_model_len - 1) > 0:
            longest = self._sequence(self._max_model_len)
            for end in (self._max_model_len, self._gathered_tokens):
                if 0 < end <= self._max_model_len:
                    first = max(end - self.max_num_batched_tokens, 0)
                    yield self._output([self._chunk(longest, first, end)])
            yield self._output([self._chunk(longest, last, last + 1)] * self.max_num_seqs)
            yield self._output([self._chunk(self._sequence(2), 1, 2)])

    def of_all_sizes(self) -> Iterator[SchedulerOutput]:
        """Yields steps of decodes, of long prompts and of one-token prompts, whose sizes are powers of two. A kernel
        chooses its tile shape by the size of the step. Every tile shape is chosen for a range of sizes whose largest
        size is more than twice the smallest, so the range contains a power of two. The steps therefore use every tile
        shape. At the end, a step with one cache copy and a step with two cache copies follow, because Triton compiles a
        kernel again if an address is not a multiple of 16. In a list of one copy, the column of destinations has such
        an address."""
        if self._max_model_len > 1:
            reply = self._chunk(self._sequence(2), 1, 2)
            for count in _powers_of_two(self.max_num_seqs):
                yield self._output([reply] * count)
            # These steps have a decode at row 0 of the batch, so the prompt begins at another row.
            for tokens in _powers_of_two(self.max_num_batched_tokens):
                yield self._output([reply, *self.prompts(tokens, self._max_model_len)])
        for tokens in _powers_of_two(self.max_num_batched_tokens):
            yield self._output(self.prompts(tokens, self._max_model_len))
        for count in _powers_of_two(self.max_num_seqs):
            yield self._output(self.prompts(count, 1))
        for copies in ([(0, 0)], [(0, 0)] * 2):
            yield SchedulerOutput(tuple(self.prompts(1, 1)), CacheCopies(pages=copies, states=copies, saves=copies), ())

    def reply(self) -> Chunk | None:
        """Returns a chunk that decodes a sequence of two tokens, or None if no sequence decodes."""
        if self._max_model_len == 1 or not self._params.max_tokens:
            return None
        return self._chunk(self._sequence(2), 1, 2)

    def prompts(self, tokens: int, longest: int) -> list[Chunk]:
        """Returns as few prompts as possible that have `tokens` tokens in total. No prompt is longer than `longest`
        tokens."""
        full, rest = divmod(tokens, longest)
        lengths = [longest] * full + ([rest] if rest else [])
        return [self._chunk(self._sequence(length), 0, length) for length in lengths]

    def _sequence(self, length: int) -> Sequence:
        request = Request(id="", prompt=[0] * length, params=self._params, kind=self._kind)
        seq = Sequence.of(request, arrival=0, now=0.0)
        seq.block_ids = array("i", [0] * -(-length // self.block_size))
        return seq

    def _chunk(self, seq: Sequence, start: int, end: int) -> Chunk:
        return Chunk(seq, start, end, num_sampled=min(1, self._params.max_tokens))

    def _output(self, chunks: list[Chunk]) -> SchedulerOutput:
        return SchedulerOutput(tuple(chunks), CacheCopies(), ())


def _powers_of_two(most: int) -> list[int]:
    """Returns the powers of two below `most`, and `most` itself."""
    return [*(1 << i for i in range((most - 1).bit_length())), most]


def measure(run: Callable[[SchedulerOutput], object], steps: DummySteps, memory: DeviceMemory) -> Measured:
    """Runs the largest dummy steps and returns the largest amount of memory that they used in addition to the weights.
    Running the steps also compiles their kernels. `run` must wait until the step is done. Raises ConfigError if the
    device has too little memory for a step."""
    memory.reset_peak()
    before = memory.allocated()
    try:
        for output in steps.largest():
            run(output)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"The memory of the device is too small for a step of {steps}: lower one of these options ({error})."
        ) from error
    return Measured(steps.max_num_batched_tokens, steps.max_num_seqs, memory.peak() - before)
