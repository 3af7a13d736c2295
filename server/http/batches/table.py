"""The class `BatchTable` keeps batches and the results of their lines in SQLite."""

from __future__ import annotations

import sqlite3
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from jamba_server.server.http.store.sqlite import open_database

VERSION = 1

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
# Batches with these statuses have work left.
OPEN: tuple[Status, ...] = ("validating", "in_progress", "finalizing", "cancelling")

# `record` has a batch as JSON. The other columns are those that queries need, or that change with each finished line.
# `number` grows with each new batch. A row of `results` is one finished line; `text` is the line for the output file if
# `ok`, and for the error file if not. With its row, the counts of its batch change in the same transaction, so a kill
# of the server loses no finished line, and counts none twice.
_SCHEMA = """
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    status TEXT NOT NULL,
    input_file TEXT NOT NULL,
    record BLOB NOT NULL,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    input_tokens INTEGER NOT NULL DEFAULT 0,
    cached_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX batches_by_owner ON batches (owner, number);
CREATE INDEX batches_by_status ON batches (status);
CREATE TABLE results (
    batch INTEGER NOT NULL REFERENCES batches (number) ON DELETE CASCADE,
    line INTEGER NOT NULL,
    ok INTEGER NOT NULL,
    text BLOB NOT NULL,
    PRIMARY KEY (batch, line)
)
"""
_COUNTS = "completed, failed, input_tokens, cached_tokens, output_tokens, reasoning_tokens"
_COLUMNS = f"number, record, {_COUNTS}"


class Tokens(msgspec.Struct, frozen=True):
    """Numbers of tokens: of prompts, of prompts in the prefix cache, of replies, and of their thoughts."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A batch without its counts. `created` and `expires` are Unix times in seconds. `times` has the time at which the
    batch got each status, by the name of the status. `total` is the number of lines. `output_lifetime` is the number of
    seconds after which the files with results are deleted, or None for the default. `errors` say why the batch failed.
    `ends_as` is the status that the batch gets when its results are in files. `output_file` and `error_file` are the
    ids of these files, or None if there is no such file."""

    id: str
    owner: str
    endpoint: str
    input_file: str
    window: str
    created: int
    expires: int
    status: Status = "validating"
    metadata: dict[str, str] | None = None
    output_lifetime: int | None = None
    times: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    total: int = 0
    errors: list[dict[str, Any]] = msgspec.field(default_factory=list[dict[str, Any]])
    ends_as: Status = "completed"
    output_file: str | None = None
    error_file: str | None = None

    @property
    def is_open(self) -> bool:
        return self.status in OPEN

    def at(self, status: Status, now: float, **changes: Any) -> Record:
        """Returns the batch with another status, which it gets at the time `now`."""
        return msgspec.structs.replace(self, status=status, times={**self.times, status: int(now)}, **changes)


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch with its counts. `number` is its number in the table."""

    number: int
    record: Record
    completed: int = 0
    failed: int = 0
    tokens: Tokens = field(default_factory=Tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished line of a batch: the number of the line, from 0, and the line for the output or the error file."""

    line: int
    ok: bool
    text: bytes
    tokens: Tokens = field(default_factory=Tokens)


class BatchTable:
    """The methods block, and only one thread may call them at a time. Each method is one transaction."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the database `path`. Raises ConfigError if it cannot be used."""
        self._path = path
        self._connection = open_database(path, _SCHEMA, VERSION)
        weakref.finalize(self, self._connection.close)

    def close(self) -> None:
        self._connection.close()

    def add(self, record: Record, *, max_open: int, max_kept: int) -> Batch | None:
        """Adds a batch. Returns None if its owner has `max_open` batches that have not ended. Of all batches that have
        ended, the oldest are deleted if there are more than `max_kept` batches."""
        with self._connection:
            run = self._connection.execute
            run("BEGIN IMMEDIATE")
            marks = ", ".join(f"'{status}'" for status in OPEN)
            [[num_open]] = run(
                f"SELECT count(*) FROM batches WHERE owner = ? AND status IN ({marks})", (record.owner,)
            ).fetchall()
            if num_open >= max_open:
                return None
            run(
                f"DELETE FROM batches WHERE status NOT IN ({marks}) AND number <= "
                "(SELECT max(number) FROM batches) - ?",
                (max_kept - 1,),
            )
            cursor = run(
                "INSERT INTO batches (id, owner, status, input_file, record) VALUES (?, ?, ?, ?, ?)",
                (record.id, record.owner, record.status, record.input_file, msgspec.json.encode(record)),
            )
            number = cursor.lastrowid
            assert number is not None, "INSERT sets the row's number"
        return Batch(number, record)

    def get(self, id_: str, owner: str) -> Batch | None:
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM batches WHERE id = ? AND owner = ?", (id_, owner)
        ).fetchall()
        return _batch(rows[0]) if rows else None

    def page(self, owner: str, *, after: str | None, limit: int) -> list[Batch]:
        """Returns up to `limit` batches of an owner, the newest first, beginning after the batch `after`."""
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM batches WHERE owner = ?1 AND "
            "(?2 IS NULL OR number < (SELECT number FROM batches WHERE id = ?2)) ORDER BY number DESC LIMIT ?3",
            (owner, after, limit),
        ).fetchall()
        return list(map(_batch, rows))

    def open_batches(self) -> list[Batch]:
        """Returns the batches that have work left, the oldest first."""
        marks = ", ".join("?" * len(OPEN))
        rows = self._connection.execute(
            f"SELECT {_COLUMNS} FROM batches WHERE status IN ({marks}) ORDER BY number", OPEN
        ).fetchall()
        return list(map(_batch, rows))

    def reader_of(self, file_id: str) -> str | None:
        """Returns a batch that has to read an input file, or None."""
        marks = ", ".join("?" * len(OPEN))
        rows = self._connection.execute(
            f"SELECT id FROM batches WHERE input_file = ? AND status IN ({marks}) LIMIT 1", (file_id, *OPEN)
        ).fetchall()
        return rows[0][0] if rows else None

    def change(
        self, number: int, make: Callable[[Record], Record], *, only_from: Iterable[Status] = OPEN
    ) -> Record | None:
        """Replaces a batch's record by what `make` returns for it, if its status is one of `only_from`. Returns the new
        record, or None if the batch has another status."""
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            return self._change(number, make, only_from)

    def begin(self, number: int, make: Callable[[Record], Record], failed: Iterable[Result]) -> Record | None:
        """Records that the lines of a batch have been checked, and the results of those that cannot run. Returns the
        new record, or None if the batch has another status than "validating" meanwhile."""
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            record = self._change(number, make, ("validating",))
            if record is not None:
                for result in failed:
                    self._put(number, result)
        return record

    def put(self, number: int, results: Iterable[Result]) -> None:
        """Stores results. Those of lines that have a result already are ignored."""
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            for result in results:
                self._put(number, result)

    def finished(self, number: int) -> set[int]:
        """Returns the numbers of the lines that have a result."""
        rows = self._connection.execute("SELECT line FROM results WHERE batch = ?", (number,)).fetchall()
        return {line for (line,) in rows}

    def texts(self, number: int, *, ok: bool) -> Iterator[bytes]:
        """Yields the results of a batch that belong in its output file, or in its error file."""
        query = "SELECT text FROM results WHERE batch = ? AND ok = ? ORDER BY line"
        # With a connection of its own, any thread may read, while others write.
        with closing(sqlite3.connect(self._path)) as connection:
            for (text,) in connection.execute(query, (number, ok)):
                yield text

    def has_results(self, number: int, *, ok: bool) -> bool:
        query = "SELECT 1 FROM results WHERE batch = ? AND ok = ? LIMIT 1"
        return bool(self._connection.execute(query, (number, ok)).fetchall())

    def end(self, number: int, make: Callable[[Record], Record]) -> Record | None:
        """Records that a batch has ended and its results are in files."""
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            record = self._change(number, make, OPEN)
            self._connection.execute("DELETE FROM results WHERE batch = ?", (number,))
        return record

    def _change(self, number: int, make: Callable[[Record], Record], only_from: Iterable[Status]) -> Record | None:
        run = self._connection.execute
        rows = run("SELECT record FROM batches WHERE number = ?", (number,)).fetchall()
        if not rows or (before := msgspec.json.decode(rows[0][0], type=Record)).status not in only_from:
            return None
        record = make(before)
        run(
            "UPDATE batches SET status = ?, record = ? WHERE number = ?",
            (record.status, msgspec.json.encode(record), number),
        )
        return record

    def _put(self, number: int, result: Result) -> None:
        new = self._connection.execute(
            "INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?)", (number, result.line, result.ok, result.text)
        ).rowcount
        if not new:
            return
        tokens = result.tokens
        self._connection.execute(
            "UPDATE batches SET completed = completed + ?, failed = failed + ?, input_tokens = input_tokens + ?, "
            "cached_tokens = cached_tokens + ?, output_tokens = output_tokens + ?, "
            "reasoning_tokens = reasoning_tokens + ? WHERE number = ?",
            (result.ok, not result.ok, tokens.input, tokens.cached, tokens.output, tokens.reasoning, number),
        )


def _batch(row: tuple[Any, ...]) -> Batch:
    number, record, completed, failed, *tokens = row
    return Batch(number, msgspec.json.decode(record, type=Record), completed, failed, Tokens(*tokens))
