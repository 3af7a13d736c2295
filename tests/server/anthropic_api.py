"""Anthropic's client on an application, and Anthropic's types as the judge of every event and reply."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from anthropic import AsyncAnthropic
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from anthropic.types.shared import ErrorResponse
from pydantic import BaseModel, TypeAdapter

from tests.server.conftest import Bench

_EVENT: TypeAdapter[RawMessageStreamEvent] = TypeAdapter(RawMessageStreamEvent)


@asynccontextmanager
async def anthropic_client(bench: Bench, api_key: str = "none") -> AsyncGenerator[AsyncAnthropic]:
    """The official client, over a socket."""
    async with bench.served() as address, AsyncAnthropic(base_url=address, api_key=api_key, max_retries=0) as client:
        yield client


def checked_events(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream. Each has the name that its data has as the type, and is exactly one of Anthropic's."""
    events: list[dict[str, Any]] = []
    for block in body.decode().split("\n\n")[:-1]:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] == "error":
            checked(ErrorResponse, event)
        elif event["type"] != "ping":
            _same(_EVENT.validate_json(data.removeprefix("data: "), strict=True), event)
        events.append(event)
    return events


def checked(kind: type[BaseModel], reply: dict[str, Any]) -> dict[str, Any]:
    _same(kind.model_validate_json(json.dumps(reply), strict=True), reply)
    return reply


def checked_message(reply: dict[str, Any]) -> dict[str, Any]:
    return checked(Message, reply)


def checked_count(reply: dict[str, Any]) -> int:
    return checked(MessageTokensCount, reply)["input_tokens"]


def _same(parsed: BaseModel, sent: dict[str, Any]) -> None:
    """Anthropic's classes allow unknown fields, so this looks for them."""
    assert parsed.model_dump(exclude_unset=True, mode="json") == sent
    assert not list(_unknown(parsed)), list(_unknown(parsed))


def _unknown(value: object) -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in _unknown(item)]
    if not isinstance(value, BaseModel):
        return []
    inner = [name for field in type(value).model_fields for name in _unknown(getattr(value, field))]
    return [*(value.model_extra or ()), *inner]


def message(**fields: Any) -> dict[str, Any]:
    """A request's body."""
    return {"max_tokens": 32, "messages": [{"role": "user", "content": "Hi"}], **fields}
