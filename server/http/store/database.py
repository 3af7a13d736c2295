"""The class `Database` keeps responses in SQLite, in a file or in memory. Its methods block, and only one thread may
call them at a time."""

from __future__ import annotations

import logging
import sqlite3
import weakref
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from jamba_server.engine.errors import ConfigError
from jamba_server.server.http.store.sessions import Sessions
from jamba_server.server.http.store.sqlite import open_database

logger = logging.getLogger(__name__)

VERSION = 1  # version of the tables, which the file has as its `user_version`; a file of another version is not opened

# Whenever a response is used, its column `used` gets a number that is larger than all others, so the response with the
# smallest number is the least recently used. `size` is the number of bytes of `input` and `response`, which are JSON.
_SCHEMA = """
CREATE TABLE responses (
    id TEXT PRIMARY KEY,
    owner TEXT NOT NULL,
    previous_id TEXT,
    used INTEGER NOT NULL,
    size INTEGER NOT NULL,
    input BLOB NOT NULL,
    response BLOB NOT NULL
);
CREATE INDEX responses_by_use ON responses (used, size);
CREATE TABLE items (
    id TEXT NOT NULL,
    response_id TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE,
    PRIMARY KEY (id, response_id)
) WITHOUT ROWID;
CREATE INDEX items_by_response ON items (response_id);
"""

# Selects the response with the id ?1 of the owner ?2, and all earlier responses of its conversation. `depth` is 0 for
# the response ?1 itself and grows by 1 with each earlier response. At most ?3 responses are selected, so that a file in
# which responses refer to each other in a circle does no harm.
_CHAIN = """
WITH RECURSIVE chain (id, previous_id, size, depth) AS (
    SELECT id, previous_id, size, 0 FROM responses WHERE id = ?1 AND owner = ?2
    UNION ALL
    SELECT r.id, r.previous_id, r.size, depth + 1 FROM responses AS r JOIN chain ON r.id = chain.previous_id
    WHERE r.owner = ?2 LIMIT ?3
)
SELECT id, previous_id, size FROM chain ORDER BY depth DESC
"""

# Deletes the least recently used responses, so that at most ?1 responses are left and they have at most ?2 bytes
# together.
_EVICT = """
DELETE FROM responses WHERE id IN (
    SELECT id FROM (
        SELECT id, row_number() OVER latest AS number, sum(size) OVER latest AS total
        FROM responses WINDOW latest AS (ORDER BY used DESC)
    ) WHERE number > ?1 OR total > ?2
)
"""

_INSERT = "INSERT INTO responses VALUES (?, ?, ?, (SELECT coalesce(max(used), 0) + 1 FROM responses), ?, ?, ?)"
_MARK_USED = "UPDATE responses SET used = (SELECT coalesce(max(used), 0) + 1 FROM responses) WHERE id = ?"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """A response and the input items of its request, both as JSON.

    `owner` is the name of the API key's owner who made the response. `previous_id` is the id of the previous response
    in the conversation, or None.
    """

    id: str
    owner: str
    previous_id: str | None
    input: bytes
    response: bytes

    @property
    def size(self) -> int:
        return len(self.input) + len(self.response)


@dataclass(frozen=True, slots=True)
class Link:
    """One response of a conversation: its id, the id of the response before it, and its size in bytes."""

    id: str
    previous_id: str | None
    size: int


class Database:
    """Stores responses in SQLite, with a limit on their number and on their bytes. Each method is one transaction."""

    def __init__(self, path: Path | None, *, max_responses: int, max_bytes: int) -> None:
        """Opens or creates the file `path`. If `path` is None, the responses are kept in memory.

        Raises ConfigError if the file cannot be used.
        """
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._connection = open_database(path, _SCHEMA, VERSION)
        # From Python 3.13 on, Python warns of a connection that was not closed.
        weakref.finalize(self, self._connection.close)
        try:
            self._evict()
            self.sessions = Sessions(self._connection, self._max_responses)
        except sqlite3.Error as error:
            self._connection.close()
            raise ConfigError(f"The database {path} cannot be used: {error}.") from error

    def close(self) -> None:
        self._connection.close()

    def put(self, response: StoredResponse, item_ids: Iterable[str]) -> None:
        """Stores a response. If there are then too many responses, deletes the least recently used ones.

        `item_ids` are the ids of the response's input and output items. Raises sqlite3.Error if the response cannot be
        stored, for example because the disk is full.
        """
        self.put_chain([(response, item_ids)])

    def put_chain(self, responses: Sequence[tuple[StoredResponse, Iterable[str]]]) -> None:
        """Stores the responses of a conversation, the oldest first, as `put` does for one. Stores all or none."""
        with self._connection, closing(self._connection.cursor()) as cursor:
            cursor.execute("BEGIN IMMEDIATE")
            for response, item_ids in responses:
                cursor.execute(
                    _INSERT,
                    (
                        response.id,
                        response.owner,
                        response.previous_id,
                        response.size,
                        response.input,
                        response.response,
                    ),
                )
                cursor.executemany(
                    "INSERT OR IGNORE INTO items VALUES (?, ?)", [(item_id, response.id) for item_id in item_ids]
                )
            if responses:
                self._use(responses[-1][0].id, responses[-1][0].owner)
            self._evict()

    def get(self, id_: str, owner: str) -> StoredResponse | None:
        rows = self._connection.execute(
            "SELECT id, owner, previous_id, input, response FROM responses WHERE id = ? AND owner = ?", (id_, owner)
        ).fetchall()
        return _stored(rows[0]) if rows else None

    def chain(self, id_: str, owner: str) -> list[Link]:
        """Returns a response and all earlier responses of its conversation, the oldest first. Marks these responses as
        recently used.

        The result is empty if the response is not stored. If an earlier response of the conversation is missing, the
        result begins after it. If the file cannot be written, for example because the disk is full, the responses are
        not marked.
        """
        try:
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                return self._use(id_, owner)
        except sqlite3.OperationalError as error:
            logger.warning("responses cannot be marked as used: %s", error)
            return self._links(id_, owner)

    def lengths(self, ids: Iterable[str], owner: str) -> dict[str, int]:
        """Returns, for each response, how many responses `chain` would return. Marks nothing as used. The time is
        proportional to the number of the owner's responses, even if many of `ids` continue one long conversation."""
        previous = dict(self._connection.execute("SELECT id, previous_id FROM responses WHERE owner = ?", (owner,)))
        found: dict[str, int] = {}
        for id_ in ids:
            path, at = dict[str, None](), id_
            # The last condition ends the loop if responses refer to each other in a circle.
            while at in previous and at not in found and at not in path:
                path[at] = None
                at = previous[at]
            before = found.get(at, 0)
            found |= {link: before + number for number, link in enumerate(reversed(path), start=1)}
            found.setdefault(id_, 0)
        return found

    def find_item(self, item_id: str, owner: str) -> StoredResponse | None:
        """Returns a response that has an input or output item with this id, or None if there is no such response."""
        rows = self._connection.execute(
            "SELECT r.id, owner, previous_id, input, response FROM responses AS r JOIN items ON response_id = r.id "
            "WHERE items.id = ? AND owner = ? LIMIT 1",
            (item_id, owner),
        ).fetchall()
        return _stored(rows[0]) if rows else None

    def delete(self, id_: str, owner: str) -> bool:
        """Deletes a response. Returns whether the response was stored."""
        return self._connection.execute("DELETE FROM responses WHERE id = ? AND owner = ?", (id_, owner)).rowcount > 0

    def _use(self, id_: str, owner: str) -> list[Link]:
        """Returns a response and all earlier responses of its conversation, and marks them as recently used (in the
        column `used`).

        The oldest response gets the highest number in this column. Otherwise it would be evicted before the later ones,
        which cannot be continued without it.
        """
        links = self._links(id_, owner)
        self._connection.executemany(_MARK_USED, [(link.id,) for link in reversed(links)])
        return links

    def _links(self, id_: str, owner: str) -> list[Link]:
        """Returns a response and all earlier responses of its conversation, the oldest first."""
        limit = self._max_responses + 1
        return [Link(*row) for row in self._connection.execute(_CHAIN, (id_, owner, limit)).fetchall()]

    def _evict(self) -> None:
        [[number, size]] = self._connection.execute("SELECT count(*), coalesce(sum(size), 0) FROM responses").fetchall()
        if number > self._max_responses or size > self._max_bytes:
            self._connection.execute(_EVICT, (self._max_responses, self._max_bytes))


def _stored(row: tuple[str, str, str | None, bytes, bytes]) -> StoredResponse:
    id_, owner, previous_id, input_, response = row
    return StoredResponse(id=id_, owner=owner, previous_id=previous_id, input=input_, response=response)
