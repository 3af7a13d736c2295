"""Reads the YAML file of options."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from jamba_server.engine.errors import ConfigError
from jamba_server.engine.files import read_text


def read_yaml(path: Path) -> dict[object, object]:
    """Returns the keys and values of a YAML file. Raises ConfigError if the file is missing or holds something else."""
    import yaml  # imported only here, since this import takes a tenth of the time in which a command starts

    if (text := read_text(path)) is None:
        raise ConfigError(f"--config {path}: there is no such file.")
    try:
        document: object = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(document, dict | None):
        raise ConfigError(f"--config {path} holds a {type(document).__name__}; keys with values are expected.")
    return cast("dict[object, object]", document or {})
