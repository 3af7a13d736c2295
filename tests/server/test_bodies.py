"""Bodies on their way: a deadline for the whole, and a limit on the bytes of all of them together."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from jamba_server.engine.errors import ConfigError, Overloaded
from jamba_server.server.config_sources import load_config
from jamba_server.server.http.limits.bodies import BodyMemory, BodyShare
from jamba_server.server.http.middleware import JsonBody
from tests.server.conftest import Bench, MakeBench, chat

CHAT = "/v1/chat/completions"


def scope_of() -> dict[str, Any]:
    return {
        "type": "http",
        "method": "POST",
        "path": "/a",
        "headers": [(b"content-type", b"application/json")],
        "app": Starlette(routes=[Route("/a", lambda request: Response(), methods=["POST"])]),
    }


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()


async def no_send(message: Message) -> None: ...


async def test_a_body_that_trickles_has_a_deadline_for_the_whole() -> None:
    """Each part comes in time, and yet the body ends: a client cannot hold its memory for ever."""
    memory, sent = BodyMemory(10**6), 0

    async def receive() -> Message:
        nonlocal sent
        sent += 1
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b" ", "more_body": True}

    body = JsonBody(app, max_bytes=10**6, memory=memory, whole_timeout=0.01, body_timeout=30.0)
    with pytest.raises(HTTPException, match=r"not complete after 0\.01 s") as caught:
        await body(scope_of(), receive, no_send)
    assert caught.value.status_code == 408
    assert sent > 1
    assert memory.total == 0


def test_all_bodies_together_have_a_limit() -> None:
    memory = BodyMemory(100)
    with BodyShare(memory) as first, BodyShare(memory) as second:
        first.grow(60)
        with pytest.raises(Overloaded, match=r"60 bytes together; the limit \(--body-memory-bytes\) is 100"):
            second.grow(41)
        second.grow(40)
        assert memory.total == 100
    assert memory.total == 0


async def test_a_body_beyond_the_limit_gets_503_and_the_others_go_on(make_bench: MakeBench) -> None:
    small = json.dumps(chat()).encode()
    bench = make_bench(body_memory_bytes=2000, max_body_bytes=2000)
    memory: BodyMemory = bench.app.state.services.edge.bodies
    async with bench.http() as http:
        memory.take(1500)  # as if other requests were sending theirs
        refused = await http.post(CHAT, json=chat(user="x" * 600))
        served = await http.post(CHAT, content=small, headers={"content-type": "application/json"})
        memory.give(1500)
        later = await http.post(CHAT, json=chat(user="x" * 600))
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert refused.json()["error"]["code"] == "overloaded"
    assert (served.status_code, later.status_code) == (200, 200)
    assert memory.total == 0


async def test_a_body_counts_until_its_request_has_ended(bench: Bench) -> None:
    memory: BodyMemory = bench.app.state.services.edge.bodies
    bench.engine.limit = 0
    async with bench.http() as http:
        reply = asyncio.create_task(http.post(CHAT, json=chat()))
        await bench.engine.stalled.wait()
        assert memory.total > 0
        bench.engine.resume.set()
        assert (await reply).status_code == 200
    assert memory.total == 0


def test_one_body_must_fit_into_the_memory_for_all() -> None:
    with pytest.raises(ConfigError, match="body_memory_bytes is 1024; it must be at least max_body_bytes"):
        load_config({"body_memory_bytes": "1K"}, {})
