"""The keys under which the prefix cache finds pages and states (`engine/cache/manager.py` has a picture)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import sha256


def chain(previous: bytes, tokens: Iterable[int]) -> bytes:
    """Returns the key of the prefix that ends with `tokens`. `previous` is the key of the prefix that ends before
    `tokens`."""
    return sha256(previous + array("q", tokens).tobytes()).digest()
