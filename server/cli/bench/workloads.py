"""Draws a benchmark's sessions from a seed.

Most workloads send token ids to /v1/completions, so the length of a prompt is exact and no tokenizer is needed here.
Only `multi-turn` and `agents` send text, because the history of a chat is text. Their lengths are counted in words; the
report has the server's token counts.
"""

from __future__ import annotations

import csv
import lzma
from collections.abc import Iterator
from itertools import islice
from math import ceil, floor
from typing import Any, Protocol, TextIO

import msgspec
from numpy.random import Generator

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.bench.sessions import Session, TokenRange, Turn
from jamba_server.server.cli.bench.trees import ChatTrees, Row

TEXT = (
    "about after again always animal another answer apple around autumn because before begin better between bread "
    "bridge bring brother candle carry change children city clear close cloud color corner country dance different "
    "early earth evening every family father field finger flower follow forest friend garden glass golden green "
    "happy heart heavy house island journey kitchen language laugh letter light listen little machine market "
    "morning mother mountain music never night number ocean often open other paper people picture place question "
    "quiet river road school second silver simple small snow something song spring station story street summer "
    "table teacher think through together travel under village voice water weather window winter without wonder "
    "world write yellow yesterday young"
)
WORDS = tuple(TEXT.split())
TOOL_WORDS = 40
SHARING = ("none", "chats")
THINK_SECONDS = 10.0  # the least time between two requests of a chat, on the clock of the trace


class Workload(Protocol):
    """Draws the sessions that a benchmark sends.

    The method `sessions` returns `count` sessions, or fewer if a trace has fewer requests. The same state of the random
    generator `rng` gives the same sessions.
    """

    def sessions(self, rng: Generator, count: int, tokens: TokenRange) -> list[Session]: ...


class Random(msgspec.Struct, frozen=True, kw_only=True, tag="random"):
    """A workload of independent prompts of random tokens.

    Each length is drawn uniformly from L * (1 - range_ratio) to L * (1 + range_ratio), as in vLLM's benchmark. L is
    `input_len` or `output_len`.
    """

    input_len: int = 256
    output_len: int = 64
    range_ratio: float = 0.0

    def __post_init__(self) -> None:
        _at_least(self, 1, "input_len", "output_len")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"--range-ratio {self.range_ratio:g} must be at least 0 and less than 1.")

    def sessions(self, rng: Generator, count: int, tokens: TokenRange) -> list[Session]:
        return [Session((self._turn(rng, tokens),)) for _ in range(count)]

    def _turn(self, rng: Generator, tokens: TokenRange, prefix: tuple[int, ...] = ()) -> Turn:
        length = self.draw_length(rng, self.input_len)
        return Turn(prefix + tokens.draw(rng, length), self.draw_length(rng, self.output_len))

    def draw_length(self, rng: Generator, length: int) -> int:
        low = max(1, floor(length * (1 - self.range_ratio)))
        return int(rng.integers(low, ceil(length * (1 + self.range_ratio)) + 1))


class SharedPrefix(Random, frozen=True, kw_only=True, tag="shared-prefix"):
    """A workload of prompts that share prefixes. Prompt number i begins with the prefix number i modulo `num_prefixes`.

    A prefix has `prefix_len` tokens. Each prompt adds `input_len` random tokens of its own.
    """

    prefix_len: int = 512
    num_prefixes: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "prefix_len", "num_prefixes")

    def sessions(self, rng: Generator, count: int, tokens: TokenRange) -> list[Session]:
        prefixes = [tokens.draw(rng, self.prefix_len) for _ in range(self.num_prefixes)]
        return [Session((self._turn(rng, tokens, prefixes[i % len(prefixes)]),)) for i in range(count)]


class MultiTurn(Random, frozen=True, kw_only=True, tag="multi-turn"):
    """A workload of chats. Each chat has `turns` user messages of about `input_len` words each.

    The server's replies become part of the history that the next turn sends.
    """

    turns: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "turns")

    def sessions(self, rng: Generator, count: int, tokens: TokenRange) -> list[Session]:
        return [Session(tuple(self._message(rng, turn - 1) for turn in range(self.turns))) for _ in range(count)]

    def _message(self, rng: Generator, parent: int) -> Turn:
        text = words(rng, self.draw_length(rng, self.input_len))
        return Turn(text, self.draw_length(rng, self.output_len), parent)


class Agents(MultiTurn, frozen=True, kw_only=True, tag="agents"):
    """A workload of agents, each of which calls tools in a loop.

    All agents have the same system prompt of `prefix_len` words and the same `tools` tools, whose descriptions have
    TOOL_WORDS words each. An agent's conversation begins with a task of `input_len` words. In each of its `turns`
    requests, the server's reply stands for a tool call, and a result of `result_len` words follows it. A result is sent
    as a message of the user, because a model with random weights writes no valid tool call that a message of the role
    `tool` could answer.
    """

    prefix_len: int = 512
    tools: int = 8
    result_len: int = 128
    turns: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "prefix_len", "result_len")
        _at_least(self, 0, "tools")

    def sessions(self, rng: Generator, count: int, tokens: TokenRange) -> list[Session]:
        system = words(rng, self.prefix_len)
        tools = tuple(describe_tool(rng, number) for number in range(self.tools))
        return [Session(self._loop(rng), system=system, tools=tools) for _ in range(count)]

    def _loop(self, rng: Generator) -> tuple[Turn, ...]:
        return (self._message(rng, -1), *(self._result(rng, parent) for parent in range(self.turns - 1)))

    def _result(self, rng: Generator, parent: int) -> Turn:
        text = words(rng, self.draw_length(rng, self.result_len))
        return Turn(text, self.draw_length(rng, self.output_len), parent)


class Trace(msgspec.Struct, frozen=True, kw_only=True, tag="trace"):
    """A workload read from a file of recorded requests. The file gives the arrival time, prompt length and reply length
    of each request.

    The file is CSV, or CSV compressed to .xz, with the columns seconds,input_tokens,output_tokens. The first row
    arrives at 0. `time_scale` multiplies the arrival times; 0.5 sends twice as fast. A trace does not contain the text
    of the requests. With `sharing` "none", prompts are random tokens and share no prefixes. With "chats", the model
    `ChatTrees` makes conversations of the rows.
    """

    trace: str
    time_scale: float = 1.0
    sharing: str = "none"

    def __post_init__(self) -> None:
        if not self.time_scale > 0:
            raise ConfigError(f"--time-scale {self.time_scale:g} must be more than 0.")
        if self.sharing not in SHARING:
            raise ConfigError(f"--sharing {self.sharing!r} must be one of: {', '.join(SHARING)}.")

    def sessions(self, rng: Generator, count: int, tokens: TokenRange) -> list[Session]:
        rows = [Row(seconds * self.time_scale, *lengths) for seconds, *lengths in islice(self._rows(), count)]
        if not rows:
            raise ConfigError(f"--trace {self.trace} has no requests.")
        if self.sharing == "chats":
            # A user's time to think shrinks with the times of the trace, so that --time-scale changes no conversation.
            return ChatTrees(think=THINK_SECONDS * self.time_scale).grow(rows, rng, tokens)
        return [
            Session((Turn(tokens.draw(rng, row.input_tokens), row.output_tokens),), row.seconds - rows[0].seconds)
            for row in rows
        ]

    def _rows(self) -> Iterator[tuple[float, int, int]]:
        """Yields a tuple (arrival time in seconds, number of input tokens, number of output tokens) for each row of the
        file. Raises ConfigError for a file that cannot be read."""
        try:
            with _open_text(self.trace) as file:
                reader = csv.reader(file)
                header = ",".join(next(reader, list[str]()))
                if header != "seconds,input_tokens,output_tokens":
                    raise ConfigError(
                        f"--trace {self.trace} must begin with seconds,input_tokens,output_tokens, not {header!r}."
                    )
                previous = 0.0
                for row in reader:
                    yield (parsed := self._parse(row, reader.line_num, previous))
                    previous = parsed[0]
        except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"--trace {self.trace} cannot be read: {error}.") from error

    def _parse(self, row: list[str], line: int, previous: float) -> tuple[float, int, int]:
        try:
            seconds, length, output = row
            parsed = float(seconds), int(length), int(output)
        except ValueError:
            parsed = None
        if parsed is None or not previous <= parsed[0] < float("inf") or parsed[1] < 1 or parsed[2] < 1:
            raise ConfigError(
                f"--trace {self.trace}, line {line}: {','.join(row)!r} must be seconds that do not decrease, from "
                f"{previous:g} on, and two token counts of at least 1."
            )
        return parsed


def leave_out_long(sessions: list[Session], max_model_len: int | None) -> list[Session]:
    """Returns the sessions that fit into the server's context: each prompt together with its reply has at most
    `max_model_len` tokens.

    A prompt that is text is never left out, because its number of tokens is not known.
    """
    if max_model_len is None:
        return sessions

    def fits(turn: Turn) -> bool:
        return isinstance(turn.prompt, str) or turn.num_tokens <= max_model_len

    return [session for session in sessions if all(map(fits, session.turns))]


def words(rng: Generator, count: int) -> str:
    """Returns a text of `count` random words."""
    return " ".join(WORDS[word] for word in TokenRange(0, len(WORDS) - 1).draw(rng, count))


def describe_tool(rng: Generator, number: int) -> dict[str, Any]:
    """Returns a tool of the OpenAI API with a random description and one argument."""
    arguments = {"type": "object", "properties": {"query": {"type": "string"}}, "required": ["query"]}
    function = {"name": f"tool_{number}", "description": words(rng, TOOL_WORDS), "parameters": arguments}
    return {"type": "function", "function": function}


def _open_text(path: str) -> TextIO:
    opener = lzma.open if path.endswith(".xz") else open
    return opener(path, "rt", encoding="utf-8", newline="")


def _at_least(workload: Random, minimum: int, *names: str) -> None:
    for name in names:
        if (value := getattr(workload, name)) < minimum:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least {minimum}.")
