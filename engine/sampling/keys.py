"""The random keys with which tokens are sampled. A key is a hash of the request's seed, the number of the reply
(`choice`) and the token's position, and of nothing else."""

from __future__ import annotations

MASK = 2**64 - 1


def row_key(seed: int, choice: int, position: int) -> int:
    """Returns the signed 64-bit key of the random noise that samples one token. `position` is the number of tokens
    before the sampled one, and `choice` (0 to n-1) is the number of the reply among the n replies to the same prompt.

    Equal arguments give equal keys in every process and on every machine, so a restart, a preemption or other sequences
    in the batch never change which token is sampled.
    """
    key = 0
    for word in (seed, choice, position):
        key = _mix(key ^ (word & MASK))
    return key - 2**64 if key >= 2**63 else key


def _mix(word: int) -> int:
    """Applies one step of SplitMix64 (Steele, Lea & Flood 2014), which is a bijection of 64-bit words."""
    word = (word + 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)
