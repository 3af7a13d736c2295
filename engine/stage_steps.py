"""Steps of a pipeline of stages: the last stage sends the results of each step to all others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from jamba_server.engine.parallel.pipe import Pipe
from jamba_server.engine.scheduler import ChunkResult, SchedulerOutput


class LaunchedStep(Protocol):
    """A launched step whose results have not been read. The copies of saved states to slots took `restore_seconds`."""

    @property
    def output(self) -> SchedulerOutput: ...

    @property
    def restore_seconds(self) -> float: ...

    def results(self) -> Sequence[ChunkResult]:
        """Waits for the device and returns one result for each chunk, in the order of the chunks."""
        ...


@dataclass(frozen=True, slots=True)
class ReadStep:
    """A step whose results are known. The last stage reads its results at once, because the other stages wait for
    them. A step that only copies has none."""

    output: SchedulerOutput
    restore_seconds: float
    found: Sequence[ChunkResult]

    @classmethod
    def sent(cls, step: LaunchedStep, pipe: Pipe) -> ReadStep:
        """Reads the results of a step and sends them to the other stages."""
        found = step.results()
        pipe.send_results(msgspec.msgpack.encode(found))
        return cls(step.output, step.restore_seconds, found)

    def results(self) -> Sequence[ChunkResult]:
        return self.found


@dataclass(frozen=True, slots=True)
class EarlierStage:
    """A step of another stage than the last one, from which the results come."""

    output: SchedulerOutput
    restore_seconds: float
    pipe: Pipe

    def results(self) -> Sequence[ChunkResult]:
        return msgspec.msgpack.decode(self.pipe.receive_results(), type=list[ChunkResult])
