"""No field of a request is forgotten: each one in the OpenAPI document has a row, is without effect or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance import chat_rows, file_rows, message_rows, other_rows
from tests.conformance.served import Served
from tests.conformance.strict import API_PAGE, EXTRA_FIELDS
from tests.conformance.tables import TABLES, Table
from tests.conformance.vector_rows import VECTOR_TABLES

# Fields that the tests of this folder cover without a row.
_EVERYWHERE = {"stream"}
_DEADLINE = {"timeout": "tests/server/test_waiting.py"}
_ELSEWHERE = {
    "/v1/chat/completions": _DEADLINE,
    "/v1/completions": _DEADLINE,
    "/v1/responses": _DEADLINE | {"previous_response_id": "test_others.py"},
}
# Endpoints that take the same requests as others. test_rows.py sends them the same requests.
_TWINS = {
    "/v1/chat/completions/render": "/v1/chat/completions",
    "/v1/responses/input_tokens": "/v1/responses",
}


def _covered(table: Table) -> set[str]:
    fields = {row.field for rows in (table.rows, table.inert, table.refused) for row in rows}
    return fields | _EVERYWHERE | _ELSEWHERE.get(table.api.path, {}).keys()


COVERED = {table.api.path: _covered(table) for table in TABLES}
# No part of these fields is accepted.
REFUSED = {
    table.api.path: {row.field for row in table.refused} - {"stream_options", "input", "tools"} for table in TABLES
}
REFUSED.update({twin: REFUSED[path] for twin, path in _TWINS.items()})
COVERED.update({twin: COVERED[path] for twin, path in _TWINS.items()})
COVERED["/v1/messages/count_tokens"] = COVERED["/v1/messages"] - message_rows.ONLY_GENERATION - _EVERYWHERE
COVERED["/tokenize"] = {row.field for row in other_rows.TOKENIZE} | {row.field for row in chat_rows.REFUSED_MESSAGES}
COVERED["/tokenize"] |= {row.field for row in chat_rows.INERT_MESSAGES}
COVERED["/tokenize"] |= {"model", "tools.function.strict"}  # the latter has no effect without a reply
# tests/server/test_sessions.py sends these.
COVERED["/v1/sessions/{name}/fork"] = {"id"}
COVERED["/v1/sessions/{name}/rewind"] = {"responses"}
COVERED["/v1/sessions/{name}/pin"] = {"seconds"}
COVERED["/v1/sessions/import"] = set()  # tests/server/test_session_files.py sends files
COVERED["/detokenize"] = {"model", "tokens"}
COVERED["/v1/files"] = {row.field for row in (*file_rows.UPLOAD, *file_rows.REFUSED_UPLOADS)} - {"unknown"}
COVERED["/v1/batches"] = {row.field for row in (*file_rows.BATCHES, *file_rows.REFUSED_BATCHES)} - {"completion_windo"}
for vectors in VECTOR_TABLES:  # test_vectors.py sends them
    rows = (*vectors.rows, *vectors.inert, *(row for row in vectors.refused if row.field in vectors.example))
    COVERED[vectors.path] = {row.field for row in rows} | {"timeout"}


def _fields(document: Any, schema: Any, prefix: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the paths of the fields that a schema has, without those of objects that have fields themselves."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name not in above:
            yield from _fields(document, document["components"]["schemas"][name], prefix, (*above, name))
        return
    for part in [*schema.get("anyOf", ()), *schema.get("oneOf", ()), schema.get("items", {})]:
        if part:
            yield from _fields(document, part, prefix, above)
    for name, inner in schema.get("properties", {}).items():
        path = f"{prefix}.{name}" if prefix else name
        yield path
        yield from _fields(document, inner, path, above)


def _requests(document: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path, operations in document["paths"].items():
        if "requestBody" in operations.get("post", {}):
            [media] = operations["post"]["requestBody"]["content"].values()
            found[path] = set(_fields(document, media["schema"]))
    return found


def test_every_field_of_every_request_is_covered(served: dict[str, Served]) -> None:
    requests = _requests(served["jamba"].app.openapi())
    assert requests.keys() == COVERED.keys()
    for path, fields in requests.items():
        fields -= {field for field in fields if field.partition(".")[0] in REFUSED.get(path, ())}
        covered = {".".join(field.split(".")[:depth]) for field in COVERED[path] for depth in range(1, 9)}
        assert fields - covered == set(), f"{path}: write rows for these fields"
        assert {field for field in COVERED[path] if "." in field} - fields == set(), f"{path}: there are no such fields"


@pytest.mark.parametrize("name", sorted(EXTRA_FIELDS))
def test_the_page_has_the_fields_that_the_clients_do_not_know(name: str) -> None:
    assert f"`{name}`" in API_PAGE or f'"{name}"' in API_PAGE


def test_every_operation_is_called_somewhere(served: dict[str, Served]) -> None:
    paths = served["jamba"].app.openapi()["paths"]
    called = COVERED.keys() | other_rows.PATHS | file_rows.PATHS
    assert paths.keys() - called == set()
