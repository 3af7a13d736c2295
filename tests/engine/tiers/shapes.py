"""What the simulator's segments look like: eight bytes for each token, and eight for a state."""

from __future__ import annotations

from hashlib import sha256

from jamba_server.engine.cache.layout import Kept
from jamba_server.engine.cache.tiers.segment import SegmentLayout

BYTES = 8  # of a number


def fingerprint_of(model: int) -> str:
    return sha256(str(model).encode()).hexdigest()


def layout(block_size: int) -> SegmentLayout:
    return SegmentLayout(block_size, {"kv": Kept((block_size, BYTES), "int8")}, {"ssm": Kept((BYTES,), "int8")})
