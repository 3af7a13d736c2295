"""Where a sampled token's randomness comes from: a hash of what identifies the token, of nothing else."""

from __future__ import annotations

MASK = 2**64 - 1


def row_key(seed: int, choice: int, position: int) -> int:
    """Signed 64-bit key of the noise at `position` (tokens before the sampled one) of a prompt's `choice` (0..n-1).

    Equal inputs give equal keys in every process and on every machine; restarts, preemption and batch mates cannot
    shift them.
    """
    key = 0
    for word in (seed, choice, position):
        key = _mix(key ^ (word & MASK))
    return key - 2**64 if key >= 2**63 else key


def _mix(word: int) -> int:
    """One step of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit words."""
    word = (word + 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)
