"""The class `ResponseStore` keeps responses for later requests, without blocking the event loop."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import msgspec

from jamba_server.engine.errors import Overloaded, RequestRejected, ResponseNotFound
from jamba_server.server.http.store.database import Database, StoredResponse
from jamba_server.server.http.store.sessions import Sessions

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = dict[str, Any]  # an input or output item of a response, as JSON; it has at least the keys `id` and `type`

FILE_NAME = "responses.sqlite"


class ResponseStore:
    """Keeps responses until there are too many. Then the least recently used responses are deleted.

    Every method takes the name of an owner of API keys, and finds only the responses of this owner. A thread runs the
    methods of the database one after the other. If the database cannot be read, for example because another server has
    locked its file for too long, all methods but `put` raise Overloaded.
    """

    def __init__(self, folder: Path | None, *, max_responses: int, max_bytes: int) -> None:
        """Opens the file responses.sqlite in `folder`; if `folder` is None, the responses are kept in memory.

        If `max_responses` or `max_bytes` is 0, nothing is kept. Raises ConfigError if the file cannot be used.
        """
        self.enabled = bool(max_responses and max_bytes)
        path = None if folder is None or not self.enabled else folder / FILE_NAME
        self._database = Database(path, max_responses=max_responses, max_bytes=max_bytes)
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._one_at_a_time = anyio.CapacityLimiter(1)

    async def close(self) -> None:
        await self._in_thread(self._database.close)

    async def put(self, response: StoredResponse, item_ids: Iterable[str]) -> bool:
        """Stores a response with the ids of its items. Returns whether the response is stored.

        A response is not stored if it alone has more than `max_bytes` bytes or if the disk is full. The log says so.
        """
        if not self.enabled:
            return False
        if response.size > self._max_bytes:
            logger.warning(
                "%s is not stored: it has %d bytes, and --max-stored-bytes is %d",
                response.id, response.size, self._max_bytes,
            )  # fmt: skip
            return False
        try:
            await self._in_thread(lambda: self._database.put(response, item_ids))
        except sqlite3.Error as error:
            logger.error("%s is not stored: %s", response.id, error)
            return False
        return True

    async def put_session(
        self, name: str, owner: str, responses: Sequence[tuple[StoredResponse, Iterable[str]]], now: int
    ) -> bool:
        """Stores a conversation, the oldest response first, each with the ids of its items, and makes a session of it.
        Returns False, and stores nothing, if the owner has a session of this name.

        Raises RequestRejected if the conversation alone is larger than all responses may be.
        """
        size = sum(response.size for response, _ in responses)
        if len(responses) > self._max_responses or size > self._max_bytes:
            raise RequestRejected(
                f"The session has {len(responses)} responses with {size} bytes; at most {self._max_responses} "
                f"(--max-stored-responses) with {self._max_bytes} bytes (--max-stored-bytes) are stored.",
                param="file",
            )

        def work() -> bool:
            if self._database.sessions.get(name, owner) is not None:
                return False
            self._database.put_chain(responses)
            return self._database.sessions.add(name, owner, responses[-1][0].id if responses else None, now)

        return await self._run(work)

    async def turns(self, id_: str | None, owner: str, *, max_bytes: int) -> list[StoredResponse]:
        """Returns a response and all responses that it continues, the oldest first. Raises RequestRejected as
        `conversation` does."""
        return [] if id_ is None else await self._run(lambda: self._turns(id_, owner, max_bytes))

    async def get(self, id_: str, owner: str) -> StoredResponse:
        """Returns a stored response. Raises ResponseNotFound if the owner has no response with this id."""
        if (stored := await self._run(lambda: self._database.get(id_, owner))) is None:
            raise ResponseNotFound(id_)
        return stored

    async def delete(self, id_: str, owner: str) -> None:
        """Deletes a stored response. Raises ResponseNotFound if the owner has no response with this id."""
        if not await self._run(lambda: self._database.delete(id_, owner)):
            raise ResponseNotFound(id_)

    async def chain(self, id_: str | None, owner: str) -> list[str]:
        """Returns the ids of a response and of all responses that it continues, the oldest first. Responses that are
        not stored any more, and those before them, are left out."""
        links = [] if id_ is None else await self._run(lambda: self._database.chain(id_, owner))
        return [link.id for link in links]

    async def lengths(self, ids: Iterable[str | None], owner: str) -> dict[str | None, int]:
        """Returns, for each response, how many stored responses its conversation has up to this response, which counts,
        too. An id of None, which a session without a response has, gives 0."""
        wanted = [id_ for id_ in ids if id_ is not None]
        return {None: 0} | (await self._run(lambda: self._database.lengths(wanted, owner)) if wanted else {})

    async def sessions(self, work: Callable[[Sessions], T]) -> T:
        """Calls `work` with the table of sessions, in the thread of the database, and returns its result."""
        return await self._run(lambda: work(self._database.sessions))

    async def conversation(self, id_: str, owner: str, *, max_bytes: int) -> list[Item]:
        """Returns the items of a response and of all responses that it continues, the oldest first.

        Raises RequestRejected if a response of the conversation is not stored, or if the conversation has more than
        `max_bytes` bytes.
        """
        return await self._run(lambda: self._conversation(id_, owner, max_bytes))

    async def items(self, ids: Sequence[str], owner: str, *, max_bytes: int) -> dict[str, Item]:
        """Returns the input and output items of these ids, by their ids. Items that are not stored are left out.

        Raises RequestRejected if the items have more than `max_bytes` bytes together. An item counts as often as its id
        occurs. The responses that have the items may not have more bytes either, because all of them must be read.
        """
        return await self._run(lambda: self._items(ids, owner, max_bytes))

    def _conversation(self, id_: str, owner: str, max_bytes: int) -> list[Item]:
        turns = self._turns(id_, owner, max_bytes)
        return [item for stored in turns for item in (*input_items(stored), *output_items(stored))]

    def _turns(self, id_: str, owner: str, max_bytes: int) -> list[StoredResponse]:
        links = self._database.chain(id_, owner)
        missing = links[0].previous_id if links else id_
        if missing is not None:
            raise _not_stored(missing)
        if (size := sum(link.size for link in links)) > max_bytes:
            raise RequestRejected(
                f"The conversation up to this response has {size} bytes; at most {max_bytes} are read "
                "(--max-body-bytes).",
                param="previous_response_id",
                code="context_length_exceeded",
            )
        found: list[StoredResponse] = []
        for link in links:
            stored = self._database.get(link.id, owner)
            if stored is None:  # another server that uses the same file has deleted the response meanwhile
                raise _not_stored(link.id)
            found.append(stored)
        return found

    def _items(self, ids: Sequence[str], owner: str, max_bytes: int) -> dict[str, Item]:
        read: dict[str, Item] = {}
        found: dict[str, Item] = {}
        num_read = 0
        for item_id in dict.fromkeys(ids):
            if item_id not in read:
                if (stored := self._database.find_item(item_id, owner)) is None:
                    continue
                if (num_read := num_read + stored.size) > max_bytes:
                    raise _too_large("The responses to which the item references lead have", num_read, max_bytes)
                read |= {item["id"]: item for item in (*input_items(stored), *output_items(stored))}
            found[item_id] = read[item_id]
        sizes = {item_id: len(msgspec.json.encode(item)) for item_id, item in found.items()}
        if (size := sum(sizes.get(item_id, 0) for item_id in ids)) > max_bytes:
            raise _too_large("The referenced items have", size, max_bytes)
        return found

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await self._in_thread(work)
        except sqlite3.Error as error:
            logger.error("the stored responses cannot be used: %s", error)
            raise Overloaded(f"The stored responses cannot be used at present: {error}.") from error

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._one_at_a_time)


def _not_stored(response_id: str) -> RequestRejected:
    return RequestRejected(
        f"The response {response_id[:64]!r} is not stored, so it cannot be continued. It may have been deleted, or "
        "newer responses may have taken its place.",
        param="previous_response_id",
        code="previous_response_not_found",
    )


def _too_large(what: str, size: int, limit: int) -> RequestRejected:
    return RequestRejected(
        f"{what} {size} bytes; at most {limit} are read (--max-body-bytes).",
        param="input",
        code="context_length_exceeded",
    )


def input_items(stored: StoredResponse) -> list[Item]:
    """Returns the items of the request, in their order."""
    return msgspec.json.decode(stored.input, type=list[Item])


def output_items(stored: StoredResponse) -> list[Item]:
    """Returns the items of the reply, in their order."""
    return msgspec.json.decode(stored.response, type=_Output).output


class _Output(msgspec.Struct):
    output: list[Item]
