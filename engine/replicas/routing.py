"""Chooses the engine that gets a request."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from jamba_server.engine.replicas.known_prefixes import KnownPrefixes

# A reply that is being computed counts as much work as this number of prompt tokens: it delays a new request, but it is
# in no hurry. The number decides how many more replies than another engine one may have before a request leaves the
# engine that knows its prefix. `benchmarks/results/routing.md` compares it with others.
TOKENS_PER_REPLY = 64

RouteReason = Literal["prefix", "load", "only"]
# Why an engine was chosen: it knows the longest prefix of the prompt, it has the least to do, or no other is ready.
ROUTE_REASONS: tuple[RouteReason, ...] = ("prefix", "load", "only")


@dataclass(frozen=True, slots=True)
class Work:
    """What an engine has to do: the prompt tokens that it must still compute before it can begin another prompt, and
    the replies that are being computed."""

    prompt_tokens: int
    replies: int


@dataclass(frozen=True, slots=True)
class Route:
    """The number of the chosen engine, the reason, and the number of prompt tokens that it probably has to compute."""

    engine: int
    reason: RouteReason
    missing: int


class Router:
    """Remembers which engine has computed which prefix.

    A request goes to the engine that can probably begin its reply first: the one with the smallest sum of the prompt
    tokens that are missing there, the work that it has already, and TOKENS_PER_REPLY for each reply. So a request
    follows its prefix unless that engine has so much more to do that computing the prefix again elsewhere is quicker.
    Between equal engines the longer prefix decides, then the smaller number of replies, then the number of the engine.
    """

    def __init__(self, num_engines: int) -> None:
        self._known = [KnownPrefixes() for _ in range(num_engines)]

    def forget(self, engine: int) -> None:
        """Forgets the prefixes of an engine whose process was restarted with an empty cache."""
        self._known[engine].clear()

    def route(self, length: int, keys: Sequence[int], work: Sequence[Work], ready: Collection[int]) -> Route:
        """Returns the engine for a prompt of `length` tokens with these prefix keys, one of the engines `ready`. `work`
        is that of each engine. The caller calls `sent` if the request is sent."""
        missing = {engine: length - self._known[engine].longest(keys) for engine in ready}

        def cost(engine: int) -> tuple[int, int, int, int]:
            todo = work[engine]
            total = missing[engine] + todo.prompt_tokens + TOKENS_PER_REPLY * todo.replies
            return total, missing[engine], todo.replies, engine

        best = min(ready, key=cost)
        if len(ready) == 1:
            return Route(best, "only", missing[best])
        others = min(missing[engine] for engine in ready if engine != best)
        return Route(best, "prefix" if missing[best] < others else "load", missing[best])

    def sent(self, engine: int, keys: Sequence[int]) -> None:
        self._known[engine].add(keys)
