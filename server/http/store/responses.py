"""The class `ResponseStore` keeps responses for later requests, without blocking the event loop."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import msgspec

from jamba_server.engine.errors import RequestRejected, ResponseNotFound
from jamba_server.server.http.store.database import Database, StoredResponse

logger = logging.getLogger(__name__)

T = TypeVar("T")
Item = dict[str, Any]  # an input or output item of a response, as JSON; it has at least the keys `id` and `type`

FILE_NAME = "responses.sqlite"


class ResponseStore:
    """Keeps responses until there are too many. Then the least recently used responses are deleted.

    Every method takes the name of an owner of API keys, and finds only the responses of this owner. A thread runs the
    methods of the database one after the other.
    """

    def __init__(self, folder: Path | None, *, max_responses: int, max_bytes: int) -> None:
        """Opens the file responses.sqlite in `folder`; if `folder` is None, the responses are kept in memory.

        If `max_responses` or `max_bytes` is 0, nothing is kept. Raises ConfigError if the file cannot be used.
        """
        self.enabled = bool(max_responses and max_bytes)
        path = None if folder is None or not self.enabled else folder / FILE_NAME
        self._database = Database(path, max_responses=max_responses, max_bytes=max_bytes)
        self._max_bytes = max_bytes
        self._one_at_a_time = anyio.CapacityLimiter(1)

    async def close(self) -> None:
        await self._run(self._database.close)

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
            await self._run(lambda: self._database.put(response, item_ids))
        except sqlite3.Error as error:
            logger.error("%s is not stored: %s", response.id, error)
            return False
        return True

    async def get(self, id_: str, owner: str) -> StoredResponse:
        """Returns a stored response. Raises ResponseNotFound if the owner has no response with this id."""
        if (stored := await self._run(lambda: self._database.get(id_, owner))) is None:
            raise ResponseNotFound(id_)
        return stored

    async def delete(self, id_: str, owner: str) -> None:
        """Deletes a stored response. Raises ResponseNotFound if the owner has no response with this id."""
        if not await self._run(lambda: self._database.delete(id_, owner)):
            raise ResponseNotFound(id_)

    async def conversation(self, id_: str, owner: str, *, max_bytes: int) -> list[Item]:
        """Returns the items of a response and of all responses that it continues, the oldest first.

        Raises RequestRejected if a response of the conversation is not stored, or if the conversation has more than
        `max_bytes` bytes.
        """
        return await self._run(lambda: self._conversation(id_, owner, max_bytes))

    async def item(self, item_id: str, owner: str) -> Item | None:
        """Returns the input or output item of this id, or None."""
        return await self._run(lambda: self._item(item_id, owner))

    def _conversation(self, id_: str, owner: str, max_bytes: int) -> list[Item]:
        links = self._database.chain(id_, owner)
        missing = links[0].previous_id if links else id_
        if missing is not None:
            raise RequestRejected(
                f"The response {missing[:64]!r} is not stored, so it cannot be continued. It may have been deleted, or "
                "newer responses may have taken its place.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        if (size := sum(link.size for link in links)) > max_bytes:
            raise RequestRejected(
                f"The conversation up to this response has {size} bytes; at most {max_bytes} are read "
                "(--max-body-bytes).",
                param="previous_response_id",
                code="context_length_exceeded",
            )
        items: list[Item] = []
        for link in links:
            stored = self._database.get(link.id, owner)
            assert stored is not None, "no other thread deletes responses"
            items += input_items(stored)
            items += output_items(stored)
        return items

    def _item(self, item_id: str, owner: str) -> Item | None:
        stored = self._database.find_item(item_id, owner)
        if stored is None:
            return None
        return next(item for item in (*input_items(stored), *output_items(stored)) if item["id"] == item_id)

    async def _run(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._one_at_a_time)


def input_items(stored: StoredResponse) -> list[Item]:
    """Returns the items of the request, in their order."""
    return msgspec.json.decode(stored.input, type=list[Item])


def output_items(stored: StoredResponse) -> list[Item]:
    """Returns the items of the reply, in their order."""
    return msgspec.json.decode(stored.response, type=_Output).output


class _Output(msgspec.Struct):
    output: list[Item]
