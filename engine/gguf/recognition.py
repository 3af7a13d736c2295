"""Tells GGUF files from others. This module imports nothing that takes long, because every command imports it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MAGIC: Final = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Returns whether `path` is a regular file that begins like a GGUF file or has the name of one."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return path.suffix.lower() == ".gguf" or file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False
