"""SavePolicy: decides after which tokens of a sequence a state is saved, and what each saved state is worth."""

from __future__ import annotations

from enum import IntEnum

from jamba_server.engine.sequence import Sequence


class Kind(IntEnum):
    """The reason why a state is saved at its position."""

    MESSAGE = 0  # a message ends there
    BRANCH = 1  # the sequence differs from there on from another sequence
    PROMPT = 2  # the prompt ends there
    ANSWER = 3  # the sequence itself ends there, or was preempted
    INTERVAL = 4  # a multiple of the distance between regular states


class SavePolicy:
    """Saves states where a later request will most likely continue. A saved state is worth the tokens that would be
    computed again without it."""

    saves_answers = True

    def positions(self, seq: Sequence) -> list[tuple[int, Kind]]:
        """Returns the positions of `seq` where a saved state most likely leads to a prefix hit, the most likely
        position first. These positions are the ends of messages, the end of the prefix that other requests share, the
        end of the prompt, and the position one token before the end of the prompt. A later request with the same prompt
        would continue from the position one token before the end of the prompt."""
        return [
            *((position, Kind.MESSAGE) for position in seq.request.save_positions),
            (seq.branch, Kind.BRANCH),
            (seq.num_prompt, Kind.PROMPT),
            (seq.num_prompt - 1, Kind.PROMPT),
        ]

    def worth(self, tokens: int, kind: Kind) -> float:
        """Returns the cost of losing a saved state of `kind`, without which `tokens` tokens would be computed again.
        Marconi (arXiv 2411.19379, section 4) divides this cost by the size of the cache entry. The division is left out
        here, because all saved states have the same size."""
        return tokens
