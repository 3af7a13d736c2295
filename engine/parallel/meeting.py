"""Where the ranks of an engine find each other. Works without torch."""

from __future__ import annotations

import socket
from typing import Final

import msgspec

LOOPBACK: Final = "127.0.0.1"


class Meeting(msgspec.Struct, frozen=True, kw_only=True):
    """Where the ranks find each other: in the file at `path` if all are on one machine, else in a store of rank 0,
    which listens at the address `store`.

    `host` is the address at which a rank receives tensors of other ranks on a CPU. `listener` is the descriptor of the
    socket of the store, for rank 0 only.
    """

    path: str = ""
    store: tuple[str, int] | None = None
    host: str = LOOPBACK
    listener: int | None = None


def open_listener(host: str) -> socket.socket:
    """Returns a socket that listens at a free port of the address `host`, and there only."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=128)
