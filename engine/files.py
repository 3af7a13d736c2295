"""Reads the small files of a checkpoint folder. A checkpoint may come from an untrusted source, so a file is read only
if it is a regular file of limited size."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, Final, cast

from jamba_server.engine.errors import CheckpointError

# largest allowed size of a file in bytes; the largest published configuration files have 1 MB
MAX_BYTES: Final = 16 << 20
_KINDS: Final = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a device"),
)


def read_bytes(path: Path, *, limit: int = MAX_BYTES) -> bytes | None:
    """Returns the content of a file, or None if the file does not exist. Raises CheckpointError unless `path` is a
    regular file of at most `limit` bytes."""
    try:
        with open(path, "rb", opener=_open) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                kind = next((name for is_kind, name in _KINDS if is_kind(status.st_mode)), "not a regular file")
                raise CheckpointError(f"{path} is {kind}; a file is expected.")
            if status.st_size > limit:
                raise CheckpointError(f"{path} has {status.st_size:,} bytes; at most {limit:,} are expected.")
            return file.read(limit)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _open(path: str, flags: int) -> int:
    """Opens a file with O_NONBLOCK. Without this flag, opening a named pipe would block until another process opens the
    pipe for writing."""
    return os.open(path, flags | os.O_NONBLOCK)


def read_text(path: Path, *, limit: int = MAX_BYTES) -> str | None:
    """Returns the text of a UTF-8 file, or None if the file does not exist. Raises CheckpointError if the file cannot
    be read."""
    data = read_bytes(path, limit=limit)
    return None if data is None else parse_text(path, data)


def read_object(path: Path) -> dict[str, Any] | None:
    """Returns the JSON object in a file, or None if the file does not exist. Raises CheckpointError if the file cannot
    be read or holds no JSON object."""
    data = read_bytes(path)
    return None if data is None else parse_object(path, data)


def parse_text(path: Path, data: bytes) -> str:
    """Returns `data` decoded from UTF-8. Raises CheckpointError, which names `path`, if this is not possible."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read as UTF-8: {error}.") from error


def parse_object(path: Path, data: bytes) -> dict[str, Any]:
    """Returns the JSON object that `data` holds. Raises CheckpointError, which names `path`, if it holds none."""
    try:
        value: object = json.loads(data)
    except ValueError as error:  # bytes that are not UTF-8 raise UnicodeDecodeError, a subclass of ValueError
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} cannot be read as JSON: its values are nested too deeply.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object is expected.")
    return cast(dict[str, Any], value)
