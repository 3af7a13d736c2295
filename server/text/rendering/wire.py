"""The frames on the socket to a process that renders templates. A frame is the length of a message in bytes, as a
little-endian integer of four bytes, followed by the message in JSON.

JSON is used because tool schemas may contain integers of any size. The format msgpack, which the engine process uses,
has only integers of up to 64 bits.
"""

from __future__ import annotations

import socket
import time
from typing import Any, TypeVar

import msgspec

from jamba_server.server.text.rendering.renderer import Compiled, Rendering

T = TypeVar("T")

_HEADER_BYTES = 4
_MAX_FRAME_BYTES = 1 << 28  # three prompts of the maximum length have 200 MB if each character takes four bytes


class Work(msgspec.Struct, frozen=True):
    """A message to the rendering process. If `contexts` is empty, the template `source` is only compiled. Otherwise the
    template is rendered once for each mapping of variables in `contexts`."""

    source: str
    contexts: list[dict[str, Any]] | None = None


class Ready(msgspec.Struct, frozen=True):
    """The first message from the rendering process, which says that the process has imported its modules."""


class Done(msgspec.Struct, frozen=True):
    """The reply of the rendering process to a message `Work`. Either `compiled` or `renderings` has a value."""

    compiled: Compiled | None = None
    renderings: list[Rendering] | None = None


def pack(message: msgspec.Struct) -> bytes:
    """Returns the frame of a message. Raises UnicodeEncodeError for a text that has no UTF-8 form, and RecursionError
    for a value that is nested too deeply."""
    body = msgspec.json.encode(message)
    return len(body).to_bytes(_HEADER_BYTES, "little") + body


def receive(connection: socket.socket, kind: type[T], *, deadline: float | None = None) -> T | None:
    """Waits for the next message and returns it. Returns None at the end of the stream.

    Raises TimeoutError if the message is not complete at `deadline`, in seconds of time.monotonic(). Raises ValueError
    for a message that is too long or not of the type `kind`.
    """
    header = _exactly(connection, _HEADER_BYTES, deadline)
    if header is None:
        return None
    if (size := int.from_bytes(header, "little")) > _MAX_FRAME_BYTES:
        raise ValueError(f"a message has {size} bytes; at most {_MAX_FRAME_BYTES} are expected")
    body = _exactly(connection, size, deadline)
    return None if body is None else msgspec.json.decode(body, type=kind)


def _exactly(connection: socket.socket, n: int, deadline: float | None) -> bytes | None:
    data = bytearray()
    while len(data) < n:
        if deadline is not None:
            if (seconds := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            connection.settimeout(seconds)
        if not (piece := connection.recv(min(n - len(data), 1 << 20))):
            return None
        data += piece
    return bytes(data)
