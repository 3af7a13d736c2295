"""Steps that nobody asked for; what the largest of them take on a GPU, measured before the caches are allocated."""

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
from jamba_server.engine.types import MAX_LOGPROBS, Request, SamplingParams

# What a request can ask for that takes memory; penalties of contexts that do not fit at once are not among it.
PARAMS = SamplingParams(max_tokens=1, top_p=0.9, logprobs=MAX_LOGPROBS, prompt_logprobs=MAX_LOGPROBS)


class DeviceMemory(Protocol):
    """A GPU's memory, in bytes."""

    def free_and_total(self) -> tuple[int, int]:
        """What nobody uses now, and what there is."""
        ...

    def allocated(self) -> int:
        """What tensors of this process take now."""
        ...

    def reset_peak(self) -> None: ...

    def peak(self) -> int:
        """What they took at most since `reset_peak`."""
        ...


class CudaMemory:
    """`DeviceMemory` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free_and_total(self) -> tuple[int, int]:
        torch.cuda.empty_cache()  # what torch keeps for later counts as free
        return torch.cuda.mem_get_info(self._device)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


def usable_memory(memory: DeviceMemory, utilization: float) -> int:
    """Bytes left to take until the share `utilization` of the device is in use."""
    return usable_bytes(*memory.free_and_total(), utilization)


class DummySteps:
    """The steps that there can be, as far as memory or kernels depend on their sizes. They use page 0 and state 0 only,
    which no sequence owns."""

    def __init__(self, *, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs, self._max_model_len, self.block_size = max_num_seqs, max_model_len, block_size

    def __str__(self) -> str:
        return (
            f"max_num_batched_tokens {self.max_num_batched_tokens}, or max_num_seqs {self.max_num_seqs} at "
            f"max_model_len {self._max_model_len}"
        )

    def largest(self) -> Iterator[SchedulerOutput]:
        """A prompt, or as many as fill the step; a prompt and replies at the end of the longest context; and the
        smallest step, for which other kernels may be compiled."""
        # replies that run beside prompts count as more of these
        yield self._output(self.prompts(self.max_num_batched_tokens + self.max_num_seqs, self._max_model_len))
        if (last := self._max_model_len - 1) > 0:
            longest = self._sequence(self._max_model_len)
            first = max(self._max_model_len - self.max_num_batched_tokens, 0)
            yield self._output([Chunk(longest, first, self._max_model_len, num_sampled=1)])
            yield self._output([Chunk(longest, last, last + 1, num_sampled=1)] * self.max_num_seqs)
            yield self._output([Chunk(self._sequence(2), 1, 2, num_sampled=1)])

    def of_all_sizes(self) -> Iterator[SchedulerOutput]:
        """Replies, prompts as long as can be and as short, in powers of two: a kernel's tile, which changes with the
        number of rows or sequences by larger factors, is met in all of its shapes. One and two copies, because the
        address of every other list of their numbers is no multiple of 16."""
        if self._max_model_len > 1:
            reply = Chunk(self._sequence(2), 1, 2, num_sampled=1)
            for count in _powers_of_two(self.max_num_seqs):
                yield self._output([reply] * count)
            yield self._output([reply, *self.prompts(2, 2)])  # in which the prompt's first row is not the batch's
        for tokens in _powers_of_two(self.max_num_batched_tokens):
            yield self._output(self.prompts(tokens, self._max_model_len))
        for count in _powers_of_two(self.max_num_seqs):
            yield self._output(self.prompts(count, 1))
        for copies in ([(0, 0)], [(0, 0)] * 2):
            yield SchedulerOutput(tuple(self.prompts(1, 1)), CacheCopies(pages=copies, states=copies, saves=copies), ())

    def prompts(self, tokens: int, longest: int) -> list[Chunk]:
        """So many tokens, in as few prompts as can be if none is longer than `longest`."""
        full, rest = divmod(tokens, longest)
        lengths = [longest] * full + ([rest] if rest else [])
        return [Chunk(self._sequence(length), 0, length, num_sampled=1) for length in lengths]

    def _sequence(self, length: int) -> Sequence:
        seq = Sequence.of(Request(id="", prompt=[0] * length, params=PARAMS), arrival=0, now=0.0)
        seq.block_ids = array("i", [0] * -(-length // self.block_size))
        return seq

    def _output(self, chunks: list[Chunk]) -> SchedulerOutput:
        return SchedulerOutput(tuple(chunks), CacheCopies(), ())


def _powers_of_two(most: int) -> list[int]:
    """Up to `most`, which is the last whatever it is."""
    return [*(1 << i for i in range((most - 1).bit_length())), most]


def measure(run: Callable[[SchedulerOutput], object], steps: DummySteps, memory: DeviceMemory) -> Measured:
    """Runs the largest steps, which compiles their kernels, too. `run` waits for the step. ConfigError where the device
    has not the memory for one."""
    memory.reset_peak()
    before = memory.allocated()
    try:
        for output in steps.largest():
            run(output)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"The memory of the device is too small for a step of {steps}: lower one of them ({error})."
        ) from error
    return Measured(steps.max_num_batched_tokens, steps.max_num_seqs, memory.peak() - before)
