"""SavePolicy: decides after which tokens of a sequence a state is saved, and what each saved state is worth."""

from __future__ import annotations

from collections.abc import Iterator

from jamba_server.engine.cache.reuse import Kind, Reuse
from jamba_server.engine.sequence import Sequence


class SavePolicy:
    """Saves states where a later request will most likely continue.

    The worth of a saved state is the number of tokens that a hit saves, times the share of such states that are hit
    (`Reuse`). Marconi (arXiv 2411.19379, section 4) divides what a hit saves by the size of the cache entry. The
    division is left out here, because all saved states have the same size.
    """

    saves_answers = True  # whether the state at the end of a sequence is saved
    protects_pages = True  # whether pages that a saved state needs are evicted after all others

    def __init__(self, num_states: int) -> None:
        """`num_states` is the number of saved states that the cache has room for."""
        self._reuse = Reuse(4 * num_states)

    def positions(self, seq: Sequence) -> Iterator[tuple[int, Kind]]:
        """Yields the positions of `seq` where a saved state most likely leads to a prefix hit, the most likely position
        first. These positions are the ends of messages, the end of the prefix that other requests share or wait for,
        the end of the prompt, and the position one token before the end of the prompt. A later request with the same
        prompt would continue from the position one token before the end of the prompt."""
        for position in seq.request.save_positions:
            yield position, Kind.MESSAGE
        for position in (seq.branch, *seq.junctions):
            yield position, Kind.BRANCH
        yield seq.num_prompt, Kind.PROMPT
        yield seq.num_prompt - 1, Kind.PROMPT

    def saved(self, key: bytes, position: int, kind: Kind) -> float:
        """Records that a state after `position` tokens is saved under `key`. Returns what the state is worth."""
        return position * self._reuse.share(self._reuse.save(key, kind))

    def hit(self, key: bytes, position: int) -> float | None:
        """Records that a sequence continues from the state after `position` tokens that is saved under `key`. Returns
        what the state is worth from now on, or None if its worth stays."""
        life = self._reuse.hit(key)
        return None if life is None else position * self._reuse.share(life)
