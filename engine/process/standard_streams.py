"""Opens the file /dev/null in place of standard streams that are closed.

If a process is started without stdin, stdout or stderr, the next files and sockets that it opens get the descriptors 0,
1 and 2. Code that writes to stdout or stderr would then write into these sockets, and child processes would inherit
them as their standard streams.
"""

from __future__ import annotations

import os
import sys

_NAMES = ("stdin", "stdout", "stderr")


def open_missing_streams() -> None:
    """Opens /dev/null for each of the file descriptors 0, 1 and 2 that is closed. The corresponding file object in
    Python's module `sys` is replaced, too. Must be called before the process opens other files."""
    for descriptor, name in enumerate(_NAMES):
        try:
            os.fstat(descriptor)
        except OSError:
            # `os.open` returns the lowest free number, which is `descriptor`, because all lower numbers are in use.
            opened = os.open(os.devnull, os.O_RDONLY if name == "stdin" else os.O_WRONLY)
            os.set_inheritable(opened, True)
            setattr(sys, name, os.fdopen(opened, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))
