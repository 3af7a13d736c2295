"""Opens the file /dev/null for standard streams that are missing.

A process that was started without stdin, stdout or stderr would give the numbers 0, 1 and 2 to the next files and
sockets that it opens. Other code then writes messages to these sockets, and child processes inherit them.
"""

from __future__ import annotations

import os
import sys

_NAMES = ("stdin", "stdout", "stderr")


def open_missing_streams() -> None:
    """Opens /dev/null for each of the file descriptors 0, 1 and 2 that is closed. The corresponding file object in the
    module `sys` is replaced, too. Must be called before the process opens other files."""
    for descriptor, name in enumerate(_NAMES):
        try:
            os.fstat(descriptor)
        except OSError:
            # `os.open` returns the lowest free number, which is `descriptor`, because all lower numbers are in use.
            opened = os.open(os.devnull, os.O_RDONLY if name == "stdin" else os.O_WRONLY)
            os.set_inheritable(opened, True)
            setattr(sys, name, os.fdopen(opened, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))
