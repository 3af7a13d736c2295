"""Finds what a checkpoint folder says about the quantisation of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.files import read_object
from jamba_server.engine.quantization.methods import METHOD_FILES, advice

# The keys of config.json under which tools write their settings. MLX writes the same settings under both.
_KEYS: Final = ("quantization", "quantization_config")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of a quantisation method: `values` is the JSON object at `key` in the file `path`. The key is empty
    if the whole file holds the settings of the method."""

    path: Path
    key: str
    values: Mapping[str, Any]

    @property
    def method(self) -> object:
        """Returns the name of the method, or the tool's usual file name if the tool writes no name of the method."""
        return self.values.get("quant_method", None if self.key else self.path.name)

    def refuse(self, key: str, value: object, rule: str) -> NoReturn:
        """Raises a CheckpointError that names the file, the key and its value."""
        name = ".".join(part for part in (self.key, key) if part)
        raise CheckpointError(f"{self.path}: {name} is {shown(value)}; {rule}. {advice(None)}")

    def one_of(self, key: str, *allowed: object) -> Any:
        """Returns the value at `key`, or None if the key is absent. Raises CheckpointError if the value is not one of
        those in `allowed`."""
        value = self.values.get(key)
        if not any(value == known and type(value) is type(known) for known in allowed):
            known = ", ".join(shown(item) for item in allowed if item is not None)
            self.refuse(key, value, f"this server reads {known} only")
        return value

    def group_size(self, key: str) -> int | None:
        """Returns the number of inputs that share a scale, or None if a whole row shares one, which the file says with
        -1."""
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or (value != -1 and (value < 8 or value % 8)):
            self.refuse(key, value, "a multiple of 8 is expected, or -1 for whole rows")
        return None if value == -1 else value


def find_settings(folder: Path) -> Settings | None:
    """Returns the settings in the config.json of a folder. If it has none, returns those in a file of the old versions
    of AutoGPTQ or AutoAWQ. Returns None if there are no such settings."""
    config = folder / "config.json"
    values = read_object(config) or {}
    for key in _KEYS:
        if isinstance(values.get(key), dict):
            return Settings(config, key, cast(dict[str, Any], values[key]))
    for name in METHOD_FILES:
        if (found := read_object(folder / name)) is not None:
            return Settings(folder / name, "", found)
    return None
