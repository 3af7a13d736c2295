"""/v1/messages with Anthropic's client, on an engine that says what the test has written down."""

from __future__ import annotations

from typing import Any

from tests.server.anthropic_api import anthropic_client, checked_events, message
from tests.server.conftest import HELLO, Bench

USER: Any = [{"role": "user", "content": "Hi"}]


async def test_the_official_client_gets_a_message(bench: Bench) -> None:
    async with anthropic_client(bench) as client:
        reply = await client.messages.create(model="jamba", max_tokens=32, messages=USER)
    assert reply.id.startswith("msg_")
    assert (reply.type, reply.role, reply.model) == ("message", "assistant", "jamba")
    [block] = reply.content
    assert block.type == "text" and block.text == HELLO.removeprefix(" ")
    assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)


async def test_a_stream_has_anthropics_events_in_order(bench: Bench) -> None:
    async with bench.http() as http:
        reply = await http.post("/v1/messages", json=message(stream=True))
    events = checked_events(reply.content)
    kinds = [event["type"] for event in events]
    deltas = kinds.count("content_block_delta")
    assert kinds == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert deltas > 1
