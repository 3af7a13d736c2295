"""What a benchmark sends: sessions of one or several requests. Each request is called a turn."""

from __future__ import annotations

from typing import Any

import msgspec
from numpy.random import Generator


class Turn(msgspec.Struct, frozen=True):
    """One request of a session. The field `prompt` is what the request adds to its conversation: a list of token ids
    for /v1/completions, or the text of the user's next message for /v1/chat/completions.

    The conversation consists of the turn number `parent` of the same session, its reply, and everything before it. -1
    begins a new conversation. Of a conversation of token ids, `history` is the number of tokens before `prompt`, and
    the first `system` tokens are the system prompt. `arrival` is the time in seconds after the start of the measurement
    at which a trace has this request.
    """

    prompt: tuple[int, ...] | str
    max_tokens: int
    parent: int = -1
    history: int = 0
    system: int = 0
    arrival: float = 0.0

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the conversation after this turn. Only a turn of token ids has such a number."""
        return self.history + len(self.prompt) + self.max_tokens


class Session(msgspec.Struct, frozen=True):
    """A sequence of requests, called turns. Each turn is sent when the reply to the previous turn is complete, and not
    before its `arrival` if the load has the times of a trace.

    `arrival` is the time of the first turn, in seconds after the start of the measurement. `system` is the system
    message of all chats of the session, and `tools` are the tools that each of its requests offers.
    """

    turns: tuple[Turn, ...]
    arrival: float = 0.0
    system: str = ""
    tools: tuple[dict[str, Any], ...] = ()


class TokenRange(msgspec.Struct, frozen=True):
    """The range of the token ids from which prompts are drawn, from `first` to `last`, both included."""

    first: int
    last: int

    def draw(self, rng: Generator, count: int) -> tuple[int, ...]:
        return tuple(rng.integers(self.first, self.last + 1, size=count).tolist())
