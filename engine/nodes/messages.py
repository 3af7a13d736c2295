"""What nodes send to each other, in the frames of `process.wire`, over TCP connections to node 0.

Each node has one connection for `Hello` and all that follows, and one for each of its ranks. A connection of a rank
begins with `RankHello` and then belongs to the rank: node 0 hands it to the engine process.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final

import msgspec

from jamba_server.engine.nodes.terms import Terms
from jamba_server.engine.process.wire import HEADER_BYTES, body_bytes, pack

MAX_FIRST_BYTES: Final = 4 << 20  # the largest first message of a connection; its sender is not known yet
# If the other machine does not answer for about this number of seconds, a connection to it ends.
SILENCE_SECONDS: Final = 20


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message of a node."""

    node: int
    terms: Terms


class RankHello(msgspec.Struct, frozen=True, tag=True):
    """The first message of the connection of a rank. The `token` is the one of the message `Start`."""

    incarnation: int
    token: str
    rank: int


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Tells a node that it has joined."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Tells a node why it may not join. If `final` is false, it may try again."""

    reason: str
    final: bool


class Start(msgspec.Struct, frozen=True, tag=True):
    """Tells a node to start its ranks and to connect them to node 0. Each start of the engine is an incarnation with a
    number and a random `token`, so that no rank of an earlier one can join."""

    incarnation: int
    token: str


class CannotStart(msgspec.Struct, frozen=True, tag=True):
    """Tells node 0 that a node cannot start its ranks."""

    incarnation: int
    reason: str


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Tells a node that an incarnation has ended, so that its ranks must end, too."""

    incarnation: int


class Farewell(msgspec.Struct, frozen=True, tag=True):
    """Tells a node that node 0 ends. `failed` says whether that is an error."""

    reason: str
    failed: bool


FirstMessage = Hello | RankHello
ToNode = Welcome | Refused | Start | Stop | Farewell
# What a message of another version, or of another program, raises when it is decoded.
MALFORMED = (ValueError, msgspec.MsgspecError)


def send(writer: asyncio.StreamWriter, message: msgspec.Struct) -> None:
    """Queues a message. If the other node is gone, the message is lost."""
    if not writer.is_closing():
        writer.write(pack(message))


async def receive(reader: asyncio.StreamReader, kind: Any) -> Any:
    """Waits for the next message and returns it, or None if the connection has ended. Raises one of MALFORMED for bytes
    that are not a valid message."""
    try:
        header = await reader.readexactly(HEADER_BYTES)
        return msgspec.msgpack.decode(await reader.readexactly(body_bytes(header)), type=kind)
    except (asyncio.IncompleteReadError, OSError):
        return None


async def receive_first(connection: socket.socket) -> FirstMessage | None:
    """Returns the first message of a connection, or None if the connection has ended. Reads no byte of what follows,
    because that may be for another process. Raises OSError, or one of MALFORMED."""
    if (header := await _exactly(connection, HEADER_BYTES)) is None:
        return None
    if (size := body_bytes(header)) > MAX_FIRST_BYTES:
        raise ValueError(f"the first message has {size} bytes; the limit is {MAX_FIRST_BYTES}")
    body = await _exactly(connection, size)
    return None if body is None else msgspec.msgpack.decode(body, type=FirstMessage)


async def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data, loop = bytearray(), asyncio.get_running_loop()
    while len(data) < size:
        if not (piece := await loop.sock_recv(connection, size - len(data))):
            return None
        data += piece
    return bytes(data)


def notice_silence(connection: socket.socket) -> None:
    """Makes the operating system end a TCP connection when the other machine is gone, and send small messages at
    once."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": SILENCE_SECONDS // 4,
        "TCP_KEEPINTVL": SILENCE_SECONDS // 4,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": SILENCE_SECONDS * 1000,
    }
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
