"""A batch that runs: which of its lines wait, and which are in flight."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from jamba_server.server.http.batches.lines import BadLine, Line, check_line, places
from jamba_server.server.http.batches.order import Order, Pending, beginnings
from jamba_server.server.http.batches.results import error_line
from jamba_server.server.http.batches.table import Record, Result

MAX_LINES = 50_000  # as in OpenAI's API


@dataclass
class Contents:
    """What is in an input file: the number of lines, the lines that can run, and the results of those that cannot.
    `problem` is the code and the text of the reason why the whole file is refused, or None."""

    total: int = 0
    pending: list[Pending] = field(default_factory=list[Pending])
    bad: list[Result] = field(default_factory=list[Result])
    problem: tuple[str, str] | None = None


def read_contents(path: Path, urls: Collection[str], *, max_bytes: int, max_lines: int = MAX_LINES) -> Contents:
    """Checks all lines of an input file. Only one line is in memory at a time. Raises OSError if the file cannot be
    read."""
    found, seen, num_blank = Contents(), set[bytes](), 0
    with path.open("rb") as file:
        for place, text in places(file, max_bytes):
            if not text:
                num_blank += 1
                if num_blank > max_lines:  # reading only blank lines may take minutes, in which other batches wait
                    found.problem = ("too_many_blank_lines", f"The file has more than {max_lines} blank lines.")
                    break
                continue
            found.total += 1
            if found.total > max_lines:
                found.problem = ("too_many_requests", f"The file has more than {max_lines} requests.")
                break
            try:
                line = check_line(text, urls, max_bytes=max_bytes)
                if (key := hashlib.blake2b(line.custom_id.encode(), digest_size=16).digest()) in seen:
                    raise BadLine("duplicate_custom_id", "An earlier line has the same custom_id, too.", line.custom_id)
            except BadLine as bad:
                message = f"Line {place.number + 1}: {bad.message}"
                found.bad.append(Result(line=place.number, ok=False, text=error_line(bad.custom_id, bad.code, message)))
            else:
                seen.add(key)
                body = msgspec.json.decode(line.body)
                found.pending.append(Pending(place.number, place.offset, place.size, beginnings(body)))
    if not found.total and found.problem is None:
        found.problem = ("empty_file", "The file has no requests.")
    return found


class Job:
    """`running` has the task of each line in flight, by the number of the line. `stopping` says that no further line
    begins, and `waits_for_disk` that the last result could not be stored."""

    def __init__(self, number: int, record: Record, path: Path, pending: list[Pending]) -> None:
        self.number, self.record = number, record
        self.order = Order(pending)
        self.running: dict[int, asyncio.Task[None]] = {}
        self.stopping = self.waits_for_disk = False
        self._path = path

    @property
    def is_done(self) -> bool:
        return not self.running and not len(self.order)

    def read(self, line: Pending) -> Line:
        """Reads a line that has been checked before. This blocks."""
        with self._path.open("rb") as file:
            file.seek(line.offset)
            return msgspec.json.decode(file.read(line.size), type=Line)

    async def stop(self) -> None:
        """Ends the lines in flight; they have no results then."""
        self.stopping = True
        tasks = list(self.running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
