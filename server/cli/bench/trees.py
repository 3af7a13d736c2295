"""Gives the requests of a trace a conversation: a published trace has arrival times and lengths, but no text.

A row of a trace is one request, and its prompt has the row's length. The model `ChatTrees` decides which earlier
request a row continues. All of that is drawn from a seed, and none of it is in the trace, so results depend on the
model. A report must therefore name the model and its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.random import Generator

from jamba_server.server.cli.bench.sessions import Session, TokenRange, Turn


class Row(NamedTuple):
    """A request of a trace: its arrival in seconds, and its numbers of prompt and reply tokens."""

    seconds: float
    input_tokens: int
    output_tokens: int


@dataclass(slots=True)
class _Chat:
    """A conversation while the rows are read. No turn follows before `ready` seconds."""

    system: tuple[int, ...]
    ready: float = 0.0
    turns: list[Turn] = field(default_factory=list[Turn])


class ChatTrees(msgspec.Struct, frozen=True, kw_only=True):
    """A model of which rows of a trace belong to one conversation.

    With probability `continued`, a row continues a chat. Of the `open_chats` chats that were used last and whose last
    request is at least `think` seconds old, it is the longest one that is shorter than the row's prompt. The rest of
    the prompt is the new message. With probability `rewound`, such a row does not follow the chat's last turn, but
    replaces a random turn, as when a user edits a message or asks for another reply.

    All other rows begin a chat. A chat begins with one of `systems` system prompts; number k is chosen with a
    probability proportional to 1 / k. The lengths of system prompts are drawn from `system_least` to `system_most`
    tokens, uniformly on a logarithmic scale. A chat whose first prompt is not longer than its system prompt has none.
    """

    continued: float = 0.75
    rewound: float = 0.1
    open_chats: int = 400
    think: float = 10.0
    systems: int = 8
    system_least: int = 64
    system_most: int = 1024

    def grow(self, rows: list[Row], rng: Generator, tokens: TokenRange) -> list[Session]:
        """Returns the sessions in the order of their first requests. Arrivals are in seconds after the first row."""
        systems = self._systems(rng, tokens)
        shares = 1 / np.arange(1, self.systems + 1)
        chats: list[_Chat] = []
        recent: list[_Chat] = []  # sorted by the time of the last use
        for row in rows:
            at = row.seconds - rows[0].seconds
            fitting = [c for c in recent if c.ready <= at and c.turns[-1].num_tokens < row.input_tokens]
            if fitting and rng.random() < self.continued:
                chat = max(fitting, key=lambda c: c.turns[-1].num_tokens)
                recent.remove(chat)
                parent = len(chat.turns) - 1
                if rng.random() < self.rewound:
                    parent = chat.turns[int(rng.integers(len(chat.turns)))].parent
            else:
                system = systems[int(rng.choice(self.systems, p=shares / shares.sum()))]
                chats.append(chat := _Chat(system if len(system) < row.input_tokens else ()))
                parent = -1
            history = chat.turns[parent].num_tokens if parent >= 0 else 0
            start = chat.system if parent < 0 else ()
            prompt = start + tokens.draw(rng, row.input_tokens - history - len(start))
            chat.turns.append(Turn(prompt, row.output_tokens, parent, history, len(chat.system), at))
            chat.ready = at + self.think
            recent = [*recent[1 - self.open_chats :], chat] if self.open_chats > 1 else [chat]
        return [Session(tuple(chat.turns), chat.turns[0].arrival) for chat in chats]

    def _systems(self, rng: Generator, tokens: TokenRange) -> list[tuple[int, ...]]:
        """Draws the system prompts."""
        least, most = np.log(self.system_least), np.log(self.system_most)
        return [tokens.draw(rng, round(np.exp(rng.uniform(least, most)))) for _ in range(self.systems)]
