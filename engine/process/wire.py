"""The frames on the socket between the HTTP process and the engine process. A frame is MAGIC, the length of a message
in bytes as a little-endian integer of four bytes, and the message in msgpack."""

from __future__ import annotations

import socket
from typing import Any

import msgspec

# Every frame begins with these bytes, so that other bytes, which some code wrote to the socket by mistake, are noticed
# at once.
MAGIC = b"JMB1"
HEADER_BYTES = len(MAGIC) + 4
MAX_FRAME_BYTES = 1 << 30


def pack(message: msgspec.Struct) -> bytes:
    """Returns the frame of a message. Raises ValueError if the message has MAX_FRAME_BYTES or more bytes."""
    body = msgspec.msgpack.encode(message)
    if len(body) >= MAX_FRAME_BYTES:
        raise ValueError(f"a message has {len(body)} bytes; it must have less than {MAX_FRAME_BYTES}")
    return MAGIC + len(body).to_bytes(HEADER_BYTES - len(MAGIC), "little") + body


def body_bytes(header: bytes) -> int:
    """Returns the length in bytes of the message that follows the header of a frame. Raises ValueError if `header` is
    not the beginning of a frame."""
    length = int.from_bytes(header[len(MAGIC) :], "little")
    if not header.startswith(MAGIC) or length >= MAX_FRAME_BYTES:
        raise ValueError(f"the bytes {header!r} are not the header of a frame")
    return length


def receive(connection: socket.socket, kind: Any) -> Any:
    """Waits for the next message on the socket and returns the message, decoded as an object of the type `kind`.
    Returns None at the end of the stream. Raises ValueError for bytes that are not a valid message."""
    header = _exactly(connection, HEADER_BYTES)
    if header is None:
        return None
    body = _exactly(connection, body_bytes(header))
    return None if body is None else msgspec.msgpack.decode(body, type=kind)


def _exactly(connection: socket.socket, n: int) -> bytes | None:
    data = bytearray()
    while len(data) < n:
        if not (piece := connection.recv(min(n - len(data), 1 << 20))):
            return None
        data += piece
    return bytes(data)
