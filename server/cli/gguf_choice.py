"""Chooses one of the GGUF files of a model on the hub by its quantisation, as in `org/name-GGUF:Q4_K_M`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

# The quantisation that is taken if none is named. llama.cpp and Ollama take the same one.
DEFAULT: Final = "Q4_K_M"
_SHOWN: Final = 40  # an error lists at most this many quantisations
_NAME: Final = re.compile(
    r"[-._](?P<tag>I?Q\d[A-Z0-9_]*|B?F16|F32|TQ\d_\d|MXFP4[A-Z_]*)(?P<piece>-\d{5}-of-\d{5})?\.gguf", re.IGNORECASE
)
_PIECE: Final = re.compile(r"-\d{5}-of-\d{5}$")


class NoSuchFile(Exception):
    """No file of a model has the wanted quantisation. The message says which quantisations there are."""


def split_name(name: str) -> tuple[str, str | None]:
    """Returns the hub id in `name`, and the quantisation that `name` asks for: "" if the model has GGUF files and no
    quantisation is named, or None if the model is not one of GGUF files."""
    hub_id, colon, tag = name.partition(":")
    if colon:
        return hub_id, tag
    return hub_id, "" if hub_id.lower().endswith("gguf") else None


def choose(files: Iterable[str], wanted: str) -> tuple[list[str], list[str]]:
    """Returns the names of the file, or of all pieces, with the quantisation `wanted`, and the names of all
    quantisations. If `wanted` is "", DEFAULT is taken, or the only one. Raises NoSuchFile."""
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        found.setdefault(_quantization(file), []).append(file)
    tags = list(found)
    if not found:
        raise NoSuchFile("it has no GGUF files")
    by_upper = {tag.upper(): tag for tag in tags}
    tag = by_upper.get((wanted or DEFAULT).upper()) or (tags[0] if not wanted and len(tags) == 1 else None)
    if tag is None:
        listed = ", ".join(tags[:_SHOWN]) + (f" and {len(tags) - _SHOWN} more" if len(tags) > _SHOWN else "")
        problem = f"it has no quantisation {wanted}" if wanted else f"it has no {DEFAULT}, which is taken by default"
        raise NoSuchFile(f"{problem}; name one of {listed} after a colon")
    return found[tag], tags


def _quantization(file: str) -> str:
    """Returns the quantisation in the name of a file. A file whose name has none is known by its name."""
    if match := _NAME.search(file):
        return match["tag"].upper()
    return _PIECE.sub("", file.removesuffix(".gguf"))
