"""The class `MessagesWriter` builds the replies of /v1/messages."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from pydantic_core import from_json

from jamba_server.server.http.choice import ChoiceDelta
from jamba_server.server.http.generation import Generation
from jamba_server.server.http.schemas.messages.reply import (
    BlockDelta,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    Event,
    InputJsonDelta,
    MessageDelta,
    MessageReply,
    MessageStart,
    MessageStop,
    MessageUsage,
    OutputTokensDetails,
    Ping,
    ReplyBlock,
    ReplyText,
    ReplyThinking,
    ReplyToolUse,
    SignatureDelta,
    StopDelta,
    StopReason,
    TextDelta,
    ThinkingDelta,
)
from jamba_server.server.http.writers.writer import Writer, frame
from jamba_server.server.text.parts import Part, Reasoning, Text, ToolCall, join


@dataclass(slots=True, kw_only=True)
class MessagesWriter(Writer):
    """Builds one `message` object for a whole reply, and Anthropic's events for a stream.

    `max_tokens` is the limit that the request asked for. `num_saved` is the number of prompt tokens before the last
    message boundary at which the engine saves its state, or 0 if the request has no `cache_control` mark. If
    `shows_thinking` is false, content blocks with reasoning have an empty text.
    """

    generation: Generation
    model: str
    max_tokens: int
    num_saved: int
    shows_thinking: bool
    _blocks: _BlockEvents = field(init=False)
    _started: bool = field(init=False, default=False)
    _stop: StopDelta | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._blocks = _BlockEvents(shows_thinking=self.shows_thinking)

    def reply(self, choices: list[ChoiceDelta]) -> MessageReply:
        [choice] = choices
        stop = self._stop_of(choice)
        content = [self._block(part) for part in join(choice.parts) if not _is_empty(part)]
        return self._message(content, stop.stop_reason, stop.stop_sequence)

    def begin(self) -> Iterable[bytes]:
        """Yields nothing. The first event, `message_start`, is sent later, because it has the number of cached tokens,
        which is known only when the first token of the reply arrives."""
        return ()

    def write(self, delta: ChoiceDelta) -> Iterable[bytes]:
        yield from self._start()
        for part in delta.parts:
            if not _is_empty(part):
                yield from map(event, self._blocks.add(part))
        if delta.finish_reason:
            self._stop = self._stop_of(delta)

    def end(self) -> Iterable[bytes]:
        assert self._stop is not None, "the last delta of a choice has its finish reason"
        yield from map(event, self._blocks.close())
        yield event(MessageDelta(delta=self._stop, usage=self._usage(), jamba_cache=self.generation.cache))
        yield event(MessageStop())

    def fail(self, error: bytes) -> Iterable[bytes]:
        return (frame(error, "error"),)

    def _start(self) -> Iterator[bytes]:
        if not self._started:
            self._started = True
            yield event(MessageStart(message=self._message([], None, None)))
            yield event(Ping())

    def _message(
        self, content: list[ReplyBlock], stop_reason: StopReason | None, stop_sequence: str | None
    ) -> MessageReply:
        return MessageReply(
            id=self.generation.spec.id,
            model=self.model,
            content=content,
            stop_reason=stop_reason,
            stop_sequence=stop_sequence,
            usage=self._usage(),
            jamba_cache=self.generation.cache if stop_reason is not None else None,
        )

    def _block(self, part: Part) -> ReplyBlock:
        match part:
            case Text(text):
                return ReplyText(text=text)
            case Reasoning(text):
                return ReplyThinking(thinking=text if self.shows_thinking else "", signature=signature(text))
            case ToolCall():
                return ReplyToolUse(id=part.id, name=part.name, input=arguments_of(part.arguments))

    def _stop_of(self, choice: ChoiceDelta) -> StopDelta:
        match choice.finish_reason:
            case "tool_calls":
                return StopDelta(stop_reason="tool_use", stop_sequence=None)
            case "length":
                [prompt] = self.generation.spec.prompts
                is_full = prompt.params.max_tokens < self.max_tokens
                reason = "model_context_window_exceeded" if is_full else "max_tokens"
                return StopDelta(stop_reason=reason, stop_sequence=None)
            case _ if isinstance(choice.stop_reason, str):
                return StopDelta(stop_reason="stop_sequence", stop_sequence=choice.stop_reason)
            case _:
                return StopDelta(stop_reason="end_turn", stop_sequence=None)

    def _usage(self) -> MessageUsage:
        usage = self.generation.usage
        num_read = usage.prompt_tokens_details.cached_tokens
        num_created = max(0, self.num_saved - num_read)
        return MessageUsage(
            input_tokens=usage.prompt_tokens - num_read - num_created,
            cache_creation_input_tokens=num_created,
            cache_read_input_tokens=num_read,
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(thinking_tokens=usage.completion_tokens_details.reasoning_tokens),
        )


class _BlockEvents:
    """Turns the parts of a reply into the events of its content blocks. A block ends before the next block starts, so
    at most one block is open at a time."""

    def __init__(self, *, shows_thinking: bool) -> None:
        self._shows_thinking = shows_thinking
        self._index = -1  # number of the open block, or of the last block if none is open; -1 before the first block
        # The part of the reply with which the open content block began, or None if no block is open.
        self._open: Text | Reasoning | ToolCall | None = None
        self._hash = hashlib.sha256()  # hash of the reasoning in the open block so far

    def add(self, part: Part) -> Iterator[Event]:
        if not self._continues(part):
            yield from self.close()
            yield self._start(part)
        if (delta := self._delta(part)) is not None:
            yield ContentBlockDelta(index=self._index, delta=delta)

    def close(self) -> Iterator[Event]:
        """Yields the events that end the open block, if there is one."""
        if self._open is None:
            return
        if isinstance(self._open, Reasoning):
            delta = SignatureDelta(signature=_base64(self._hash.digest()))
            yield ContentBlockDelta(index=self._index, delta=delta)
        yield ContentBlockStop(index=self._index)
        self._open = None

    def _continues(self, part: Part) -> bool:
        if isinstance(part, ToolCall):
            return isinstance(self._open, ToolCall) and self._open.index == part.index
        return type(part) is type(self._open)

    def _start(self, part: Part) -> Event:
        self._index, self._open = self._index + 1, part
        match part:
            case Text():
                block = ReplyText(text="")
            case Reasoning():
                self._hash = hashlib.sha256()
                block = ReplyThinking(thinking="", signature="")
            case ToolCall():
                block = ReplyToolUse(id=part.id, name=part.name, input={})
        return ContentBlockStart(index=self._index, content_block=block)

    def _delta(self, part: Part) -> BlockDelta | None:
        match part:
            case Text(text):
                return TextDelta(text=text)
            case Reasoning(text):
                self._hash.update(text.encode())
                return ThinkingDelta(thinking=text) if self._shows_thinking else None
            case ToolCall():
                return InputJsonDelta(partial_json=part.arguments)


def signature(reasoning: str) -> str:
    """Returns the signature of a content block with reasoning. Clients treat the signature as opaque and send it back
    in later requests."""
    return _base64(hashlib.sha256(reasoning.encode()).digest())


def arguments_of(text: str) -> dict[str, Any]:
    """Returns the arguments of a tool call from their JSON text. If the reply was cut at its token limit, so that the
    JSON text is incomplete, the values that are complete are returned. Anthropic's client treats an incomplete stream
    in the same way. JSON text that cannot be read, because it is nested too deeply or has a number with thousands of
    digits, is returned as the argument `unreadable`."""
    try:
        return cast("dict[str, Any]", from_json(text or "{}", allow_partial=True))
    except ValueError:
        return {"unreadable": text}


def event(payload: Event) -> bytes:
    return frame(payload.model_dump_json().encode(), payload.type)


def _is_empty(part: Part) -> bool:
    return not isinstance(part, ToolCall) and not part.text


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
