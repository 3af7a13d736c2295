"""The class `Writer` is the interface of the classes that build the replies of an endpoint.

A reply is either one JSON object or a stream of server-sent events.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import BaseModel

from jamba_server.server.http.choice import ChoiceDelta, TokenScore
from jamba_server.server.http.generation import Generation
from jamba_server.server.http.line_separators import on_one_line
from jamba_server.server.http.schemas.base import PromptLogprob, PromptLogprobs, Timings, Usage
from jamba_server.server.text.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"

C = TypeVar("C")  # the class of the items in the list `choices` of an event


class Writer(ABC):
    """Builds the reply to one request. Its methods return each server-sent event as bytes, with the empty line that
    ends the event.

    The function `sse.answer` runs the writer's `generation`. For a reply without `stream`, the function calls `collect`
    and `reply`. For a stream, it calls `begin`, then `write` for every delta, and then `complete` and `end`. After an
    error it calls `fail` instead.
    """

    generation: Generation

    async def collect(self) -> list[ChoiceDelta]:
        """Runs the generation to its end and returns the list that `reply` takes."""
        return await self.generation.collect()

    @abstractmethod
    def reply(self, choices: list[ChoiceDelta]) -> BaseModel:
        """Returns the whole reply as one object. The list `choices` has one delta with the whole text of each choice,
        in the order of the choices' indices."""

    @abstractmethod
    def begin(self) -> Iterable[bytes]:
        """Returns the events that are sent as soon as the engine has accepted the request."""

    @abstractmethod
    def write(self, delta: ChoiceDelta) -> Iterable[bytes]:
        """Returns the events that have the text, log-probabilities and finish reason of `delta`."""

    async def complete(self) -> None:  # noqa: B027 (most writers have nothing to do here)
        """Does what must be done after the last delta of a successful generation and before the events of `end`."""

    @abstractmethod
    def end(self) -> Iterable[bytes]:
        """Returns the events that follow the last delta of a successful generation."""

    @abstractmethod
    def fail(self, error: bytes) -> Iterable[bytes]:
        """Returns the events that end the stream after an error. The argument `error` is the error as a JSON object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWriter(Writer, Generic[C]):
    """The base class of the writers for /v1/chat/completions and /v1/completions. Each event is a JSON object with the
    field `choices`.

    If `with_usage` is set, the stream has one more event at its end, whose field `usage` has the token counts. If
    `with_usage_so_far` is also set, every event has the token counts up to that event. If `with_timings` is set, the
    reply or the last event has the times of the request. If the request asks for an explanation of the prefix cache,
    the reply or the last event has it in the field `jamba_cache`. The option `with_token_ids` adds the token ids, and
    `with_prompt_logprobs` adds the log-probabilities of the prompt.
    """

    generation: Generation
    tokenizer: Tokenizer
    model: str
    created: int
    with_logprobs: bool
    with_usage: bool
    with_usage_so_far: bool
    with_timings: bool = False
    with_token_ids: bool = False
    with_prompt_logprobs: bool = False

    def begin(self) -> Iterable[bytes]:
        return ()

    def end(self) -> Iterable[bytes]:
        cache = self.generation.cache
        if self.with_usage or self.with_timings or cache is not None:
            chunk = self._chunk([], self.generation.usage if self.with_usage else None)
            extras = {"timings": self._timings, "jamba_cache": cache}
            yield event(chunk.model_copy(update=extras), exclude=self._excluded)
        yield DONE

    def fail(self, error: bytes) -> Iterable[bytes]:
        return frame(error), DONE

    def _event(self, choice: C) -> bytes:
        chunk = self._chunk([choice], self.generation.usage if self.with_usage_so_far else None)
        return event(chunk, exclude=self._excluded)

    @property
    def _excluded(self) -> set[str] | None:
        return None if self.with_usage else {"usage"}

    @property
    def _timings(self) -> Timings | None:
        return self.generation.timings if self.with_timings else None

    def _token_ids(self, delta: ChoiceDelta) -> list[int] | None:
        return list(delta.token_ids) if self.with_token_ids else None

    def _prompt_token_ids(self, number: int) -> list[int] | None:
        return self.generation.spec.prompts[number].token_ids if self.with_token_ids else None

    def _prompt_logprobs(self, scores: Iterable[TokenScore]) -> PromptLogprobs | None:
        return [self._prompt_logprob(score) for score in scores] if self.with_prompt_logprobs else None

    def _prompt_logprob(self, score: TokenScore) -> dict[int, PromptLogprob] | None:
        """Returns the log-probabilities at a position of the prompt: those of the most likely tokens and that of the
        token in the prompt."""
        if score.logprob is None:
            return None
        ranked = [(id_, logprob, rank) for rank, (id_, logprob) in enumerate(score.top, start=1)]
        result: dict[int, PromptLogprob] = {}
        for id_, logprob, rank in (*ranked, (score.token_id, score.logprob, None)):
            text = self.tokenizer.token_text(id_)
            result.setdefault(id_, PromptLogprob(logprob=logprob, rank=rank, decoded_token=text))
        return result

    @abstractmethod
    def _chunk(self, choices: list[C], usage: Usage | None) -> BaseModel: ...


def event(payload: BaseModel, *, exclude: set[str] | None = None) -> bytes:
    return frame(payload.model_dump_json(exclude=exclude).encode())


def frame(body: bytes, event_type: str = "") -> bytes:
    """Returns the bytes of a server-sent event whose data is the JSON text `body`."""
    head = f"event: {event_type}\n".encode() if event_type else b""
    return head + b"data: " + on_one_line(body) + b"\n\n"
