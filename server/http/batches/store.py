"""The class `BatchStore` keeps batches, without blocking the event loop."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread

from jamba_server.engine.errors import Overloaded, RequestRejected
from jamba_server.server.http.batches.table import Batch, BatchTable, Record
from jamba_server.server.http.errors import NotStored, RateLimited

logger = logging.getLogger(__name__)

T = TypeVar("T")

TABLE = "batches.sqlite"
MAX_OPEN = 100  # number of batches of one owner that have not ended
MAX_KEPT = 10_000  # number of batches that are kept; the oldest that have ended are deleted
RETRY_SECONDS = 60


class BatchStore:
    """Keeps batches in a database in the folder `data`. Every method that serves a client takes the name of an owner of
    API keys, and finds only batches of this owner. A thread runs the methods of the table one after the other.

    `changed` is set when a batch was added or cancelled. `now` returns the Unix time in seconds.
    """

    def __init__(self, data: Path | None, *, enabled: bool, now: Callable[[], float] = time.time) -> None:
        """Opens the database. Without `enabled`, or if `data` is None, no batches are kept. Raises ConfigError if the
        database cannot be used."""
        self.now, self.changed = now, asyncio.Event()
        self._table = BatchTable(data / TABLE) if data is not None and enabled else None
        self._one_at_a_time = anyio.CapacityLimiter(1)

    @property
    def enabled(self) -> bool:
        return self._table is not None

    async def close(self) -> None:
        if self._table is not None:
            await self.run(BatchTable.close)

    async def add(self, record: Record) -> Batch:
        """Adds a batch. Raises RateLimited if the owner has too many that have not ended."""
        batch = await self.serve(lambda table: table.add(record, max_open=MAX_OPEN, max_kept=MAX_KEPT))
        if batch is None:
            raise RateLimited(
                f"{MAX_OPEN} batches with this API key have not ended; there may be no more.",
                kind="requests",
                retry_after=RETRY_SECONDS,
            )
        self.changed.set()
        return batch

    async def get(self, id_: str, owner: str) -> Batch:
        """Raises NotStored if the owner has no batch with this id."""
        if not self.enabled or (batch := await self.serve(lambda table: table.get(id_, owner))) is None:
            raise NotStored("batch", id_)
        return batch

    async def page(self, owner: str, *, after: str | None, limit: int) -> list[Batch]:
        """Returns up to `limit` batches, the newest first, beginning after the batch `after`. Raises RequestRejected if
        the owner has no batch `after`."""
        if not self.enabled:
            return []
        if after is not None and await self.serve(lambda table: table.get(after, owner)) is None:
            raise RequestRejected(f"There is no batch with the id {after[:64]!r}.", param="after")
        return await self.serve(lambda table: table.page(owner, after=after, limit=limit))

    async def cancel(self, id_: str, owner: str) -> Batch:
        """Begins to cancel a batch. Does nothing if this has begun already. Raises RequestRejected if the batch has
        ended or is about to end."""
        batch = await self.get(id_, owner)
        now = self.now()
        done = await self.serve(
            lambda table: table.change(
                batch.number, lambda record: record.at("cancelling", now), only_from=("validating", "in_progress")
            )
        )
        self.changed.set()
        batch = await self.get(id_, owner)
        if done is None and batch.record.status not in ("cancelling", "cancelled"):
            raise RequestRejected(
                f"The batch has the status {batch.record.status}; only a batch with the status validating or "
                "in_progress can be cancelled.",
                param="batch_id",
            )
        return batch

    async def reader_of(self, file_id: str) -> str | None:
        """Returns the id of a batch that has to read an input file, or None."""
        return await self.serve(lambda table: table.reader_of(file_id)) if self.enabled else None

    async def serve(self, work: Callable[[BatchTable], T]) -> T:
        """Calls `work` with the table, in a thread. Raises Overloaded if the table cannot be used at present."""
        try:
            return await self.run(work)
        except sqlite3.Error as error:
            logger.error("the stored batches cannot be used: %s", error)
            raise Overloaded(f"The stored batches cannot be used at present: {error}.") from error

    async def run(self, work: Callable[[BatchTable], T]) -> T:
        """Calls `work` with the table, in a thread. Raises sqlite3.Error if the table cannot be used."""
        table = self._table
        assert table is not None, "without a table there are no batches"
        return await anyio.to_thread.run_sync(lambda: work(table), limiter=self._one_at_a_time)
