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
        shown = copy.copy(record)  # a copy, because other handlers get the same record
        shown.name = record.name.removeprefix("jamba_server.")
        if record.name == "py.warnings":  # the second line of a Python warning quotes source code
            shown.msg, shown.args = record.getMessage().partition("\n")[0], None
        return super().format(shown)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes log lines to the stream that sys.stderr names at the time of writing. While a progress bar is shown,
    the library rich replaces sys.stderr by a stream that writes above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]  # a property, as in logging itself
        return sys.stderr


def configure_logging(level: str = "INFO") -> None:
    """Sends the log and Python's warnings to stderr in one format. `level` is the lowest severity that is shown."""
    handler = StderrHandler()
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for noisy in ("uvicorn.access", "httpx"):  # requests are logged by the module `server.http`
        logging.getLogger(noisy).setLevel(logging.WARNING)
