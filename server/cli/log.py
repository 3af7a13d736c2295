"""Configures the log: the log lines of this package and of all libraries are written to stderr in one format."""

from __future__ import annotations

import copy
import logging
import sys
from typing import TextIO


class LineFormatter(logging.Formatter):
    """Formats each record as one line: `DATE TIME LEVEL NAME: MESSAGE`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        shown = copy.copy(record)  # the record is copied, because other handlers get the same record
        shown.name = record.name.removeprefix("jamba_server.")
        # Only the first line of a Python warning is shown, since the second line quotes source code.
        if record.name == "py.warnings":
            shown.msg, shown.args = record.getMessage().partition("\n")[0], None
        return super().format(shown)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes each log line to the stream that is sys.stderr at that moment. While a progress bar is shown, the library
    rich sets sys.stderr to a stream that writes above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]  # a property, as in logging itself
        return sys.stderr


def configure_logging(level: str = "INFO") -> None:
    """Writes the log and Python's warnings to stderr in one format. Messages of lower severity than `level` are not
    shown."""
    handler = StderrHandler()
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for noisy in ("uvicorn.access", "httpx"):  # the module `server.http` logs requests already
        logging.getLogger(noisy).setLevel(logging.WARNING)
