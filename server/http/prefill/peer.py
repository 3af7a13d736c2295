"""A prefill server, as a decode server sees it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import anyio.to_thread
import httpx
import msgspec
from pydantic import ValidationError

from jamba_server.engine.disk_tier.folder import private_file
from jamba_server.engine.types import Request
from jamba_server.server.http.deadlines import HEADER
from jamba_server.server.http.prefill.counts import Result
from jamba_server.server.http.schemas.prefill import PrefillReply, SegmentSize

PATH: Final = "/v1/prefill"
CONNECT_SECONDS: Final = 2.0
IDLE_SECONDS: Final = 30.0  # less than the server's --keep-alive-timeout, so that no request meets a closed connection
CHUNK_BYTES: Final = 1 << 20
MAX_REPLY_BYTES: Final = 1 << 22
# After a failure, a server gets no request for this long. The time doubles with each further failure in a row.
FIRST_REST: Final = 1.0
LONGEST_REST: Final = 60.0
_MAX_MESSAGE: Final = 300  # characters that the log shows of another server's error message
# A reply with one of these statuses is caused by the request, so another request may succeed at the same server.
_OF_REQUEST: Final = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


class HandOverFailed(Exception):
    """A prompt could not be handed over. `rests` says whether the prefill server gets no requests for some time."""

    def __init__(self, result: Result, why: str, *, rests: bool = True) -> None:
        super().__init__(why)
        self.result: Result = result
        self.rests = rests

    @property
    def is_of_server(self) -> bool:
        """Returns whether another prefill server could hand the prompt over."""
        return self.result not in ("too_large", "not_written")


class PrefillServer:
    """One prefill server. `prompt_tokens` are those of the prompts that it computes for this server now."""

    def __init__(
        self,
        url: str,
        api_key: str | None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.url = url
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._http = httpx.AsyncClient(
            base_url=url,
            transport=transport or _transport(url),
            headers=headers,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),  # the caller limits the time of the whole hand-over
            trust_env=False,
        )
        self.prompt_tokens = 0
        self._clock, self._num_failures, self._rests_until = clock, 0, 0.0

    async def close(self) -> None:
        await self._http.aclose()

    @property
    def rests(self) -> bool:
        """Returns whether the server gets no requests, because it has failed a short time ago."""
        return self._clock() < self._rests_until

    def failed(self) -> None:
        """Lets the server rest. Requests that fail together, because they were sent before it rested, count once."""
        if self.rests:
            return
        self._rests_until = self._clock() + min(FIRST_REST * 2**self._num_failures, LONGEST_REST)
        self._num_failures = min(self._num_failures + 1, 30)

    def succeeded(self) -> None:
        self._num_failures, self._rests_until = 0, 0.0

    async def compute(self, request: Request, num_tokens: int, fingerprint: str, seconds: float) -> list[SegmentSize]:
        """Has the first `num_tokens` tokens of a request's prompt computed, and returns their segments in the order of
        the text. The server gives up after `seconds` seconds. If the caller is cancelled, the connection is closed, and
        the server aborts the computation. Raises HandOverFailed."""
        body = {
            "prompt": request.prompt[:num_tokens],
            "fingerprint": fingerprint,
            "cache_salt": request.cache_salt,
            "priority": request.priority,
            "save_positions": [position for position in request.save_positions if position < num_tokens],
        }
        headers = {"Content-Type": "application/json", HEADER: f"{seconds:.3f}", "X-Request-Id": request.parent}
        self.prompt_tokens += num_tokens
        try:
            async with self._reply("POST", PATH, content=msgspec.json.encode(body), headers=headers) as reply:
                found = PrefillReply.model_validate_json(await _whole(reply))
        except ValidationError:
            raise HandOverFailed("damaged", "its list of segments is not valid") from None
        finally:
            self.prompt_tokens -= num_tokens
        ends = [0, *(segment.end for segment in found.segments)]
        if ends != sorted(set(ends)) or ends[-1] != num_tokens:
            raise HandOverFailed("damaged", f"its segments end at {ends[1:]}, and the prompt at {num_tokens}")
        return found.segments

    async def fetch(self, key: bytes, path: Path, size: int) -> None:
        """Writes the file of a segment, which has `size` bytes, to the new file `path`. Raises HandOverFailed, and
        OSError if the file cannot be written."""
        written = 0
        async with self._reply("GET", f"{PATH}/segments/{key.hex()}") as reply:
            file = await anyio.to_thread.run_sync(private_file, path)
            with file:
                async for chunk in reply.aiter_bytes(CHUNK_BYTES):
                    written += len(chunk)
                    if written > size:
                        break
                    await anyio.to_thread.run_sync(file.write, chunk)
        if written != size:
            raise HandOverFailed("damaged", f"a segment of {size} bytes came with {written} bytes or more")

    @asynccontextmanager
    async def _reply(self, method: str, path: str, **arguments: Any) -> AsyncGenerator[httpx.Response]:
        """Yields a reply with status 200, whose body has not been read. Raises HandOverFailed for all others, and for
        errors of the connection, also inside the block."""
        try:
            async with self._http.stream(method, path, **arguments) as reply:
                if reply.status_code != HTTPStatus.OK:
                    status, message = reply.status_code, _message(await _whole(reply))
                    result: Result = "other_model" if status == HTTPStatus.CONFLICT else "refused"
                    raise HandOverFailed(result, f"status {status}: {message}", rests=status not in _OF_REQUEST)
                yield reply
        except httpx.HTTPError as error:
            raise HandOverFailed("unreachable", str(error) or type(error).__name__) from None


def _transport(url: str) -> httpx.AsyncBaseTransport:
    """Returns connections that use no proxy of the environment, because a transport is given to httpx."""
    limits = httpx.Limits(keepalive_expiry=IDLE_SECONDS)
    return httpx.AsyncHTTPTransport(verify=url.startswith("https:"), limits=limits)


async def _whole(reply: httpx.Response) -> bytes:
    body = bytearray()
    async for chunk in reply.aiter_bytes():
        body += chunk
        if len(body) > MAX_REPLY_BYTES:
            raise HandOverFailed("damaged", f"its reply has more than {MAX_REPLY_BYTES} bytes")
    return bytes(body)


def _message(body: bytes) -> str:
    """Returns the message of an error reply, or the beginning of its text."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])[:_MAX_MESSAGE]
    except (msgspec.DecodeError, KeyError, TypeError):
        return repr(body[:_MAX_MESSAGE])
