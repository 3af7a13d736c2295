"""Configures the log: the log lines of this package and of all libraries are written to stderr in one format."""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TextIO

from jamba_server.server.http.log_fields import ATTRIBUTE
from jamba_server.server.option_values import LogFormat


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


class JsonFormatter(logging.Formatter):
    """Formats each record as one line with a JSON object: time (UTC), level, logger, message, the record's own fields,
    and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name.removeprefix("jamba_server."),
            "message": record.getMessage(),
        }
        own: dict[str, object] = getattr(record, ATTRIBUTE, {})
        line |= {name: value for name, value in own.items() if name not in line}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


FORMATTERS: Mapping[LogFormat, Callable[[], logging.Formatter]] = {"text": LineFormatter, "json": JsonFormatter}


class StderrHandler(logging.StreamHandler[TextIO]):
    """Writes each log line to the stream that is sys.stderr at that moment. While a progress bar is shown, the library
    rich sets sys.stderr to a stream that writes above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]  # a property, as in logging itself
        return sys.stderr


def configure_logging(level: str = "INFO", form: LogFormat = "text") -> None:
    """Writes the log and Python's warnings to stderr in one format. Messages of lower severity than `level` are not
    shown."""
    handler = StderrHandler()
    handler.setFormatter(FORMATTERS[form]())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for noisy in ("uvicorn.access", "httpx"):  # the module `server.http` logs requests already
        logging.getLogger(noisy).setLevel(logging.WARNING)
