"""Threads with a large stack, in which grammars are compiled."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

# Number of bytes of the stack. llguidance follows a chain of rules or references by recursion, and a stack that
# overflows ends the process. The longest chain that fits into a grammar of `validation.MAX_GRAMMAR_CHARS` characters
# needs less than half of this size. Memory is used only as far as the recursion goes.
STACK_BYTES: Final = 1 << 29

_starting = threading.Lock()


def start_deep_thread(run: Callable[..., Any], *arguments: Any) -> threading.Thread:
    """Starts `run(*arguments)` in a daemon thread with a stack of STACK_BYTES bytes and returns the thread."""
    thread = threading.Thread(target=run, args=arguments, daemon=True)
    with _starting:  # the size of the stack is a setting of the whole process, which the next new thread takes
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return thread
