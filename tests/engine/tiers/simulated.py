"""The tiers on the simulator's memory: pages and states are numbers, files are real ones, and the disk's threads run
when the test lets them."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from jamba_server.engine.cache.state_store import SlotStates
from jamba_server.engine.cache.tiers.cache import TieredCache
from jamba_server.engine.cache.tiers.events import Event
from jamba_server.engine.cache.tiers.segment import Segment
from jamba_server.engine.cache.tiers.tiers import Tiers
from jamba_server.engine.core import only_restores
from jamba_server.engine.disk_tier.folder import SegmentFolder
from jamba_server.engine.disk_tier.worker import Worker
from jamba_server.engine.scheduler import Scheduler
from tests.engine.simulator import Simulator
from tests.engine.tiers import shapes


class SimulatedMover:
    """Copies pages and states between the dicts of a `Simulator` and segments."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.pages: dict[tuple[int, int], int] = {}
        self.slots: dict[int, int] = {}

    def read(self, pages: Sequence[int], used: int, place: int) -> Mapping[str, memoryview]:
        size = self.block_size
        numbers = array("q", (self.pages.get((page, i), 0) for page in pages for i in range(size)))
        numbers[used:] = array("q", [0] * (len(numbers) - used))
        return {"kv": memoryview(numbers).cast("B"), "ssm": memoryview(array("q", [self.slots[place]])).cast("B")}

    def write(self, contents: Sequence[tuple[Segment, Sequence[tuple[int, int]]]], slot: int | None) -> float:
        for segment, pairs in contents:
            for source, destination in pairs:
                numbers = segment.tensors["kv"].cast("q")[source * self.block_size :]
                self.pages.update({(destination, i): numbers[i] for i in range(self.block_size)})
        if slot is not None:
            self.slots[slot] = contents[-1][0].tensors["ssm"].cast("q")[0]
        return 0.0


class ManualWorker(Worker):
    """A disk tier without threads. The method `run` does one piece of the threads' work."""

    def __init__(self, folder: SegmentFolder) -> None:
        super().__init__(lambda: folder)
        self.events: list[Event] = []
        self._folder, self._post = folder, self.events.append

    def open(self) -> None:
        assert self._folder is not None
        self._folder.open()
        self._scan(self._folder)

    def close(self, timeout: float) -> bool:
        while self.run():
            pass
        return True

    def run(self, *, reads: bool = True, writes: bool = True) -> bool:
        """Returns whether there was something to do."""
        assert self._folder is not None
        if reads and not self._reads.empty() and (restore := self._reads.get()) is not None:
            self.events.append(self._read(restore))
            return True
        if writes and not self._writes.empty() and (work := self._writes.get()) is not None:
            work(self._folder)
            return True
        return False

    @property
    def is_idle(self) -> bool:
        return self._reads.empty() and not self.events

    def scan(self) -> None:
        assert self._folder is not None
        self._scan(self._folder)


class Life:
    """An engine from its start to its end."""

    def __init__(
        self,
        random: Random,
        root: Path | None,
        *,
        host_bytes: int,
        disk_bytes: int,
        ahead: bool,
        model: int = 0,
        **sizes: Any,
    ) -> None:
        self.random, shape = random, shapes.layout(sizes["block_size"])
        self.worker = (
            None if root is None else ManualWorker(SegmentFolder(root, shapes.fingerprint_of(model), shape, disk_bytes))
        )
        self.mover = SimulatedMover(sizes["block_size"])
        self.tiers = Tiers(block_size=sizes["block_size"], host_bytes=host_bytes, disk=self.worker, staging_bytes=1200)
        limits = {name: sizes.pop(name) for name in ("max_num_batched_tokens", "max_num_seqs", "max_model_len")}
        self.cache = TieredCache(SlotStates(sizes.pop("num_slots")), self.tiers, self.mover, shape, **sizes)
        mixed = limits["max_num_batched_tokens"]
        self.scheduler = Scheduler(self.cache, **limits, max_num_mixed_tokens=mixed, eos_token_ids=())
        self.simulator = Simulator(self.scheduler, ahead=ahead, model=model)
        self.mover.pages, self.mover.slots = self.simulator.pages, self.simulator.slots
        if self.worker is not None:
            self.worker.open()

    def deliver(self) -> None:
        """Does a random part of the disk's work. Then takes the events, as the engine does at the beginning of a
        step."""
        if self.worker is None:
            return
        for _ in range(self.random.choice((0, 0, 1, 3, 10))):
            self.worker.run(reads=self.random.random() < 0.5, writes=self.random.random() < 0.8)
        if self.random.random() < 0.05:
            self.worker.scan()
        if only_restores(self.scheduler):
            while not self.worker.events and self.worker.run():
                pass
        count = self.random.randint(1, len(self.worker.events)) if self.worker.events else 0
        for event in self.worker.events[:count]:
            self.cache.take(event)
        del self.worker.events[:count]

    def end(self, *, killed: bool) -> None:
        if not killed:
            self.simulator.take()
            self.scheduler.park()
            self.cache.close(0.0)
