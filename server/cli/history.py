"""Lets users of `jamba chat` edit the line that they type and recall earlier lines."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

MAX_LINES = 1000


def history_file() -> Path:
    """Returns the path of the file that keeps the lines typed in `jamba chat`. The file is below XDG_STATE_HOME or
    ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "jamba" / "chat_history"


@contextmanager
def line_editing(path: Path) -> Generator[None]:
    """Lets the user edit lines and recall earlier lines in Python's function `input`, within the `with` block. The
    lines are kept in the file `path`, which only the file's owner can read.

    A history that cannot be read or written is left out without an error, since the conversation works without it.
    """
    try:
        import readline
    except ImportError:  # some builds of Python have no readline
        yield
        return
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    try:
        yield
    finally:
        readline.set_history_length(MAX_LINES)
        with suppress(OSError):
            readline.write_history_file(path)
            path.chmod(0o600)  # some versions of readline make a new file that others can read
