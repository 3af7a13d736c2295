"""Pipe: the stages of a pipeline that hand the hidden states of each step to the next stage, over torch.distributed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jamba_server.engine.parallel.group import TIMEOUT, ProcessGroup, gloo, nccl
from jamba_server.engine.parallel.meeting import LOOPBACK
from jamba_server.engine.parallel.stages import Stage

# Messages of one kind between two stages arrive in the order in which they were sent.
_HIDDEN, _LENGTH, _RESULTS = 0, 1, 2


class Pipe:
    """The ranks of all stages that have the same part of each layer. `stage` says which of them this one is. A pipe
    with one stage exchanges nothing.

    Hidden states go through `hidden` and results through `control`, which is gloo's also on GPUs, because results are
    in host memory. All stages must run the same steps, and have at most as many steps in flight as there are stages.
    """

    def __init__(self, stage: Stage, hidden: ProcessGroup = None, control: ProcessGroup = None) -> None:
        assert (hidden is None) == (stage.count == 1), "one stage needs no process group, and several need one"
        assert (control is None) == (stage.count == 1), "results have a process group where hidden states have one"
        self.stage, self._hidden, self._control = stage, hidden, control
        # What has been sent stays in memory until it has arrived. By then, the receivers have it: they have at most
        # `stage.count` steps in flight.
        self._sent: deque[list[tuple[Any, Tensor]]] = deque()

    @classmethod
    def join(
        cls,
        stage: Stage,
        store: dist.Store,
        device: torch.device,
        timeout: timedelta = TIMEOUT,
        host: str = LOOPBACK,
    ) -> Pipe:
        """Waits until the ranks of all stages have met in `store`, and returns their pipe. For exchanges with gloo,
        this rank listens at the address `host`."""
        control = gloo(dist.PrefixStore("control", store), stage.index, stage.count, timeout, host)
        if device.type != "cuda":
            return cls(stage, control, control)
        return cls(stage, nccl(dist.PrefixStore("hidden", store), stage.index, stage.count, timeout), control)

    def receive(self, rows: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Returns the residual stream, dtype [rows, size], that the stage before this one sends for the oldest step
        that this stage has not received. Returns None on the first stage."""
        if self.stage.is_first:
            return None
        hidden = torch.empty(rows, size, dtype=dtype, device=device)
        self._hidden.recv([hidden.view(torch.uint8)], self.stage.index - 1, _HIDDEN).wait()
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Sends the residual stream [rows, size] of a step to the next stage, and does not wait until it arrives."""
        data = hidden.contiguous().view(torch.uint8)
        self._keep([(self._hidden.send([data], self.stage.index + 1, _HIDDEN), data)])

    def send_results(self, data: bytes) -> None:
        """Sends the results of a step from the last stage to all others, and does not wait until they arrive."""
        length, content = torch.tensor([len(data)]), torch.frombuffer(bytearray(data), dtype=torch.uint8)
        work: list[tuple[Any, Tensor]] = []
        for other in range(self.stage.count - 1):
            work.append((self._control.send([length], other, _LENGTH), length))
            work.append((self._control.send([content], other, _RESULTS), content))
        self._keep(work)

    def receive_results(self) -> bytes:
        """Returns the results of the oldest step whose results this stage has not received from the last stage."""
        last, length = self.stage.count - 1, torch.zeros(1, dtype=torch.int64)
        self._control.recv([length], last, _LENGTH).wait()
        content = torch.empty(int(length), dtype=torch.uint8)
        self._control.recv([content], last, _RESULTS).wait()
        return content.numpy().tobytes()

    def smallest(self, numbers: Sequence[int]) -> list[int]:
        """Returns the smallest of all stages' numbers, for each of `numbers`. It waits for all stages."""
        if self.stage.count == 1:
            return list(numbers)
        found, options = torch.tensor(numbers, dtype=torch.int64), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        self._control.allreduce([found], options).wait()
        return found.tolist()

    def _keep(self, work: list[tuple[Any, Tensor]]) -> None:
        self._sent.append(work)
        if len(self._sent) > self.stage.count:
            for sent, _ in self._sent.popleft():
                sent.wait()
