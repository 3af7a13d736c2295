"""The file of a session. It has no names of files, no links and no compression, so it can do little harm.

8 bytes: MAGIC
8 bytes, little-endian: the length of the header
32 bytes: the SHA-256 of the header
the header: `Contents` as JSON
the files of the segments, one after the other, as they are in the disk tier (`engine/disk_tier/format.py`)
"""

from __future__ import annotations

import struct
from hashlib import sha256
from typing import Final

import msgspec

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.middleware import check_json
from jamba_server.server.http.schemas.sessions import LeftOut

MAGIC: Final = b"JAMBASE1"
MAX_SEGMENTS: Final = 16_384
_PREFIX: Final = struct.Struct("<8sQ32s")
PREFIX_BYTES: Final = _PREFIX.size

# The reasons in words, for the header X-Warning.
REASONS: Final[dict[LeftOut, str]] = {
    "not_wanted": "segments is false",
    "no_disk_tier": "this server has no open disk tier (--state-cache-disk-path)",
    "not_cached": "the disk tier has none of the conversation",
    "other_model": "a server with another model, version, processor or configuration has computed them",
    "shared_cache": "API keys share prefixes (--share-prefix-cache), so a file could change the replies to other keys",
    "not_written": "the disk tier could not write them",
}


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """A stored response, and the input items of its request."""

    input: msgspec.Raw
    response: msgspec.Raw


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """The header of a file. `turns` are the responses of the conversation, the oldest first. `segments` are the sizes
    of the segments' files in bytes, and `fingerprint` is that of the model that has computed them."""

    session: str
    created_at: int
    turns: list[Turn]
    fingerprint: str = ""
    segments: list[int] = []
    segments_left_out: LeftOut | None = None


def packed(contents: Contents, *, limit: int) -> bytes:
    """Returns the file without its segments. Raises RequestRejected if the header has more than `limit` bytes."""
    header = msgspec.json.encode(contents)
    if len(header) > limit:
        raise RequestRejected(
            f"The session has {len(header)} bytes; at most {limit} can be exported (--max-body-bytes).", param="name"
        )
    return _PREFIX.pack(MAGIC, len(header), sha256(header).digest()) + header


def header_length(prefix: bytes, *, limit: int) -> int:
    """Returns the length of the header from the first bytes of a file. Raises RequestRejected."""
    magic, length, _ = _PREFIX.unpack(prefix)
    if magic != MAGIC:
        raise bad_file("it is not the file of a session")
    if length > limit:
        raise bad_file(f"its header has {length} bytes, and the limit is {limit} (--max-body-bytes)")
    return length


def unpacked(prefix: bytes, header: bytes) -> Contents:
    """Returns the checked header of a file. Raises RequestRejected."""
    if _PREFIX.unpack(prefix)[2] != sha256(header).digest():
        raise bad_file("its header is not the one that was written")
    try:
        check_json(header, name="header")
    except RequestRejected as error:
        raise bad_file(str(error).rstrip(".")) from None
    try:
        contents = msgspec.json.decode(header, type=Contents)
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_file(f"its header is not valid: {error}") from None
    if len(contents.segments) > MAX_SEGMENTS or any(size <= 0 for size in contents.segments):
        raise bad_file(f"it has {len(contents.segments)} segments, at most {MAX_SEGMENTS}, and none may be empty")
    return contents


def bad_file(why: str) -> RequestRejected:
    return RequestRejected(f"The session cannot be imported: {why}.", param="file", code="invalid_session_file")
