"""Fields of a request that its schema does not have: slips of known names, other servers' fields, and the rest.

The first two are refused here. The rest is kept by pydantic (`extra="allow"`), found by `unknown_fields`, and ignored
or refused as `--unknown-fields` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from jamba_server.server.http.schemas.peer_fields import PeerField, PeerFields

MIN_SLIP_CHARS = 4  # shorter names resemble each other by chance
SHORT_NAME_CHARS = 6  # up to here a slip is one edit, beyond two


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name of which `name` looks like a slip, if there is one."""
    limit = 1 if len(name) <= SHORT_NAME_CHARS else 2
    near = [(d, other) for other in known if (d := _slip(name, other, limit)) is not None]
    return min(near)[1] if near else None


def _slip(name: str, other: str, limit: int) -> int | None:
    """The edits from one name to the other, if these are at most `limit`. Most pairs differ in more letters than so
    many edits can change, which is seen at once."""
    if min(len(name), len(other)) < MIN_SLIP_CHARS or abs(len(name) - len(other)) > limit:
        return None
    if len(set(name) ^ set(other)) > 2 * limit:
        return None
    distance = edits(name, other)
    return distance if distance <= limit else None


def edits(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that make `b` of `a`: Damerau and Levenshtein's
    distance where no letter is edited twice (optimal string alignment)."""
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
    """Why `body` cannot be answered without the field `name`, which another server has; None if it can."""
    if (field := peers.get(name)) is None or field.is_neutral(body[name]) or _is_off(field, body, peers):
        return None
    hint = f"; send `{field.instead}` instead" if field.instead else ""
    return f"is a field of {field.of} that would change the answer and is not supported here{hint}"


def _is_off(field: PeerField, body: Mapping[str, Any], peers: PeerFields) -> bool:
    """Whether one of the field's switches is there, and off."""
    return any(name in body and name in peers and peers[name].is_neutral(body[name]) for name in field.switches)


def unknown_fields(body: BaseModel) -> Iterator[str]:
    """Paths of the fields that the schemas do not have, at every level; items of a list share their path."""
    yield from body.model_extra or ()
    for name in type(body).model_fields:
        value = getattr(body, name)
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, BaseModel):
                yield from (f"{name}.{path}" for path in unknown_fields(item))
