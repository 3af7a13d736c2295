"""The class `BatchRunner` runs all batches in the background."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import uuid
from collections import Counter
from collections.abc import Callable, Iterable

import anyio.to_thread
import msgspec
from fastapi import APIRouter

from jamba_server.engine.errors import EngineError
from jamba_server.server.http.batches.call import Outcome, call
from jamba_server.server.http.batches.endpoints import lines_app
from jamba_server.server.http.batches.job import Contents, Job, read_contents
from jamba_server.server.http.batches.lines import Line
from jamba_server.server.http.batches.order import Pending
from jamba_server.server.http.batches.results import error_line, reply_line, tokens_of
from jamba_server.server.http.batches.table import Batch, BatchTable, Record, Result, Status
from jamba_server.server.http.errors import Stage
from jamba_server.server.http.services import Services

logger = logging.getLogger(__name__)

UNAVAILABLE = 503  # the status of a line that cannot run now and is tried again
RETRY_SECONDS = 1.0
# Number of lines whose prompts are rendered and tokenised at the same time. The prompts of other requests wait for
# them.
MAX_PREPARING = 4
SWEEP_SECONDS = 60.0  # longest time between two searches for files and batches whose time is over
# The bodies of lines in flight may have this part of the memory for the bodies of all requests, on top of it.
BODY_PART = 4
EXPIRED = ("batch_expired", "This request could not be run before the completion window ended.")


class BatchRunner:
    """Runs the lines of all batches that have not ended, a limited number at a time. Owners take turns; the batches of
    an owner run in the order in which they were made.

    A line is finished when its result is in the database. A line in flight when the server ends has no result, so it
    runs again at the next start.
    """

    def __init__(self, services: Services, routers: Iterable[APIRouter]) -> None:
        """`routers` have the routes of the server."""
        self._services, self._store, self._files = services, services.batches, services.files
        self._app = lines_app(services, routers)
        self._jobs: dict[int, Job] = {}
        self._limit = 0  # number of lines in flight; 0 until the engine has loaded
        self._bytes_in_flight = 0
        # The batches and numbers of the lines in flight that the engine does not have yet.
        self._preparing: set[tuple[int, int]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Starts to run batches, in tasks of the running event loop."""
        if self._store.enabled:
            self._tasks = [
                asyncio.create_task(self._run(), name="batches"),
                asyncio.create_task(self._await_engine(), name="batches await the engine"),
            ]

    async def close(self) -> None:
        """Stops all batches. They go on when the server is started again."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for job in self._jobs.values():
            await job.stop()

    async def _await_engine(self) -> None:
        engine, config = self._services.engine, self._services.config
        if engine.health.loading is not None:
            await engine.first_start()
        with contextlib.suppress(EngineError):  # an engine that has failed to start has no properties
            self._limit = config.max_batch_requests or 2 * engine.info.max_num_seqs
            self._fill()

    async def _run(self) -> None:
        while True:
            self._store.changed.clear()
            try:
                going_on = [await self._try(batch) for batch in await self._store.run(BatchTable.open_batches)]
                await self._sweep()
            except (sqlite3.Error, OSError, EngineError) as error:
                logger.error("batches cannot go on and are tried again: %s", error)
                going_on = [False]
            if not all(going_on):
                await asyncio.sleep(RETRY_SECONDS)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds_to_wait()):
                    await self._store.changed.wait()

    async def _try(self, batch: Batch) -> bool:
        """Does what can be done for a batch now. Returns whether this has succeeded."""
        try:
            await self._advance(batch)
        except FileNotFoundError:
            logger.error("%s fails: its input file is gone", batch.record.id)
            errors = _errors("input_file_missing", "The input file is gone.")
            await self._change(batch.number, lambda record: msgspec.structs.replace(record, errors=errors))
            await self._finalize(batch.number, "failed")
        except (sqlite3.Error, OSError) as error:
            logger.error("%s cannot go on and is tried again: %s", batch.record.id, error)
            return False
        except Exception:  # whatever is wrong with one batch, the others go on
            logger.exception("%s cannot go on and is tried again", batch.record.id)
            return False
        return True

    def _seconds_to_wait(self) -> float:
        ends = [job.record.expires - self._store.now() for job in self._jobs.values()]
        return max(0.0, min([SWEEP_SECONDS, *ends]))

    async def _sweep(self) -> None:
        """Deletes files whose time has come, but no input of a batch that has not ended."""
        for id_ in await self._files.expired():
            if await self._store.reader_of(id_) is None:
                await self._files.remove([id_])

    # The life of a batch ------------------------------------------------------------------------------------------

    async def _advance(self, batch: Batch) -> None:
        """Does what can be done for a batch now."""
        record, job = batch.record, self._jobs.get(batch.number)
        match record.status:
            case "cancelling":
                if job is not None:
                    await job.stop()
                await self._finalize(batch.number, record.ends_as)
            case "finalizing":
                await self._finalize(batch.number, record.ends_as)
            case "validating":
                await self._validate(batch)
            case _ if record.expires <= self._store.now():
                await self._expire(batch, job)
            case _ if job is None:
                await self._resume(batch)
            case _ if job.is_done:
                await self._finalize(batch.number, "completed")
            case _:
                self._fill()

    async def _validate(self, batch: Batch) -> None:
        contents, now = await self._read(batch.record), self._store.now()
        if contents.problem is not None:
            errors = _errors(*contents.problem)
            await self._change(batch.number, lambda record: record.at("failed", now, errors=errors))
            return
        record = await self._store.run(
            lambda table: table.begin(
                batch.number, lambda record: record.at("in_progress", now, total=contents.total), contents.bad
            )
        )
        if record is not None:
            self._begin(batch.number, record, contents.pending)
        self._store.changed.set()  # perhaps no line can run, or the batch was cancelled meanwhile

    async def _resume(self, batch: Batch) -> None:
        """Goes on with a batch that was in progress when the server ended."""
        finished = await self._store.run(lambda table: table.finished(batch.number))
        contents = await self._read(batch.record)
        pending = [line for line in contents.pending if line.number not in finished]
        logger.info("%s goes on: %d of %d lines are left", batch.record.id, len(pending), batch.record.total)
        self._begin(batch.number, batch.record, pending)
        self._store.changed.set()

    def _begin(self, number: int, record: Record, pending: list[Pending]) -> None:
        self._jobs[number] = Job(number, record, self._files.path(record.input_file), pending)
        self._fill()

    async def _expire(self, batch: Batch, job: Job | None) -> None:
        """Ends a batch whose time is over. The lines without a result get an error."""
        if job is not None:
            await job.stop()
        finished = await self._store.run(lambda table: table.finished(batch.number))
        contents = await self._read(batch.record)
        left = [line for line in contents.pending if line.number not in finished]
        path = self._files.path(batch.record.input_file)

        def late() -> list[Result]:
            reader = Job(batch.number, batch.record, path, [])
            return [
                Result(line=line.number, ok=False, text=error_line(reader.read(line).custom_id, *EXPIRED))
                for line in left
            ]

        results = await anyio.to_thread.run_sync(late)
        await self._store.run(lambda table: table.put(batch.number, results))
        await self._finalize(batch.number, "expired" if left else "completed")

    async def _finalize(self, number: int, ends_as: Status) -> None:
        """Writes the results into files. A kill of the server in between does no harm: the names of the files are fixed
        before they are written, so they are written again under the same names."""
        now, run = self._store.now(), self._store.run
        has = [await run(lambda table, ok=ok: table.has_results(number, ok=ok)) for ok in (True, False)]

        def name_files(record: Record) -> Record:
            status: Status = "cancelling" if record.status == "cancelling" else "finalizing"
            ends: Status = "cancelled" if record.status == "cancelling" else ends_as
            ids = [id_ or f"file-{uuid.uuid4().hex}" for id_ in (record.output_file, record.error_file)]
            output, error = (id_ if exists else None for id_, exists in zip(ids, has, strict=True))
            at = int(record.times.get(status, now))
            return record.at(status, at, ends_as=ends, output_file=output, error_file=error)

        record = await self._change(number, name_files)
        if record is not None:
            for id_, ok, name in ((record.output_file, True, "output"), (record.error_file, False, "error")):
                if id_ is not None:
                    await self._write(number, record, id_, ok=ok, name=f"{record.id}_{name}.jsonl")
            ended, ends = self._store.now(), record.ends_as
            await run(lambda table: table.end(number, lambda record: record.at(ends, ended)))
            logger.info("%s is %s", record.id, record.ends_as)
        self._jobs.pop(number, None)

    async def _write(self, number: int, record: Record, id_: str, *, ok: bool, name: str) -> None:
        def lines() -> Iterable[bytes]:
            return table.texts(number, ok=ok)

        table = await self._store.run(lambda table: table)
        await self._files.put_result(id_, record.owner, name, lines, record.output_lifetime)

    async def _change(self, number: int, make: Callable[[Record], Record]) -> Record | None:
        return await self._store.run(lambda table: table.change(number, make))

    async def _read(self, record: Record) -> Contents:
        path, limit = self._files.path(record.input_file), self._services.config.max_body_bytes
        return await anyio.to_thread.run_sync(lambda: read_contents(path, [record.endpoint], max_bytes=limit))

    # Lines --------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Begins as many lines as may be in flight."""
        if self._services.lifecycle.draining:
            return
        num_running = Counter[str]()
        for job in self._jobs.values():
            num_running[job.record.owner] += len(job.running)
        while (
            num_running.total() < self._limit
            and len(self._preparing) < MAX_PREPARING
            and (found := self._next(num_running)) is not None
        ):
            job, line = found
            self._preparing.add((job.number, line.number))
            task = asyncio.create_task(self._line(job, line), name=job.record.id)
            job.running[line.number] = task
            # A task that is cancelled before its first step runs nothing of its function, not even a `finally`.
            task.add_done_callback(lambda task, job=job, line=line: self._ended(job, line))
            num_running[job.record.owner] += 1

    def _next(self, num_running: Counter[str]) -> tuple[Job, Pending] | None:
        """Returns the line that should run next, and removes it from its job."""
        if self._bytes_in_flight > self._services.config.body_memory_bytes // BODY_PART:
            return None
        jobs = [job for job in self._jobs.values() if not job.stopping and len(job.order)]
        for job in sorted(jobs, key=lambda job: (num_running[job.record.owner], job.number)):
            if (line := job.order.take()) is not None:
                self._bytes_in_flight += line.size
                return job, line
        return None

    async def _line(self, job: Job, line: Pending) -> None:
        """Runs a line and stores its result."""
        custom_id = None
        try:
            request = await anyio.to_thread.run_sync(job.read, line)
            custom_id = request.custom_id
            outcome = await self._answer(job, line, request)
            text = reply_line(custom_id, outcome)
            await self._put(job, Result(line=line.number, ok=outcome.ok, text=text, tokens=tokens_of(outcome)))
        except Exception:  # whatever is wrong, each line has a result
            logger.exception("%s: line %d failed", job.record.id, line.number + 1)
            text = error_line(custom_id, "server_error", f"Line {line.number + 1}: the server's log has the error.")
            await self._put(job, Result(line=line.number, ok=False, text=text))

    def _ended(self, job: Job, line: Pending) -> None:
        """Must be called when a line has ended, in whatever way. Begins further lines."""
        job.order.computed(line)
        self._preparing.discard((job.number, line.number))
        del job.running[line.number]
        self._bytes_in_flight -= line.size
        self._fill()
        if job.is_done:
            self._store.changed.set()

    async def _answer(self, job: Job, line: Pending, request: Line) -> Outcome:
        """Returns the reply to a line. While the server cannot run it, the line waits."""

        def on_progress(stage: Stage) -> None:
            self._preparing.discard((job.number, line.number))
            if stage == "first_token":
                job.order.computed(line)
            self._fill()

        while True:
            outcome = await call(
                self._app,
                request.url,
                bytes(request.body),
                owner=job.record.owner,
                background=True,
                on_progress=on_progress,
            )
            if outcome.status != UNAVAILABLE:
                return outcome
            await asyncio.sleep(RETRY_SECONDS)

    async def _put(self, job: Job, result: Result) -> None:
        """Stores a result. While the disk is full, the line waits. The log says so once for each batch, because a log
        that grows with each attempt might lie on the same disk."""
        while True:
            try:
                await self._store.run(lambda table: table.put(job.number, [result]))
            except sqlite3.Error as error:
                if not job.waits_for_disk:
                    logger.error("%s: results cannot be stored and are tried again: %s", job.record.id, error)
                job.waits_for_disk = True
                await asyncio.sleep(RETRY_SECONDS)
            else:
                job.waits_for_disk = False
                return


def _errors(code: str, message: str) -> list[dict[str, object]]:
    """Returns the reason why a whole batch fails, in the form of OpenAI's API."""
    return [{"code": code, "message": message, "param": "input_file_id", "line": None}]
