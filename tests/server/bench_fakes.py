"""A model server for the bench's tests, and an event loop whose time passes only when nothing else can happen."""

from __future__ import annotations

import asyncio
import json
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

import httpx
from typing_extensions import override

T = TypeVar("T")


class _JumpingSelector(selectors.DefaultSelector):
    """Makes the clock of an event loop jump to its next timer, where the loop would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    @override
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when it has nothing else to do. Times that are sums of binary fractions,
    such as 0.125 s, are exact."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    @override
    def time(self) -> float:
        return self._jumping.now


def run_virtual(main: Callable[[Callable[[], float]], Coroutine[Any, Any, T]]) -> T:
    """Runs `main(now)` on a new virtual clock that begins at 0."""
    loop = VirtualTimeLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(main(loop.time))


class FakeServer:
    """Answers with `max_tokens` tokens: the first after `prefill` seconds, the others every `step` seconds.

    `limit` is the largest number of tokens of a reply, and `cached` is reported for every prompt. `refuse` maps the
    number of a request, from 0, to the HTTP status with which it is refused. `break_after` is the number of tokens
    after which a stream ends without [DONE].
    """

    def __init__(self, *, prefill: float = 0.5, step: float = 0.125) -> None:
        self.prefill = prefill
        self.step = step
        self.limit = 1 << 30
        self.cached: int | None = None
        self.refuse: dict[int, int] = {}
        self.break_after: int | None = None
        self.returns_ids = True
        self.max_model_len = 4096
        self.tokenize_status = 200
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[httpx.Headers] = []
        self.running = 0
        self.most_running = 0

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self.handle), base_url="http://test")

    async def handle(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny", "max_model_len": self.max_model_len}]})
        if request.url.path == "/version":
            return httpx.Response(200, json={"version": "1.2.3"})
        if request.url.path == "/tokenize":
            return httpx.Response(self.tokenize_status, json={"tokens": [17, 900, 25], "count": 3})
        number = len(self.bodies)
        self.headers.append(request.headers)
        self.bodies.append(json.loads(await request.aread()) | {"path": request.url.path})
        if number in self.refuse:
            return httpx.Response(self.refuse[number], json={"error": {"message": "No room.", "code": None}})
        return httpx.Response(200, stream=_Stream(self._reply(self.bodies[-1])))

    async def _reply(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            async for event in self._events(body):
                yield b"data: " + event + b"\n\n"
        finally:
            self.running -= 1

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        chat = "messages" in body
        if chat:
            yield _choice({"delta": {"role": "assistant", "content": ""}})
        with_ids = body.get("return_token_ids") and self.returns_ids
        if with_ids:
            yield _choice({"text": "", "prompt_token_ids": body["prompt"]})
        count = min(body["max_tokens"], self.limit)
        for index in range(count):
            await asyncio.sleep(self.step if index else self.prefill)
            if index == self.break_after:
                return
            ids = {"token_ids": [7000 + index]} if with_ids else {}
            yield _choice({"delta": {"content": f" t{index}"}} if chat else {"text": f" t{index}"} | ids)
        empty: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        yield _choice(empty | {"finish_reason": "length"})
        usage: dict[str, Any] = {"prompt_tokens": prompt_tokens(body), "completion_tokens": count}
        if self.cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": self.cached}
        yield json.dumps({"choices": [], "usage": usage}).encode()
        yield b"[DONE]"


def prompt_tokens(body: dict[str, Any]) -> int:
    """Ids of a prompt; of a chat, the words of all its messages."""
    return len(body["prompt"]) if "prompt" in body else sum(len(m["content"].split()) for m in body["messages"])


def _choice(fields: dict[str, Any]) -> bytes:
    return json.dumps({"choices": [{"index": 0, "finish_reason": None} | fields], "usage": None}).encode()


class _Stream(httpx.AsyncByteStream):
    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks

    @override
    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            yield chunk

    @override
    async def aclose(self) -> None:
        if aclose := getattr(self._chunks, "aclose", None):
            await aclose()
