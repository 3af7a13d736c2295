"""The stored responses of a session as they are in a file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from pydantic import TypeAdapter, ValidationError

from jamba_server.server.http.findings import describe_finding
from jamba_server.server.http.schemas.responses.items import InputItem, Item, ItemReference, new_id
from jamba_server.server.http.schemas.responses.reply import Response
from jamba_server.server.http.schemas.responses.tools import FunctionNames
from jamba_server.server.http.session_files.format import Turn, bad_file
from jamba_server.server.http.session_task import continuing_request
from jamba_server.server.http.store.database import StoredResponse

T = TypeVar("T")

_ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[InputItem])


def turn_of(stored: StoredResponse) -> Turn:
    return Turn(input=msgspec.Raw(stored.input), response=msgspec.Raw(stored.response))


def stored_turns(turns: list[Turn], *, owner: str, session: str) -> list[tuple[StoredResponse, list[str]]]:
    """Returns the responses of a file, the oldest first, each with the ids of its items. They get new ids, because
    responses with their ids may be stored already. Raises RequestRejected if one of them is not valid."""
    found: list[tuple[StoredResponse, list[str]]] = []
    previous: str | None = None
    for number, turn in enumerate(turns):
        items = _checked(turn.input, _items, number=number, name="input")
        response = _checked(turn.response, _response, number=number, name="response").model_copy(
            update={
                "id": new_id("resp"),
                "previous_response_id": previous,
                "session": session,
                "store": True,
                "jamba_cache": None,
            }
        )
        stored = StoredResponse(
            id=response.id,
            owner=owner,
            previous_id=previous,
            input=msgspec.json.encode(items),
            response=response.model_dump_json().encode(),
        )
        found.append((stored, [*(item["id"] for item in items), *(item.id for item in response.output)]))
        previous = response.id
    return found


def _checked(text: msgspec.Raw, parse: Callable[[Any], T], *, number: int, name: str) -> T:
    """Returns what `parse` makes of the JSON in a field of a turn. Raises RequestRejected if it is not valid."""
    try:
        return parse(msgspec.json.decode(text))
    except msgspec.DecodeError as error:  # a number is too large; the syntax of the JSON was checked before
        why = f"{name}: {error}"
    except ValidationError as error:
        [finding, *_] = error.errors()
        why = describe_finding({**finding, "loc": ("file", name, *finding["loc"])})
    raise bad_file(f"response {number} is not valid: {why}")


def _items(value: Any) -> list[Item]:
    given = _ITEMS.validate_python(value)
    for item in given:
        if isinstance(item, ItemReference):
            raise bad_file("it refers to items that are not in it")
    return [item.to_item() for item in given]


def _response(value: Any) -> Response:
    response = Response.model_validate(value)
    # A later request continues the response with these instructions and tools.
    FunctionNames.of(continuing_request(response.model_dump(include={"instructions", "tools"})).declared_tools)
    return response
