"""The rows of each endpoint that generates text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.conformance import chat_rows, completion_rows, message_rows, response_rows
from tests.conformance.apis import Api, ChatApi, CompletionApi, MessageApi, ResponseApi
from tests.conformance.rows import Body, Inert, Refused, Row


def _whole(body: Body) -> dict[str, Any]:
    return dict(body)


def _conversation(body: Body) -> dict[str, Any]:
    """The fields that /v1/messages/count_tokens takes."""
    sampling = message_rows.ONLY_GENERATION
    return {name: value for name, value in body.items() if name not in sampling}


@dataclass(frozen=True)
class Table:
    """`echoed` are fields of a request that its reply repeats."""

    name: str
    api: type[Api]
    rows: Sequence[Row]
    inert: Sequence[Inert]
    refused: Sequence[Refused]
    echoed: frozenset[str] = frozenset()
    for_count: Callable[[Body], dict[str, Any]] = _whole


TABLES = (
    Table("chat", ChatApi, chat_rows.ROWS, chat_rows.INERT, chat_rows.REFUSED),
    Table("completions", CompletionApi, completion_rows.ROWS, completion_rows.INERT, completion_rows.REFUSED),
    Table(
        "responses", ResponseApi, response_rows.ROWS, response_rows.INERT, response_rows.REFUSED, response_rows.ECHOED
    ),
    Table(
        "messages",
        MessageApi,
        message_rows.ROWS,
        message_rows.INERT,
        message_rows.REFUSED,
        for_count=_conversation,
    ),
)
