"""The routing policies that the simulation compares: how a front end chooses the engine that gets a request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Protocol

from jamba_server.engine.replicas.known_prefixes import KnownPrefixes, prefix_keys
from jamba_server.engine.replicas.routing import DEFAULT, Router, Weights, Work
from jamba_server.engine.types import Request


class Policy(Protocol):
    def choose(self, request: Request, work: list[Work]) -> tuple[int, int]:
        """Returns the number of the engine for a request, and how many prompt tokens it probably has to compute there.
        `work` is that of each engine."""
        ...


class Chance:
    """Any engine, drawn at random from a seed."""

    def __init__(self, num_engines: int) -> None:
        self._random, self._num_engines = Random(0), num_engines

    def choose(self, request: Request, work: list[Work]) -> tuple[int, int]:
        del work
        return self._random.randrange(self._num_engines), len(request.prompt)


class LeastLoaded:
    """The engine with the least to do, counted as this server does, but without any knowledge of prefixes."""

    def __init__(self, num_engines: int) -> None:
        self._router, self._all = Router(num_engines), range(num_engines)

    def choose(self, request: Request, work: list[Work]) -> tuple[int, int]:
        route = self._router.route(len(request.prompt), [], work, self._all)
        return route.engine, route.missing


class LongestPrefix:
    """The engine that knows the longest prefix of the prompt, whatever it has to do; among equals, the one with the
    least to do."""

    def __init__(self, num_engines: int) -> None:
        self._known = [KnownPrefixes() for _ in range(num_engines)]

    def choose(self, request: Request, work: list[Work]) -> tuple[int, int]:
        keys = prefix_keys(request.prompt, request.cache_salt)
        lengths = [known.longest(keys) for known in self._known]
        best = min(range(len(work)), key=lambda i: (-lengths[i], work[i].prompt_tokens + work[i].replies, i))
        self._known[best].add(keys)
        return best, len(request.prompt) - lengths[best]


class Shortest:
    """What this server does: the engine with the smallest weighted sum of the missing prompt tokens and the work."""

    def __init__(self, num_engines: int, weights: Weights = DEFAULT) -> None:
        self._router, self._all = Router(num_engines, weights), range(num_engines)

    def choose(self, request: Request, work: list[Work]) -> tuple[int, int]:
        keys = prefix_keys(request.prompt, request.cache_salt)
        route = self._router.route(len(request.prompt), keys, work, self._all)
        self._router.sent(route.engine, keys)
        return route.engine, route.missing


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: a name, and a function that makes the policy for a number of engines."""

    name: str
    make: Callable[[int], Policy]


ROWS = (
    Row("random", Chance),
    Row("least loaded", LeastLoaded),
    Row("longest prefix", LongestPrefix),
    Row("this server", Shortest),
)
# This server with other weights.
OTHERS = tuple(
    Row(f"weights {weights.missing} and {weights.reply}", partial(Shortest, weights=weights))
    for weights in (Weights(1, 64), Weights(16, 64), Weights(4, 0), Weights(4, 256))
)
