"""The class `GrammarQueue` builds the grammars of requests, and lets clients take turns at the processes that check
grammars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import anyio
import anyio.to_thread

from jamba_server.server.http.limits.turns import Turns
from jamba_server.server.text.grammars.builder import GrammarBuilder
from jamba_server.server.text.grammars.compile_check import Allowance, OverAllowance
from jamba_server.server.text.grammars.types import OutputFormat, ReasoningGrammar, ToolGrammar

WAIT_SECONDS = 10.0  # longest time in seconds that a request waits for its turn at one of the processes
# CPU time in seconds that all checks for one request may take in the first process. Most grammars take a few
# milliseconds, and large sets of tools some tens of milliseconds.
QUICK_SECONDS = 0.1


class ReplyGrammar(NamedTuple):
    """The grammar that a reply must follow, as text. The dict `left_out` has, for the names of tool functions that are
    not strict, the JSON pointers of those parts of their schemas that the grammar does not enforce."""

    text: str
    left_out: Mapping[str, Sequence[str]]


class GrammarQueue:
    """Builds grammars in three attempts. The first one needs that all grammars of the request have been checked before,
    and waits for no other request. The second one has QUICK_SECONDS of CPU time. A grammar that takes longer is built
    in the third attempt, in a queue of its own. So hostile grammars, which take a second each, delay only each other.
    """

    def __init__(self, builder: GrammarBuilder, *, seconds: float = WAIT_SECONDS) -> None:
        """A request waits up to `seconds` seconds for its turn."""
        self._builder = builder
        self._quick = Turns(1, seconds=seconds, what="the check of its grammar")
        self._slow = Turns(1, seconds=seconds, what="the check of its large grammar")

    async def build(
        self,
        client: str,
        threads: anyio.CapacityLimiter,
        format: OutputFormat | None,
        tools: ToolGrammar | None,
        reasoning: ReasoningGrammar | None,
        *,
        leading_space: bool,
    ) -> ReplyGrammar:
        """Returns the grammar that a reply must follow. The first attempt runs in a thread that `threads` limits.
        `GrammarBuilder.build` describes the other arguments. Raises RequestRejected, and Overloaded if the turn of
        `client` does not come in time."""

        def attempt(allowance: Allowance) -> ReplyGrammar:
            builder, left_out = self._builder.within(allowance), dict[str, list[str]]()
            text = builder.build(format, tools, reasoning, leading_space=leading_space, left_out=left_out)
            return ReplyGrammar(text, left_out)

        try:
            cached = Allowance(0, final=False)
            return await anyio.to_thread.run_sync(lambda: attempt(cached), limiter=threads)
        except OverAllowance:
            pass
        try:
            return await self._quick.run(client, lambda: attempt(Allowance(QUICK_SECONDS, final=False)))
        except OverAllowance:
            return await self._slow.run(client, lambda: attempt(Allowance()))

    def close(self) -> None:
        """Ends the processes that check grammars."""
        self._builder.close()
