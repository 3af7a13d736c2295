"""Hands prompts over: has them computed by a prefill server, and puts their segments into this server's disk tier.

A prompt is handed over if the tier lacks at least --prefill-min-tokens of its tokens. The prefill server computes the
prompt up to the last page boundary before its last token, so this server computes at most a page. If anything fails,
this server computes the whole prompt itself, with a line in the log and a count (`counts.Result`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Final

import anyio
import anyio.to_thread

from jamba_server.engine.cache.tiers.segment import Entry
from jamba_server.engine.disk_tier.folder import SegmentFolder
from jamba_server.engine.disk_tier.format import BadSegment
from jamba_server.engine.disk_tier.prompt_segments import PromptKeys, has_prefix, take_file
from jamba_server.engine.process.client import Engine
from jamba_server.engine.replicas.known_prefixes import prefix_keys
from jamba_server.engine.replicas.routing import Router, Work
from jamba_server.engine.types import Request, StoredSegment
from jamba_server.server.config import ServerConfig
from jamba_server.server.http.prefill.counts import HandOverCounts, Result
from jamba_server.server.http.prefill.in_flight import BytesInFlight
from jamba_server.server.http.prefill.peer import HandOverFailed, PrefillServer
from jamba_server.server.http.prefill.tier import TierFolder

logger = logging.getLogger(__name__)

MAX_AT_ONCE: Final = 8  # prompts of one request that are handed over at the same time
THREADS: Final = 2  # the number of threads that look segments up, and of those that check segments


@dataclass(slots=True)
class HandOver:
    """One prompt on its way. `keys` are those of the tokens that a prefill server computes, and `prefixes` those by
    which the server is chosen. `deadline` is in seconds of the event loop's clock. `server` is the one that is asked
    now, or None. `arrived` are the segments that are in this server's folder, of which `num_bytes` have come over HTTP.
    """

    request: Request
    folder: SegmentFolder
    keys: PromptKeys
    prefixes: Sequence[int]
    deadline: float
    server: PrefillServer | None = None
    arrived: list[Entry] = field(default_factory=list[Entry])
    num_bytes: int = 0


class HandOvers:
    """All hand-overs of a decode server."""

    def __init__(self, config: ServerConfig, engine: Engine, tier: TierFolder) -> None:
        self._engine, self._tier = engine, tier
        self._least, self._seconds = config.prefill_min_tokens, config.prefill_timeout
        self.servers = [PrefillServer(url.rstrip("/"), config.prefill_api_key) for url in config.prefill_url]
        self._router = Router(len(self.servers))
        # A segment that is checked is in memory as a whole, so there are few at a time.
        self._lookups, self._checks = anyio.CapacityLimiter(THREADS), anyio.CapacityLimiter(THREADS)
        self.counts, self.in_flight = HandOverCounts(), BytesInFlight(config.prefill_max_bytes)

    async def close(self) -> None:
        for server in self.servers:
            await server.close()

    async def prepare(self, requests: Sequence[Request]) -> None:
        """Hands over the prompts of one HTTP request that are long enough. Returns when the engine can find what has
        come, at the latest after --prefill-timeout. A failure is logged and counted, and raises nothing."""
        deadline = asyncio.get_running_loop().time() + self._seconds
        turns = asyncio.Semaphore(MAX_AT_ONCE)

        async def prepare_one(request: Request) -> None:
            async with turns:
                if (hand_over := await self._begin(request, deadline)) is not None:
                    await self._run(hand_over)

        async with asyncio.TaskGroup() as group:
            for request in requests:
                if not request.index and self._may_be_handed_over(request):
                    group.create_task(prepare_one(request))

    def _may_be_handed_over(self, request: Request) -> bool:
        """Returns whether the engine could use a prefix of the prompt, and may keep it."""
        uses = request.cache.read and request.cache.write and request.params.prompt_logprobs is None
        return request.kind == "generate" and uses and len(request.prompt) > self._least

    async def _begin(self, request: Request, deadline: float) -> HandOver | None:
        """Returns None if the prompt is to be computed here, because little of it is missing in the disk tier."""
        try:
            folder = await self._tier.open()
        except OSError as error:
            logger.warning("the folder of the disk tier cannot be opened: %s", error)
            folder = None
        if folder is None:
            self.counts.add("not_open")
            return None
        size = folder.layout.block_size
        tokens = request.prompt[: (len(request.prompt) - 1) // size * size]
        if len(tokens) < self._least:
            return None

        def look_up() -> HandOver | None:
            keys = PromptKeys(tokens, request.cache_salt, folder.layout)
            if has_prefix(folder, keys, len(tokens) - self._least + 1):
                return None
            return HandOver(request, folder, keys, prefix_keys(tokens, request.cache_salt), deadline)

        return await anyio.to_thread.run_sync(look_up, limiter=self._lookups)

    async def _run(self, hand_over: HandOver) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        result: Result = "abandoned"  # stays so if the client leaves, because this call is then cancelled
        try:
            result = await self._in_time(hand_over)
        finally:
            # The segments that have come before a failure are a prefix that need not be computed, too.
            if hand_over.arrived:
                self._engine.arrived([StoredSegment(*astuple(entry)) for entry in hand_over.arrived])
            seconds, tokens = loop.time() - began, len(hand_over.keys)
            self.counts.add(result, tokens=tokens, num_bytes=hand_over.num_bytes, seconds=seconds)
            logger.info(
                "id=%s hand-over of %d tokens: %s, %d bytes in %.3f s",
                hand_over.request.parent, tokens, result, hand_over.num_bytes, seconds,
            )  # fmt: skip

    async def _in_time(self, hand_over: HandOver) -> Result:
        try:
            async with asyncio.timeout_at(hand_over.deadline):
                return await self._from_any(hand_over)
        except TimeoutError:
            if (server := hand_over.server) is not None:
                server.failed()
                _warn(hand_over, server, f"it has taken longer than {self._seconds:g} s (--prefill-timeout)")
            return "timeout"
        except HandOverFailed as error:
            return error.result

    async def _from_any(self, hand_over: HandOver) -> Result:
        """Asks the prefill servers, one after the other, until one of them hands the prompt over. Raises HandOverFailed
        if none of them can."""
        failure = HandOverFailed("resting", "all prefill servers have failed a short time ago")
        left = {number for number, server in enumerate(self.servers) if not server.rests}
        while left:
            work = [Work(server.prompt_tokens, 0) for server in self.servers]
            number = self._router.route(len(hand_over.keys), hand_over.prefixes, work, left).engine
            left.remove(number)
            server = hand_over.server = self.servers[number]
            try:
                result = await self._from(hand_over, server)
            except HandOverFailed as error:
                _warn(hand_over, server, str(error))
                if not error.is_of_server:
                    raise
                if error.rests:
                    server.failed()
                failure = error
            else:
                server.succeeded()
                self._router.sent(number, hand_over.prefixes)
                return result
        raise failure

    async def _from(self, hand_over: HandOver, server: PrefillServer) -> Result:
        folder, keys = hand_over.folder, hand_over.keys
        seconds = max(hand_over.deadline - asyncio.get_running_loop().time(), 0.001)
        listed = await server.compute(hand_over.request, len(keys), folder.fingerprint, seconds)
        sizes, start = dict[Entry, int](), 0
        for segment in listed:
            if segment.num_bytes > (largest := folder.largest_file(start, segment.end)):
                raise HandOverFailed("damaged", f"a segment has {segment.num_bytes} bytes and not at most {largest}")
            sizes[keys.entry(start, segment.end)] = segment.num_bytes
            start = segment.end
        there = await anyio.to_thread.run_sync(
            lambda: [entry for entry in sizes if folder.path_of(entry.key).exists()], limiter=self._lookups
        )
        hand_over.arrived += there
        missing = {entry: size for entry, size in sizes.items() if entry not in there}
        if (total := sum(missing.values())) > (limit := self.in_flight.limit):
            raise HandOverFailed("too_large", f"it has {total} bytes, and --prefill-max-bytes is {limit}")
        hand_over.server = None  # the server is not to blame for a wait for other hand-overs
        async with self.in_flight.taken(total):
            hand_over.server = server
            for entry, size in missing.items():
                await self._fetch(hand_over, server, entry, size)
        return "received" if missing else "found"

    async def _fetch(self, hand_over: HandOver, server: PrefillServer, entry: Entry, size: int) -> None:
        path = hand_over.folder.unfinished(entry.key)
        try:
            await server.fetch(entry.key, path, size)
            hand_over.num_bytes += size
            await anyio.to_thread.run_sync(take_file, hand_over.folder, path, entry, limiter=self._checks)
            hand_over.arrived.append(entry)
        except BadSegment as error:
            raise HandOverFailed("damaged", f"a segment cannot be used: {error}") from None
        except OSError as error:
            raise HandOverFailed("not_written", f"a segment cannot be written: {error}") from None
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def _warn(hand_over: HandOver, server: PrefillServer, why: str) -> None:
    logger.warning("id=%s %s does not hand the prompt over: %s", hand_over.request.parent, server.url, why)
