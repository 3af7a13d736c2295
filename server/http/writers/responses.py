"""The class `ResponseWriter` builds the replies of /v1/responses."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
from pydantic_core import to_json

from jamba_server.server.http.choice import ChoiceDelta, TokenScore
from jamba_server.server.http.generation import Generation
from jamba_server.server.http.schemas.responses.reply import (
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    OutputItem,
    OutputTokensDetails,
    Response,
    ResponseError,
    ResponseUsage,
    TokenLogprob,
    TopLogprob,
)
from jamba_server.server.http.schemas.responses.tools import FunctionNames
from jamba_server.server.http.writers.response_items import (
    Event,
    GrowingCall,
    GrowingItem,
    GrowingMessage,
    GrowingReasoning,
)
from jamba_server.server.http.writers.writer import Writer, frame
from jamba_server.server.text.parts import Part, Reasoning, Text, ToolCall
from jamba_server.server.text.tokenizer import Tokenizer


class Saved(NamedTuple):
    """Whether a response is stored, and the session whose last response it has become, or None."""

    stored: bool
    session: str | None


Save = Callable[[Response], Awaitable[Saved]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseOptions:
    """Options that affect how a response is written. `caches` says whether the engine keeps prompts in the prefix
    cache."""

    names: FunctionNames
    with_logprobs: bool
    with_encoded_reasoning: bool
    caches: bool


class ResponseWriter(Writer):
    """Turns the deltas of a reply into a response, and into the events of a stream.

    A reply without `stream` is built in the same way, but its events are dropped. The argument `response` is the
    response object before the first token. The function `save` stores the finished response and returns whether that
    succeeded, and the session that the response now ends. If `save` is None, the response is not stored.
    """

    def __init__(
        self,
        generation: Generation,
        tokenizer: Tokenizer,
        response: Response,
        options: ResponseOptions,
        save: Save | None,
    ) -> None:
        self.generation, self.response = generation, response
        self._tokenizer, self._options, self._save = tokenizer, options, save
        self._num_events = 0
        self._output: list[OutputItem] = []  # the output items that are complete
        self._growing: GrowingItem | None = None
        # White space at the beginning of a message, which is held back because a message of only white space is left
        # out.
        self._blank = ""
        self._scores: list[TokenScore] = []  # the log-probabilities that will be sent with the next piece of text

    async def collect(self) -> list[ChoiceDelta]:
        """Runs the generation to its end and makes the finished response. Returns the deltas of the reply."""
        collected: list[ChoiceDelta] = []
        async with self.generation.run() as deltas:
            async for delta in deltas:
                collected.append(delta)
                for _ in self.write(delta):
                    pass
        await self.complete()
        return collected

    def reply(self, choices: list[ChoiceDelta]) -> Response:
        """Returns the finished response, which the method `collect` has built."""
        return self.response

    def begin(self) -> Iterable[bytes]:
        yield self._encode(Event("response.created", {"response": self.response}))
        yield self._encode(Event("response.in_progress", {"response": self.response}))

    def write(self, delta: ChoiceDelta) -> Iterable[bytes]:
        self._scores += delta.scores
        for part in delta.parts:
            yield from map(self._encode, self._push(part))
        if delta.finish_reason:
            yield from map(self._encode, self._finish(delta.finish_reason))

    async def complete(self) -> None:
        if self._save is not None:
            saved = await self._save(self.response)
            self.response = self.response.model_copy(update={"store": saved.stored, "session": saved.session})

    def end(self) -> Iterable[bytes]:
        yield self._encode(Event(f"response.{self.response.status}", {"response": self.response}))

    def fail(self, error: bytes) -> Iterable[bytes]:
        message = msgspec.json.decode(error, type=_ErrorBody).error.message
        failed = {
            "status": "failed",
            "error": ResponseError(message=message),
            "output": (*self._output, *((self._growing.item("incomplete"),) if self._growing else ())),
            "usage": self._usage(),
            "store": False,
        }
        yield self._encode(Event("response.failed", {"response": self.response.model_copy(update=failed)}))

    def _push(self, part: Part) -> Iterator[Event]:
        match part:
            case Text(text):
                yield from self._push_text(text)
            case Reasoning(text):
                if not isinstance(item := self._growing, GrowingReasoning):
                    item = GrowingReasoning(self._next_index, encoded=self._options.with_encoded_reasoning)
                    yield from self._begin(item)
                yield from item.push(text)
                self._scores.clear()
            case ToolCall():
                if not isinstance(item := self._growing, GrowingCall) or item.number != part.index:
                    name = self._options.names.called(part.name)
                    item = GrowingCall(self._next_index, number=part.index, call_id=part.id, name=name)
                    yield from self._begin(item)
                yield from item.push(part.arguments)
                self._scores.clear()

    def _push_text(self, text: str) -> Iterator[Event]:
        if not isinstance(item := self._growing, GrowingMessage):
            text = self._blank + text
            if not text.strip():
                self._blank = text
                return
            item = GrowingMessage(self._next_index)
            yield from self._begin(item)
        yield from item.push(text, self._take_logprobs())

    @property
    def _next_index(self) -> int:
        return len(self._output) + (self._growing is not None)

    def _begin(self, item: GrowingItem) -> Iterator[Event]:
        """Ends the current output item, if there is one, and begins the next item. Yields the events for both."""
        yield from self._end("completed")
        self._growing = item
        yield from item.begin()

    def _end(self, status: ItemStatus) -> Iterator[Event]:
        self._blank = ""
        if (item := self._growing) is not None:
            self._output.append(item.item(status))
            self._growing = None
            yield from item.end(status)

    def _finish(self, reason: str) -> Iterator[Event]:
        """Ends the last output item, builds the finished response, and yields the events for that.

        If the reply has no item, it gets a message. If the last item is a message, it also gets the log-probability of
        the token that ended the reply.
        """
        complete = reason not in ("length", "abort")
        if self._growing is None and not self._output:
            item, text = GrowingMessage(0), self._blank
            yield from self._begin(item)
            yield from item.push(text, self._take_logprobs())
        elif self._scores and isinstance(item := self._growing, GrowingMessage):
            yield from item.push("", self._take_logprobs())
        yield from self._end("completed" if complete else "incomplete")
        details = IncompleteDetails(reason="max_output_tokens" if reason == "length" else None)
        self.response = self.response.model_copy(
            update={
                "status": "completed" if complete else "incomplete",
                "completed_at": int(time.time()) if complete else None,
                "incomplete_details": None if complete else details,
                "output": tuple(self._output),
                "usage": self._usage(),
                "jamba_cache": self.generation.cache,
            }
        )

    def _usage(self) -> ResponseUsage:
        usage = self.generation.usage
        cached = usage.prompt_tokens_details.cached_tokens
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(
                cached_tokens=cached,
                cache_write_tokens=usage.prompt_tokens - cached if self._options.caches else 0,
            ),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(
                reasoning_tokens=usage.completion_tokens_details.reasoning_tokens
            ),
            total_tokens=usage.total_tokens,
        )

    def _take_logprobs(self) -> list[TokenLogprob]:
        scores = self._scores if self._options.with_logprobs else []
        self._scores = []
        return [self._logprob(score) for score in scores]

    def _logprob(self, score: TokenScore) -> TokenLogprob:
        assert score.logprob is not None, "only an echoed prompt has a token without a log-probability"
        top = [self._top_logprob(token_id, logprob) for token_id, logprob in score.top]
        own = self._top_logprob(score.token_id, score.logprob)
        return TokenLogprob(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=top)

    def _top_logprob(self, token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=self._tokenizer.token_text(token_id),
            logprob=logprob,
            bytes=list(self._tokenizer.token_bytes(token_id)),
        )

    def _encode(self, event: Event) -> bytes:
        """Returns the bytes of an event as they are sent. The event gets the next sequence number."""
        number, self._num_events = self._num_events, self._num_events + 1
        body = to_json({"type": event.type, "sequence_number": number, **event.fields})
        return frame(body, event.type)


class _ErrorMessage(msgspec.Struct):
    message: str


class _ErrorBody(msgspec.Struct):
    error: _ErrorMessage
