"""Reads what the flags --schema and --file of `jamba run` and `jamba chat` name: a JSON schema, and a text document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jamba_server.engine.errors import ConfigError

MAX_FILE_BYTES = 4 * 1024**2  # more than any context of a Jamba model has room for

System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System message  [default: none]", show_default=False)
]
Schema = Annotated[
    str | None,
    typer.Option(
        "--schema",
        metavar="FILE_OR_JSON",
        help="JSON schema that each reply follows: a file, or the schema itself  [default: none]",
        show_default=False,
    ),
]
Document = Annotated[
    Path | None,
    typer.Option(
        "--file", metavar="PATH", help="Text file to put before the first question  [default: none]", show_default=False
    ),
]


def read_schema(value: str | None) -> dict[str, Any] | None:
    """Returns the JSON schema in `value`, or in the file that `value` names. Raises ConfigError if there is none."""
    if value is None:
        return None
    inline = value.lstrip().startswith("{")
    text = value if inline else _read(Path(value), "--schema")
    name = "--schema" if inline else f"--schema {value}"
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON: {error}.") from None
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply.") from None
    if not isinstance(schema, dict):
        raise ConfigError(f"{name} holds {type(schema).__name__}; a schema is a JSON object.")
    return schema


def read_document(path: Path | None) -> str | None:
    """Returns the text of a file between tags that name it, to be put before a question. Raises ConfigError."""
    if path is None:
        return None
    text = _read(path, "--file").strip()
    return f'<document name="{path.name}">\n{text}\n</document>'


def with_document(document: str | None, question: str) -> str:
    return question if document is None else f"{document}\n\n{question}"


def _read(path: Path, flag: str) -> str:
    """Returns the text of a file in UTF-8. Raises ConfigError, which names `flag`."""
    try:
        with path.expanduser().open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be read: {error.strerror}.") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{flag} {path} is too large: at most {MAX_FILE_BYTES:,} bytes are read.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{flag} {path} is not a text in UTF-8: byte {error.start} is 0x{data[error.start]:02x}."
        ) from None
