"""Microbatches: divides the sequences that decode among the steps that are in flight in a pipeline of stages.

Each stage of a pipeline works on another step. A sequence that decodes needs the token of its last step for its next
one, so at any time it is in one step only. The steps should have equally many such sequences, because the slowest one
decides how long all stages take.
"""

from __future__ import annotations

from collections.abc import Iterable

from jamba_server.engine.sequence import Sequence


class Microbatches:
    """Counts the steps in flight, of which there are up to `num_stages`, and chooses the sequences of the next step."""

    def __init__(self, num_stages: int) -> None:
        self._num_stages, self._in_flight = num_stages, 0

    def launch(self, sequences: Iterable[Sequence]) -> None:
        """Records that a step with these sequences was launched."""
        self._in_flight += 1
        for seq in sequences:
            seq.num_in_flight += 1

    def confirm(self, sequences: Iterable[Sequence]) -> None:
        """Records that the results of the oldest step in flight were read. It has these sequences."""
        self._in_flight -= 1
        for seq in sequences:
            seq.num_in_flight -= 1

    def discard(self) -> None:
        """Must be called after a failed step. Only sequences that were in no step may be used afterwards."""
        self._in_flight = 0

    def share(self, decoding: list[Sequence]) -> list[Sequence]:
        """Returns the sequences that the next step takes from the list `decoding`, in the same order.

        Sequences whose next token is not known yet are left out. The step takes at most an even share of all sequences
        in the list for each stage, and at most an even share of the others for each step that can still be launched.
        """
        if self._num_stages == 1:
            return decoding
        ready = [seq for seq in decoding if not seq.num_pending]
        free = max(1, self._num_stages - self._in_flight)
        return ready[: min(-(-len(decoding) // self._num_stages), -(-len(ready) // free))]
