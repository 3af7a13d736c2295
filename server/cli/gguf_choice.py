"""Chooses one of the GGUF files of a model on the hub by its quantisation, as in `org/name-GGUF:Q4_K_M`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

# The quantisation that is chosen if the user names none. llama.cpp and Ollama have the same default.
DEFAULT: Final = "Q4_K_M"
_SHOWN: Final = 40  # an error message lists at most this number of quantisations
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
    """Returns the names of the file with the quantisation `wanted` (of all its pieces, if the file is split), and the
    names of all quantisations. If `wanted` is "", the quantisation DEFAULT is chosen, or the only one that exists.
    Raises NoSuchFile if there is no such file."""
    found = quantizations(files)
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


def quantizations(files: Iterable[str]) -> dict[str, list[str]]:
    """Maps each quantisation among the GGUF files `files` to the name of its file, or to the names of its pieces in
    order."""
    found: dict[str, list[str]] = {}
    for file in sorted(files):
        found.setdefault(_quantization(file), []).append(file)
    return found


def _quantization(file: str) -> str:
    """Returns the quantisation that the name of a file contains. If the name contains none, returns the name itself."""
    if match := _NAME.search(file):
        return match["tag"].upper()
    return _PIECE.sub("", file.removesuffix(".gguf"))
