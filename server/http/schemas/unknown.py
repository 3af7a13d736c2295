"""Finds the unknown fields of a request and decides which of them are refused.

Two kinds of unknown fields are always refused: fields that look like a misspelling of a known field, and fields of
other servers that would change the answer. pydantic keeps all other unknown fields (`extra="allow"`), and the function
`unknown_fields` lists them. The option `--unknown-fields` says whether the listed fields are ignored
or refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from jamba_server.server.http.schemas.peer_fields import PeerField, PeerFields

MIN_SLIP_CHARS = 4  # field names with fewer characters are often alike by chance and never count as misspellings
SHORT_NAME_CHARS = 6  # misspellings of up to this length have one edit, longer misspellings one or two edits


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name of which `name` looks like a misspelling, or None if there is no such name."""
    limit = 1 if len(name) <= SHORT_NAME_CHARS else 2
    near = [(d, other) for other in known if (d := _slip(name, other, limit)) is not None]
    return min(near)[1] if near else None


def _slip(name: str, other: str, limit: int) -> int | None:
    """Returns the number of edits that turn one name into the other, or None if this number exceeds `limit`.

    Counting edits is slow. Most pairs of names need no count, because their lengths or their sets of letters differ by
    more than `limit` edits can change.
    """
    if min(len(name), len(other)) < MIN_SLIP_CHARS or abs(len(name) - len(other)) > limit:
        return None
    if len(set(name) ^ set(other)) > 2 * limit:
        return None
    distance = edits(name, other)
    return distance if distance <= limit else None


def edits(a: str, b: str) -> int:
    """Returns the minimum number of edits that turn the text `a` into the text `b`.

    An edit inserts, deletes or replaces a letter, or swaps two neighbouring letters. No letter is edited twice: this is
    the optimal string alignment distance.
    """
    before, previous, current = [0], [0], list(range(len(b) + 1))
    for i, char in enumerate(a, start=1):
        before, previous, current = previous, current, [i]
        for j, other in enumerate(b, start=1):
            cost = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (char != other))
            if i > 1 and j > 1 and (char, a[i - 2]) == (b[j - 2], other):
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
    return current[-1]


def peer_problem(name: str, body: Mapping[str, Any], peers: PeerFields) -> str | None:
    """Returns the reason, as the predicate of a sentence, to refuse a request because of its unknown field `name`.

    Returns None if `peers` does not list this field, or if the field would not change the answer.
    """
    if (field := peers.get(name)) is None or field.is_neutral(body[name]) or _is_off(field, body, peers):
        return None
    hint = f"; send `{field.instead}` instead" if field.instead else ""
    return f"is a field of {field.of} that would change the answer and is not supported here{hint}"


def _is_off(field: PeerField, body: Mapping[str, Any], peers: PeerFields) -> bool:
    """Returns whether the request turns `field` off. A request turns a field off if it has one of the fields in
    `field.switches` with a neutral value."""
    return any(name in body and name in peers and peers[name].is_neutral(body[name]) for name in field.switches)


def unknown_fields(body: BaseModel) -> Iterator[str]:
    """Yields the paths of all unknown fields in a body, including unknown fields of nested objects.

    If a field is in an item of a list, the path leaves out the position of the item in the list.
    """
    yield from body.model_extra or ()
    for name in type(body).model_fields:
        value = getattr(body, name)
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, BaseModel):
                yield from (f"{name}.{path}" for path in unknown_fields(item))
