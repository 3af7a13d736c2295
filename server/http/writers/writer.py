"""Writer: how the reply of an endpoint looks, whole and as a stream of events."""

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

C = TypeVar("C")  # an entry of `choices` in an event


class Writer(ABC):
    """Writes the reply to one request, once. An event is the bytes of one server-sent event, its empty line included.

    `sse.answer` runs `generation` and calls either `reply`, or `begin`, `write` for every delta, and `end` or `fail`.
    """

    generation: Generation

    @abstractmethod
    def reply(self, choices: list[ChoiceDelta]) -> BaseModel:
        """The whole reply. `choices` are in order, and each has ended."""

    @abstractmethod
    def begin(self) -> Iterable[bytes]:
        """Events that a client gets as soon as the engine has accepted its request."""

    @abstractmethod
    def write(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """The events of one delta."""

    @abstractmethod
    def end(self) -> Iterable[bytes]:
        """Events after the last delta."""

    @abstractmethod
    def fail(self, error: bytes) -> Iterable[bytes]:
        """Events in place of all that would have come. `error` is the body of an error reply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWriter(Writer, Generic[C]):
    """What OpenAI's two older endpoints share: every event is an object with `choices`, and perhaps with `usage`.

    `with_usage`: one more event at the end counts the tokens. `with_usage_so_far`: every event does.
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
