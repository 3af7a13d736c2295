"""The engine process and its parent."""

from __future__ import annotations

import socket
import threading

from jamba_server.engine.core import Inbox
from jamba_server.engine.process.__main__ import read


def test_a_parent_killed_before_it_read_our_last_message_ends_the_engine() -> None:
    ours, theirs = socket.socketpair()
    stop, inbox = threading.Event(), Inbox()
    with theirs:
        theirs.sendall(b"unread")  # which makes the close a reset
        ours.close()
        read(theirs, inbox, stop)
    assert stop.is_set()
    inbox.wait()  # does not block: an idle engine is woken
