"""Chooses the engine that gets a request."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jamba_server.engine.replicas.known_prefixes import KnownPrefixes

# A prompt token that must be computed because the engine has not cached it counts as this number of tokens that are
# computed before. It delays the request itself, and all later ones: it takes time of the engine, and room in its cache.
# A reply that is being computed counts as TOKENS_PER_REPLY such tokens. Both numbers were chosen by simulations on
# traces; `benchmarks/results/routing.md` compares them with others.
MISSING_WEIGHT = 4
TOKENS_PER_REPLY = 64


class Weights(NamedTuple):
    """The weights of a prompt token that is missing in the cache, and of a reply that is being computed, in prompt
    tokens that an engine has yet to compute for others."""

    missing: int = MISSING_WEIGHT
    reply: int = TOKENS_PER_REPLY


DEFAULT = Weights()

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

    A request goes to the engine with the smallest sum of the prompt tokens that are missing there, the prompt tokens
    that it has yet to compute for others, and its replies, with the `weights` of each. So a request follows its prefix
    unless that engine has so much more to do that computing the prefix again elsewhere is worth it. Between equal
    engines the longer prefix decides, then the smaller number of replies, then the number of the engine.
    """

    def __init__(self, num_engines: int, weights: Weights = DEFAULT) -> None:
        self._weights = weights
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
            total = self._weights.missing * missing[engine] + todo.prompt_tokens + self._weights.reply * todo.replies
            return total, missing[engine], todo.replies, engine

        best = min(ready, key=cost)
        if len(ready) == 1:
            return Route(best, "only", missing[best])
        others = min(missing[engine] for engine in ready if engine != best)
        return Route(best, "prefix" if missing[best] < others else "load", missing[best])

    def sent(self, engine: int, keys: Sequence[int]) -> None:
        self._known[engine].add(keys)
