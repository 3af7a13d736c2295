"""The frames on the socket between the HTTP process and the engine process. A frame is the length of a message in
bytes, as a little-endian integer of four bytes, followed by the message in msgpack."""

from __future__ import annotations

import socket
from typing import Any

import msgspec

HEADER_BYTES = 4
MAX_FRAME_BYTES = 1 << 30


def pack(message: msgspec.Struct) -> bytes:
    """Returns the frame of a message. Raises ValueError if the message has MAX_FRAME_BYTES or more bytes."""
    body = msgspec.msgpack.encode(message)
    if len(body) >= MAX_FRAME_BYTES:
        raise ValueError(f"a message has {len(body)} bytes; it must have less than {MAX_FRAME_BYTES}")
    return len(body).to_bytes(HEADER_BYTES, "little") + body


def receive(connection: socket.socket, kind: Any) -> Any:
    """Waits for the next message and returns it, decoded as `kind`. Returns None at the end of the stream."""
    header = _exactly(connection, HEADER_BYTES)
    if header is None:
        return None
    body = _exactly(connection, int.from_bytes(header, "little"))
    return None if body is None else msgspec.msgpack.decode(body, type=kind)


def _exactly(connection: socket.socket, n: int) -> bytes | None:
    data = bytearray()
    while len(data) < n:
        if not (piece := connection.recv(min(n - len(data), 1 << 20))):
            return None
        data += piece
    return bytes(data)
