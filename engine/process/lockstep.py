"""Lets several ranks run the same steps.

Scheduling depends only on what a step takes from the inbox. Rank 0 has an `Inbox` that requests reach as usual. It
sends every request to the other ranks at once, so that they compile its grammar, too. Before each step it tells them
what the step takes, and they run the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from jamba_server.engine.core import EngineCore, Inbox, Submitted
from jamba_server.engine.grammar.compiler import GrammarCompiler
from jamba_server.engine.process.ranks import Ranks, StepInputs, checksum
from jamba_server.engine.types import Request, StepResult, Submit, TokenUpdate


class _Taken(NamedTuple):
    submitted: list[Submitted]
    failed: list[TokenUpdate]
    aborted: list[str]
    ended_pins: list[str]


_NOTHING = _Taken([], [], [], [])


class LeadingInbox(Inbox):
    """The inbox of rank 0. `send` sends a message to all other ranks. It may be called by several threads."""

    def __init__(self, compiler: GrammarCompiler | None, send: Callable[[Submit | StepInputs], None]) -> None:
        super().__init__(compiler)
        self._send, self._taken = send, _NOTHING
        self._dropped: list[str] = []
        self.results = 0  # the checksum of the results of the last step

    def submit(self, requests: list[Request]) -> None:
        # The other ranks get a request before this rank's next step can take it.
        self._send(Submit(requests))
        super().submit(requests)

    def _drop(self, request_id: str) -> None:
        self._dropped.append(request_id)

    def begin_step(self) -> None:
        with self._changed:
            taken = _Taken(super().submitted(), super().failed(), super().aborted(), super().ended_pins())
            dropped, self._dropped = self._dropped, []
        self._taken = taken
        self._send(
            StepInputs(
                submitted=[new.request.id for new in taken.submitted],
                dropped=dropped,
                failed=[update.request_id for update in taken.failed],
                aborted=taken.aborted,
                ended_pins=taken.ended_pins,
                results=self.results,
            )
        )

    def submitted(self) -> list[Submitted]:
        return self._taken.submitted

    def failed(self) -> list[TokenUpdate]:
        return self._taken.failed

    def aborted(self) -> list[str]:
        return self._taken.aborted

    def ended_pins(self) -> list[str]:
        return self._taken.ended_pins


def lead(core: EngineCore, ranks: Ranks) -> Callable[[], StepResult]:
    """Makes `core` the engine of rank 0, and returns a function that runs a step of all ranks. If a step fails because
    another rank has died, the function does not return."""
    core.inbox = inbox = LeadingInbox(core.inbox.compiler, ranks.send)

    def step() -> StepResult:
        try:
            result = core.step()
        except Exception:
            ranks.wait_for_news()
            raise
        inbox.results = checksum(result)
        return result

    return step


class FollowingInbox(Inbox):
    """The inbox of another rank: it holds requests until rank 0 says that a step takes them."""

    def __init__(self, compiler: GrammarCompiler | None) -> None:
        super().__init__(compiler)
        self._taken = _NOTHING

    def follow(self, inputs: StepInputs) -> None:
        """Prepares the next step. It waits until all grammars that the step needs are compiled. Raises RuntimeError if
        one of them cannot be compiled, although rank 0 has compiled it."""
        with self._changed:
            for request_id in (*inputs.dropped, *inputs.failed):
                self._compiling.pop(request_id, None)
                self._submitted.pop(request_id, None)
            self._changed.wait_for(lambda: not self._compiling.keys() & set(inputs.submitted))
            failures = {update.request_id: update.error for update in self._failed}
            self._failed = []
            for request_id in inputs.submitted:
                if request_id not in self._submitted:
                    raise RuntimeError(f"this rank cannot compile a grammar as rank 0 did: {failures.get(request_id)}")
            taken = [self._submitted.pop(request_id) for request_id in inputs.submitted]
        self._taken = _Taken(taken, [], inputs.aborted, inputs.ended_pins)

    def submitted(self) -> list[Submitted]:
        return self._taken.submitted

    def failed(self) -> list[TokenUpdate]:
        return []

    def aborted(self) -> list[str]:
        return self._taken.aborted

    def ended_pins(self) -> list[str]:
        return self._taken.ended_pins

    def pinned(self, pins: Iterable[tuple[str, float]]) -> None:
        """Does nothing: rank 0 measures the time of pins."""
