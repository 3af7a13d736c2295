"""The partners of `jamba chat` that are servers: one gets the whole conversation with each request, the other keeps the
conversation in a session of the server."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

import httpx
import msgspec

from jamba_server.engine.errors import JambaError
from jamba_server.server.cli.bench.client import EventDecoder, error_message
from jamba_server.server.cli.local import Sampling
from jamba_server.server.text.parts import Reasoning

# Time limit in seconds for the server's first answer. A server that is still loading its model can delay the answer by
# the time of its option --startup-wait, 30 s by default. The limit must exceed that time.
PROBE_SECONDS = 60.0
NOT_FOUND = 404

Messages = list[dict[str, str]]
Piece = str | Reasoning  # a piece of a reply: text, or the model's thoughts
Schema = dict[str, Any] | None


class ChatError(JambaError):
    """Raised if the server sends an error instead of a reply, or does not answer."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list[_Choice])
    error: _Error | None = None


class RemotePartner:
    """A server with OpenAI's chat API. The requests name no model, so the server's default model replies."""

    def __init__(self, http: httpx.AsyncClient, sampling: Sampling, schema: Schema = None) -> None:
        self._http, self._sampling, self._schema = http, sampling, schema

    async def check(self) -> None:
        """Raises ChatError unless a server answers at the URL and accepts the API key."""
        try:
            response = await self._http.get("/v1/models", timeout=PROBE_SECONDS)
        except httpx.HTTPError as error:
            raise self._no_answer(error) from error
        if response.is_error:
            raise ChatError(f"{response.url} answers {response.status_code}: {error_message(response)}")

    def _no_answer(self, error: httpx.HTTPError) -> ChatError:
        return ChatError(
            f"No server answers at {self._http.base_url} ({error!r}). Start one with `jamba serve`, or name a model."
        )

    async def reply(self, messages: Messages) -> AsyncGenerator[Piece]:
        body: dict[str, Any] = {"messages": messages, "stream": True, **self._sampling.given}
        if self._schema is not None:
            form = {"name": "reply", "schema": self._schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        async with aclosing(self._events("/v1/chat/completions", body)) as events:
            async for data in events:
                for piece in _pieces(data):
                    yield piece

    async def forget(self) -> None:
        """Does nothing, because the server keeps nothing of the conversation."""

    async def _events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[bytes]:
        """Sends a request and yields the data of the events of its reply. Raises ChatError."""
        decoder = EventDecoder()
        try:
            async with self._http.stream("POST", path, json=body) as response:
                if response.is_error:
                    await response.aread()
                    raise ChatError(f"{response.url} answers {response.status_code}: {error_message(response)}")
                async for chunk in response.aiter_bytes():
                    for data in decoder.feed(chunk):
                        yield data
        except httpx.HTTPError as error:
            raise self._no_answer(error) from error


def _pieces(data: bytes) -> Iterator[Piece]:
    """Yields what an event of a stream adds to the reply. Raises ChatError for an error event."""
    if data == b"[DONE]":
        return
    event = msgspec.json.decode(data, type=_Event)
    if event.error is not None:
        raise ChatError(event.error.message)
    for choice in event.choices:
        if choice.delta.reasoning:
            yield Reasoning(choice.delta.reasoning)
        if choice.delta.content:
            yield choice.delta.content


class _Response(msgspec.Struct):
    error: _Error | None = None
    session: str | None = None


class _ResponseEvent(msgspec.Struct):
    type: str = ""
    delta: Any = ""
    response: _Response | None = None
    error: _Error | None = None


class SessionPartner(RemotePartner):
    """A server that keeps the conversation under the name `session`. Only the latest message of the user is sent, and
    the system message with it."""

    def __init__(self, http: httpx.AsyncClient, sampling: Sampling, schema: Schema, session: str) -> None:
        super().__init__(http, sampling, schema)
        self._session = session

    async def reply(self, messages: Messages) -> AsyncGenerator[Piece]:
        sampling = self._sampling.given
        body: dict[str, Any] = {
            "input": messages[-1]["content"],
            "session": self._session,
            "stream": True,
            "max_output_tokens": sampling.pop("max_tokens"),
            **sampling,
        }
        if messages[0]["role"] == "system":
            body["instructions"] = messages[0]["content"]
        if self._schema is not None:
            form = {"type": "json_schema", "name": "reply", "schema": self._schema, "strict": True}
            body["text"] = {"format": form}
        async with aclosing(self._events("/v1/responses", body)) as events:
            async for data in events:
                if (piece := self._piece(data)) is not None:
                    yield piece

    def _piece(self, data: bytes) -> Piece | None:
        """Returns what an event of a response adds to the reply. Raises ChatError for an error event, and if the server
        has not kept the response in the session."""
        event = msgspec.json.decode(data, type=_ResponseEvent)
        error = event.error or (event.response and event.response.error)
        if error is not None:
            raise ChatError(error.message)
        if event.type == "response.output_text.delta":
            return event.delta
        if event.type == "response.reasoning_text.delta":
            return Reasoning(event.delta)
        if event.type in ("response.completed", "response.incomplete"):
            kept = event.response.session if event.response else None
            if kept != self._session:
                raise ChatError(
                    f"The server has not kept this reply in the session {self._session}: it has no sessions, or "
                    "another request has continued the session at the same time."
                )
        return None

    async def forget(self) -> None:
        """Deletes the session, so that the next message begins a new conversation. Raises ChatError."""
        try:
            response = await self._http.delete(f"/v1/sessions/{self._session}", timeout=PROBE_SECONDS)
        except httpx.HTTPError as error:
            raise self._no_answer(error) from error
        if response.is_error and response.status_code != NOT_FOUND:
            raise ChatError(f"{response.url} answers {response.status_code}: {error_message(response)}")
