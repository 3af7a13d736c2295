"""StageRunner: runs the steps of one stage of a pipeline. Each stage hands the hidden states of a step to the next one.
The last stage samples, and sends the results of each step to all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor

from jamba_server.engine.batch import ForwardBatch
from jamba_server.engine.launched_step import LaunchedStep, ReadStep
from jamba_server.engine.model_runner import ModelRunner
from jamba_server.engine.parallel.pipe import Pipe
from jamba_server.engine.scheduler import ChunkResult, SchedulerOutput


@dataclass(frozen=True, slots=True)
class EarlierStage:
    """A launched step of a stage that is not the last one. The last stage sends the results of the step."""

    output: SchedulerOutput
    restore_seconds: float
    pipe: Pipe

    def results(self) -> Sequence[ChunkResult]:
        return msgspec.msgpack.decode(self.pipe.receive_results(), type=list[ChunkResult])


class StageRunner(ModelRunner):
    """Runs the layers of one stage. `pipe` has all stages; `parts` and `settings` are the arguments of `ModelRunner`.
    The other stages must launch the same steps."""

    def __init__(self, pipe: Pipe, *parts: Any, **settings: Any) -> None:
        super().__init__(*parts, **settings)
        self._pipe = pipe

    @property
    def num_stages(self) -> int:
        return self._pipe.stage.count

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        if self._pipe.stage.is_last:
            step = super().launch(output)
            if not output.chunks:
                return step
            found = step.results()  # the other stages wait for them
            self._pipe.send_results(msgspec.msgpack.encode(found))
            return ReadStep(output, step.restore_seconds, found)
        restore_seconds = self._copy_units(output.copies)
        if not output.chunks:
            return ReadStep(output, restore_seconds)
        self._pipe.send(self._run(output.chunks)[0])
        return EarlierStage(output, restore_seconds, self._pipe)

    def _run_layers(self, batch: ForwardBatch) -> Tensor:
        rows, size = len(batch.token_ids), self.model.config.hidden_size
        received = self._pipe.receive(rows, size, self.model.dtype, self.device)
        return self.model.forward(batch, self.storage, received)
