"""Steps that were launched, as `EngineCore` sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
    """A step whose results are known. A step that only copies has none."""

    output: SchedulerOutput
    restore_seconds: float
    found: Sequence[ChunkResult] = ()

    def results(self) -> Sequence[ChunkResult]:
        return self.found
