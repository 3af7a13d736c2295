"""`Writer` is the interface of the classes that write an endpoint's replies, as one object or as a stream of events."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel

from jamba_server.server.http.choice import ChoiceDelta
from jamba_server.server.http.generation import Generation
from jamba_server.server.http.schemas.base import Usage
from jamba_server.server.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"

C = TypeVar("C")  # the type of the entries in an event's field `choices`


class Writer(ABC):
    """Writes the reply to one request. Each event is the bytes of one server-sent event with the empty line at its end.

    `sse.answer` runs `generation`. For a single reply it calls only `reply`. For a stream it calls `begin`, then
    `write` for every delta, and then `end`, or `fail` after an error.
    """

    generation: Generation

    @abstractmethod
    def reply(self, choices: list[ChoiceDelta]) -> BaseModel:
        """Returns the whole reply. `choices` has one delta for each choice, with the choice's whole text, ordered by
        index."""

    @abstractmethod
    def begin(self) -> Iterable[bytes]:
        """Returns the events that are sent as soon as the engine has accepted the request."""

    @abstractmethod
    def write(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """Returns the events that carry one delta of one choice."""

    @abstractmethod
    def end(self) -> Iterable[bytes]:
        """Returns the events that follow the last delta of a successful generation."""

    @abstractmethod
    def fail(self, error: bytes) -> Iterable[bytes]:
        """Returns the events that end the stream after an error. `error` is the body of an error reply, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWriter(Writer, Generic[C]):
    """The common part of the writers for chats and completions: every event has `choices` and optionally `usage`.

    With `with_usage`, one more event at the end has the token counts. With `with_usage_so_far`, every event has them.
    """

    generation: Generation
    tokenizer: Tokenizer
    model: str
    created: int
    with_logprobs: bool
    with_usage: bool
    with_usage_so_far: bool

    def begin(self) -> Iterable[bytes]:
        return ()

    def end(self) -> Iterable[bytes]:
        if self.with_usage:
            yield event(self._chunk([], self.generation.usage))
        yield DONE

    def fail(self, error: bytes) -> Iterable[bytes]:
        return b"data: " + error + b"\n\n", DONE

    def _event(self, choice: C) -> bytes:
        chunk = self._chunk([choice], self.generation.usage if self.with_usage_so_far else None)
        return event(chunk, exclude=None if self.with_usage else {"usage"})

    @abstractmethod
    def _chunk(self, choices: list[C], usage: Usage | None) -> BaseModel: ...


def event(payload: BaseModel, *, exclude: set[str] | None = None) -> bytes:
    return b"data: " + payload.model_dump_json(exclude=exclude).encode() + b"\n\n"
