"""The log: on stderr, in one format for whatever logs. Set up once, by the command that runs."""

from __future__ import annotations

import copy
import logging
import sys
from typing import TextIO


class LineFormatter(logging.Formatter):
    """One line a record, for whatever logs: `DATE TIME LEVEL NAME: MESSAGE`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        shown = copy.copy(record)  # other handlers see the same record
        shown.name = record.name.removeprefix("jamba_server.")
        if record.name == "py.warnings":  # the second line is the source code that warned
            shown.msg, shown.args = record.getMessage().partition("\n")[0], None
        return super().format(shown)


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at the moment: while a progress bar is shown, that writes above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]  # a property, as in logging itself
        return sys.stderr


def configure_logging(level: str = "INFO") -> None:
    """Sends the log, and Python's warnings, to stderr in one format."""
    handler = StderrHandler()
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for noisy in ("uvicorn.access", "httpx"):  # requests are logged by `server.http`
        logging.getLogger(noisy).setLevel(logging.WARNING)
