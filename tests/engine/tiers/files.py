"""Segments for tests of the folder, made from numbers."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from random import Random

from jamba_server.engine.cache.keys import chain
from jamba_server.engine.cache.tiers.segment import Entry, Segment
from jamba_server.engine.disk_tier.folder import SegmentFolder
from tests.engine.tiers.shapes import fingerprint_of, layout

BLOCK_SIZE = 4
LAYOUT = layout(BLOCK_SIZE)


def key_after(tokens: list[int], salt: str = "") -> tuple[bytes, bytes]:
    """The key of a prefix, and the key of its full pages."""
    last = sha256(salt.encode()).digest()
    full = len(tokens) // BLOCK_SIZE * BLOCK_SIZE
    for start in range(0, full, BLOCK_SIZE):
        last = chain(last, tokens[start : start + BLOCK_SIZE])
    return (chain(last, tokens[full:]) if full < len(tokens) else last), last


def segment(tokens: list[int], start: int, *, salt: str = "") -> Segment:
    """The segment [start, len(tokens)) of a text. Its contents depend on its tokens only."""
    key, last = key_after(tokens, salt)
    first = start // BLOCK_SIZE * BLOCK_SIZE
    contents = Random(str(tokens))
    entry = Entry(
        key=key,
        parent=key_after(tokens[:start], salt)[0] if start else b"",
        base=key_after(tokens[:first], salt)[1],
        last=last,
        start=start,
        end=len(tokens),
        num_bytes=LAYOUT.num_bytes(start, len(tokens)),
    )
    sizes = {"kv": 8 * BLOCK_SIZE * LAYOUT.num_pages(start, len(tokens)), "ssm": 8}
    tensors = {name: memoryview(bytearray(contents.randbytes(size))) for name, size in sizes.items()}
    return Segment(entry, array("q", tokens[first:]), tensors)


def conversation(seed: int, turns: int) -> Iterator[Segment]:
    random = Random(seed)
    tokens: list[int] = []
    for _ in range(turns):
        start = len(tokens)
        tokens = tokens + [random.randrange(1000) for _ in range(random.randint(1, 40))]
        yield segment(tokens, start)


def open_folder(root: Path, *, max_bytes: int = 1 << 30, model: int = 0) -> SegmentFolder:
    folder = SegmentFolder(root, fingerprint_of(model), LAYOUT, max_bytes)
    folder.open()
    return folder
