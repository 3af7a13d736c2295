"""Sends a benchmark's requests to a server and records when the tokens of each streamed reply arrive.

Times are seconds on the clock that the client is given. A server may put several tokens into one event, and several
events into one packet. Therefore an arrival is the time of an event, and token counts come from the server's `usage`.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from typing import Any

import httpx
import msgspec

from jamba_server.server.cli.bench.sessions import Turn

MAX_MESSAGE = 300  # maximum number of characters that a report quotes from a server's error message
LINE_END = re.compile(rb"\r\n|\n|\r")


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """A complete reply to one request: its text, its numbers of tokens, and the times in seconds at which its events
    arrived. It has token ids only if they were asked for.

    `arrivals` are the times of the events that carry tokens. `end` is the time of the event with the finish reason, or
    of the last event with a token if that comes later.
    """

    start: float
    arrivals: tuple[float, ...]
    end: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    cached_tokens: int | None = None
    text: str = ""
    token_ids: tuple[int, ...] = ()

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds."""
        return self.arrivals[0] - self.start

    @property
    def e2el(self) -> float:
        """End-to-end latency, in seconds."""
        return self.end - self.start

    @property
    def tpot(self) -> float | None:
        """Mean time per output token in seconds, from the first output token to the end of the reply. None for a reply
        of one token."""
        return (self.e2el - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl(self) -> tuple[float, ...]:
        """Inter-token latencies, in seconds: the gaps between consecutive events that carry tokens."""
        return tuple(b - a for a, b in pairwise(self.arrivals))


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A request that received no complete reply.

    `kind` is one of http_<status>, timeout, connection, stream_error, incomplete and cut_off. A request is cut off if
    it is still running when the measurement's time is over.
    """

    start: float
    end: float
    kind: str
    message: str


Record = Reply | Failure


class Message(msgspec.Struct, frozen=True):
    role: str
    content: str


class Context(msgspec.Struct, frozen=True):
    """What comes before a turn: the messages and tools of a chat, or the tokens of a conversation of token ids. If
    `continues` is true, the token ids of the reply are asked for, because a later turn continues this one."""

    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    tokens: tuple[int, ...] = ()
    continues: bool = False


class EventDecoder:
    """Decodes server-sent events (HTML standard, section 9.2.6) from chunks of bytes. One event can begin in one chunk
    and end in a later chunk."""

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[bytes]:
        # CR followed by LF is a single line end, even if CR is the end of one chunk and LF is the start of the next
        # chunk. In that case LF is dropped.
        if self._after_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._after_cr = False
        self._after_cr = self._after_cr or chunk.endswith(b"\r")
        *lines, self._rest = LINE_END.split(self._rest + chunk)
        return [event for line in lines if (event := self._line(line)) is not None]

    def _line(self, line: bytes) -> bytes | None:
        if line:
            field, _, value = line.partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" "))
            return None
        event = b"\n".join(self._data) if self._data else None
        self._data = []
        return event


class _Delta(msgspec.Struct):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None

    @property
    def content(self) -> str:
        return self.text or (self.delta and self.delta.content) or ""

    @property
    def carries_token(self) -> bool:
        """True if the server sent the event because it generated a token, even if the event has no text.

        A server sends an event without text for a token whose text is empty or still held back. The first event (which
        has the role or the ids of the prompt) and the last (which has the finish reason) do not count unless they have
        text.
        """
        if self.prompt_token_ids and not self.token_ids:
            return False
        if self.content or (self.delta and (self.delta.reasoning or self.delta.reasoning_content)):
            return True
        return self.finish_reason is None and not (self.delta and self.delta.role)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: str | int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list[_Choice])
    usage: _Usage | None = None
    error: _Error | None = None


class _Failed(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Client:
    """Sends turns to one server. A turn is one request. `http` is an HTTP client that already has the server's URL and
    the request headers.

    Decoding is greedy unless `temperature` is above 0.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        model: str,
        *,
        temperature: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.now = now
        self._http = http
        self._common: dict[str, Any] = {
            "model": model,
            "temperature": temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    async def send(self, turn: Turn, context: Context) -> Record:
        """Sends one turn and returns the server's reply. If the server or the network fails, a Failure is returned
        instead."""
        body = self._common | {"max_tokens": turn.max_tokens}
        if isinstance(turn.prompt, str):
            path, body["messages"] = "/v1/chat/completions", [*context.messages, Message("user", turn.prompt)]
            if context.tools:
                body["tools"] = context.tools
        else:
            path, body["prompt"] = "/v1/completions", context.tokens + turn.prompt
            if context.continues:
                body["return_token_ids"] = True
        content = msgspec.json.encode(body)
        start = self.now()
        try:
            reply = await self._stream(path, content, start, turn.max_tokens)
            if context.continues and len(reply.token_ids) != reply.output_tokens:
                raise _Failed("no_token_ids", "The server did not return the token ids of a reply that continues.")
            return reply
        except _Failed as error:
            kind, message = error.kind, str(error)
        except httpx.TimeoutException as error:
            kind, message = "timeout", repr(error)
        except httpx.RequestError as error:
            kind, message = "connection", repr(error)
        return Failure(start=start, end=self.now(), kind=kind, message=message[:MAX_MESSAGE])

    async def _stream(self, path: str, content: bytes, start: float, max_tokens: int) -> Reply:
        arrivals: list[float] = []
        text: list[str] = []
        token_ids: list[int] = []
        end: float | None = None
        usage: _Usage | None = None
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
        async with self._http.stream("POST", path, content=content, headers=headers) as response:
            async for arrival, event in self._events(response):
                usage = event.usage or usage
                for choice in event.choices:
                    text.append(choice.content)
                    token_ids += choice.token_ids or ()
                    if choice.carries_token:
                        arrivals.append(arrival)
                    if choice.finish_reason:
                        end = arrival
        if usage is None or end is None or usage.completion_tokens < 1:
            raise _Failed("incomplete", "The stream ended with no usage, no finish_reason or no token.")
        return Reply(
            start=start,
            # If no token of the reply has text (special tokens have none), the arrival of the event with the finish
            # reason is used.
            arrivals=tuple(arrivals) or (end,),
            end=max([end, *arrivals]),
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            max_tokens=max_tokens,
            cached_tokens=usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens,
            text="".join(text),
            token_ids=tuple(token_ids),
        )

    async def _events(self, response: httpx.Response) -> AsyncIterator[tuple[float, _Event]]:
        """Yields a pair (time of arrival, event) for each event of the stream before the event [DONE].

        The body is read to its end after [DONE], because httpx reuses only connections whose body was read completely.
        """
        if response.status_code != 200:
            await response.aread()
            raise _Failed(f"http_{response.status_code}", error_message(response))
        decoder = EventDecoder()
        done = False
        async for chunk in response.aiter_bytes():
            arrival = self.now()
            for data in decoder.feed(chunk):
                if done := done or data == b"[DONE]":
                    break
                try:
                    event = msgspec.json.decode(data, type=_Event)
                except msgspec.DecodeError as error:
                    raise _Failed("stream_error", f"Not an event of the OpenAI API ({error}): {data[:80]!r}") from error
                if event.error is not None:
                    raise _Failed("stream_error", event.error.message)
                yield arrival, event
        if not done:
            raise _Failed("incomplete", "The stream ended without [DONE].")


def error_message(response: httpx.Response) -> str:
    """Returns the error message in the server's reply. If the reply does not have the form of an OpenAI error, the
    beginning of the reply is returned."""
    try:
        event = msgspec.json.decode(response.content, type=_Event)
    except msgspec.DecodeError:
        event = _Event()
    return event.error.message if event.error else response.text[:MAX_MESSAGE]
