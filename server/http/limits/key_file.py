"""Reads API keys and their limits from the file that the option --api-key-file names.

Each line of the file is a key, or a JSON object with the fields of the class `Key`. Blank lines and lines that begin
with `#` have no meaning:

    # the keys of the team
    sk-plain-key
    {"key": "sk-other-key", "name": "batch", "requests_per_minute": 60, "tokens_per_minute": 100000}
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from jamba_server.engine.errors import ConfigError
from jamba_server.engine.files import read_text

HASH_CHARS = 12  # a key without a name is called after this number of characters of its hash
Positive = Annotated[int, Meta(ge=1)]


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An API key. `name` is the name of the key's owner. The log shows this name instead of the key, and responses that
    are stored with the key belong to this owner. Two lines with the same name are two keys of one owner. A limit of
    None does not apply. `max_concurrent` limits the requests that run at the same time."""

    key: Annotated[str, Meta(min_length=1)]
    name: str = ""
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    max_concurrent: Positive | None = None

    @property
    def owner(self) -> str:
        """Returns the name of the key's owner. For a key without a name, it is made from a hash of the key, so that it
        is the same after a restart and does not reveal the key."""
        return self.name or f"key-{hashlib.sha256(self.key.encode()).hexdigest()[:HASH_CHARS]}"


def read_keys(plain: Iterable[str], path: str | None) -> tuple[Key, ...]:
    """Returns the keys in `plain` and those of the file `path`. Raises ConfigError for a file without a valid key."""
    keys = [Key(key=key) for key in plain]
    if path is not None:
        keys += _read_file(path)
    seen: dict[str, Key] = {}
    for key in keys:
        if seen.setdefault(key.key, key) != key:
            raise ConfigError(f"The API key of {key.owner!r} is given twice, with different names or limits.")
    return tuple(seen.values())


def _read_file(path: str) -> list[Key]:
    if (text := read_text(Path(path))) is None:
        raise ConfigError(f"api_key_file is {path!r}; there is no such file.")
    keys = [
        _parse(line.strip(), f"{path}, line {number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if not keys:
        raise ConfigError(f"api_key_file is {path!r}; the file has no key.")
    return keys


def _parse(line: str, where: str) -> Key:
    """Returns the key in one line. The error messages do not quote the line, because it holds a secret."""
    if not line.startswith("{"):
        return Key(key=line)
    try:
        found = msgspec.json.decode(line, type=Key)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}.") from None
    except msgspec.DecodeError:
        raise ConfigError(f"{where} begins with a brace but is not a JSON object.") from None
    stripped = found.key.strip()
    if not stripped:
        raise ConfigError(f"{where}: the key is blank.")
    return msgspec.structs.replace(found, key=stripped)
