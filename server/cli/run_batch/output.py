"""The output file of `jamba run-batch`. A run that was interrupted goes on where it has stopped."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec

from jamba_server.engine.errors import ConfigError


class _Error(msgspec.Struct):
    message: str


class _Response(msgspec.Struct):
    status_code: int


class _Line(msgspec.Struct):
    id: str
    custom_id: str | None = None
    response: _Response | None = None
    error: _Error | None = None


# Every line that `results.py` makes begins with these bytes.
_BEGINNING = b'{"id":"batch_req_'


class Output:
    """The lines that have been written, by this run and by earlier ones. `replied` has the custom_id of each line whose
    request was run. `refused` has the custom_id and the error message of each other line."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the file. If an earlier run was interrupted while it wrote a line, the part of the line is
        removed. Raises ConfigError if the file cannot be written, if another run writes it, or if it has other lines
        than those of results; the file is not changed then."""
        self.replied: set[str] = set()
        self.refused: set[tuple[str | None, str]] = set()
        self.num_completed = self.num_failed = 0
        self._file = _open(path)
        try:
            end = self._read(path)
        except ConfigError:
            self._file.close()
            raise
        self._file.truncate(end)

    def _read(self, path: Path) -> int:
        """Records the lines of the file. Returns where the last whole line ends."""
        self._file.seek(0)
        end = 0
        for number, text in enumerate(self._file, start=1):
            if not text.endswith(b"\n"):
                if text.startswith(_BEGINNING) or _BEGINNING.startswith(text):
                    break
                raise ConfigError(f"--output {path}: the last line is no part of a result of a batch.")
            try:
                line = msgspec.json.decode(text, type=_Line)
            except msgspec.DecodeError as error:
                raise ConfigError(f"--output {path}: line {number} is no result of a batch: {error}.") from error
            if line.response is None and line.error is None:
                raise ConfigError(f"--output {path}: line {number} is no result of a batch: it has no response.")
            self._record(line)
            end += len(text)
        return end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def write(self, text: bytes) -> None:
        """Writes the result of a line, which ends with a line feed."""
        self._file.write(text)
        self._file.flush()
        self._record(msgspec.json.decode(text, type=_Line))

    def _record(self, line: _Line) -> None:
        if line.response is not None and line.custom_id is not None:
            self.replied.add(line.custom_id)
        elif line.error is not None:
            self.refused.add((line.custom_id, line.error.message))
        ok = line.response is not None and 200 <= line.response.status_code < 300
        self.num_completed += ok
        self.num_failed += not ok


def _open(path: Path) -> BinaryIO:
    """Opens or creates a file, and locks it for this process until it is closed. Raises ConfigError."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"--output {path} is no regular file, so a later run could not go on with it.")
        file = path.open("ab+")
    except OSError as error:
        raise ConfigError(f"--output {path}: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(f"--output {path}: another run writes this file ({error.strerror}).") from error
    return file
