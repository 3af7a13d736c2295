"""Starts threads with a large stack. Grammars are compiled in such threads, because the compiler recurses deeply."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

# The size of the stack in bytes. The library llguidance follows a chain of grammar rules by recursion, and a stack
# overflow would end the process. The longest chain that fits into a grammar of `validation.MAX_GRAMMAR_CHARS`
# characters needs less than half of this size. The operating system provides memory only for the part of the stack that
# is used.
STACK_BYTES: Final = 1 << 29

_starting = threading.Lock()


def start_deep_thread(run: Callable[..., Any], *arguments: Any) -> threading.Thread:
    """Starts `run(*arguments)` in a daemon thread with a stack of STACK_BYTES bytes and returns the thread."""
    thread = threading.Thread(target=run, args=arguments, daemon=True)
    # The size of the stack is a setting of the whole process, and it applies to every thread that is started next.
    with _starting:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return thread
