"""The workload `decisions`: requests to /v1/decisions, each with many questions about one input.

The server's metrics tell how many prompt tokens it computed. If it computed an input again for each question, this
number would be many times that of the tokens sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
import msgspec
from numpy.random import Generator

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.bench.client import MAX_MESSAGE, Context, Failure, Record, Reply, error_message
from jamba_server.server.cli.bench.report import Level
from jamba_server.server.cli.bench.sessions import Session, TokenRange, Turn
from jamba_server.server.cli.bench.workloads import WORDS, Random

QUESTION_WORDS = 8


class DecisionTurn(Turn, frozen=True):
    """A request to /v1/decisions. `prompt` is the input. `max_tokens` is the number of questions, which counts as the
    number of output tokens."""

    questions: tuple[str, ...] = ()


class Decisions(msgspec.Struct, frozen=True, kw_only=True, tag="decisions"):
    """A workload of inputs of random words, each with `questions` questions of a few words."""

    input_len: int = 256
    range_ratio: float = 0.0
    questions: int = 16

    def __post_init__(self) -> None:
        if self.questions < 1:
            raise ConfigError(f"--questions {self.questions} must be at least 1.")
        Random(input_len=self.input_len, range_ratio=self.range_ratio)  # raises ConfigError for invalid values

    def sessions(self, rng: Generator, count: int, tokens: TokenRange) -> list[Session]:
        lengths = Random(input_len=self.input_len, range_ratio=self.range_ratio)
        return [Session((self._turn(rng, lengths.draw_length(rng, self.input_len)),)) for _ in range(count)]

    def _turn(self, rng: Generator, length: int) -> DecisionTurn:
        questions = tuple(f"It says: {_words(rng, QUESTION_WORDS)}." for _ in range(self.questions))
        return DecisionTurn(_words(rng, length), self.questions, questions=questions)


def _words(rng: Generator, count: int) -> str:
    return " ".join(WORDS[word] for word in TokenRange(0, len(WORDS) - 1).draw(rng, count))


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: _Details = msgspec.field(default_factory=_Details)


class _Decision(msgspec.Struct):
    answers: list[msgspec.Raw]
    usage: _Usage


class DecisionClient:
    """Sends decisions to one server. It has the methods of `client.Client`."""

    def __init__(self, http: httpx.AsyncClient, model: str, *, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self._http, self._model = http, model

    async def send(self, turn: Turn, context: Context) -> Record:
        """Sends one request. The reply comes as a whole, so its first token arrives at its end."""
        assert isinstance(turn, DecisionTurn)
        questions = [{"type": "predicate", "instructions": text} for text in turn.questions]
        body = {"model": self._model, "input": turn.prompt, "questions": questions}
        start = self.now()
        try:
            response = await self._http.post("/v1/decisions", json=body)
            end = self.now()
            if response.status_code != 200:
                kind, message = f"http_{response.status_code}", error_message(response)
                return Failure(start=start, end=end, kind=kind, message=message[:MAX_MESSAGE])
            decision = msgspec.json.decode(response.content, type=_Decision)
        except httpx.TimeoutException as error:
            kind, message = "timeout", repr(error)
        except httpx.RequestError as error:
            kind, message = "connection", repr(error)
        except msgspec.DecodeError as error:
            kind, message = "incomplete", f"Not a decision of OpenAI's API: {error}"
        else:
            return Reply(
                start=start,
                arrivals=(end,),
                end=end,
                prompt_tokens=decision.usage.input_tokens,
                output_tokens=len(decision.answers),
                max_tokens=turn.max_tokens,
                cached_tokens=decision.usage.input_tokens_details.cached_tokens,
            )
        return Failure(start=start, end=self.now(), kind=kind, message=message[:MAX_MESSAGE])


async def computed_tokens(http: httpx.AsyncClient) -> int | None:
    """Returns how many prompt tokens the server has computed since its start: those that it looked up in its prefix
    cache and did not find. Returns None if the server does not tell."""
    try:
        response = await http.get("/metrics")
    except httpx.RequestError:
        return None
    found: dict[str, float] = {}
    for line in response.text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith(("jamba_prefix_cache_queries_total", "jamba_prefix_cache_hits_total")):
            found["queries" if "queries" in name else "hits"] = float(value)
    return int(found["queries"] - found["hits"]) if len(found) == 2 else None


def note(level: Level) -> str:
    """Returns a sentence that compares what the server computed with what it was sent."""
    if level.computed_tokens is None or not level.prompt_tokens:
        return f"{level.load}: the server's /metrics does not tell how many prompt tokens were computed"
    return (
        f"{level.load}: {level.output_tokens:,} answers; inputs and questions have {level.prompt_tokens:,} tokens if "
        f"each input counts once, and {level.computed_tokens:,} prompt tokens were computed "
        f"({level.computed_tokens / level.prompt_tokens:.0%})"
    )
