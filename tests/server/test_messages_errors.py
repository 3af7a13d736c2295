"""Errors below /v1/messages have Anthropic's form, whichever part of the server finds them."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types.shared import ErrorResponse

from jamba_server.engine.errors import EngineDead, EngineFailed, EngineLoading, Overloaded
from tests.server.anthropic_api import anthropic_client, checked, checked_events, message
from tests.server.conftest import Bench, Ids, MakeBench
from tests.server.fake_engine import FakeEngine, updates_of

TOOL = {"name": "f", "input_schema": {"type": "object"}}


def error_of(reply: httpx.Response, type_: str) -> str:
    body = reply.json()
    if type_ == "request_too_large":  # documented by Anthropic, but not among the client's types
        assert set(body) == {"type", "error", "request_id"} and set(body["error"]) == {"type", "message"}
    else:
        checked(ErrorResponse, body)
    assert body["error"]["type"] == type_
    assert body["request_id"] == reply.headers["request-id"] == reply.headers["x-request-id"]
    return body["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"max_tokens": "8"}, 'max_tokens is "8"; it must be a whole number'),
        ({"max_tokens": -1}, "max_tokens is -1; it must be at least 0"),
        ({"temperature": 3}, "temperature is 3; it must be at most 2"),
        ({"messages": []}, "messages has 0 items; it needs at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role is \"tool\"; it must be 'user'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"data": "iVBOR"}}]}]},
            "messages.0.content.0 has the type 'image', but the model reads only text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]},
            "messages.0.content.0 has the type 'document', but the model reads only text",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "image"}]}],
                    }
                ]
            },
            "messages.0.content.0.content.0 has the type 'image', but the model reads only text",
        ),
        ({"system": [{"type": "image"}]}, "system.0 has the type 'image', but the model reads only text"),
        (
            {"messages": [{"role": "user", "content": 7}]},
            "messages.0.content is 7; it must be a string or a list of blocks",
        ),
        ({"messages": [{"role": "user", "content": [7]}]}, "messages.0.content.0 is 7; it must be a JSON object"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0 has the type (none)"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema is required"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, 'tools.0.name is "a b"'),
        ({"tools": [TOOL, TOOL]}, "tools has the tool 'f' twice"),
        ({"tool_choice": {"type": "any"}}, "tool_choice has the type 'any', but `tools` has no custom tool"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}},
            "tool_choice names the tool 'g', which is not a custom tool in `tools`",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name is required"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens is required"),
        (
            {
                "output_format": {"type": "json_schema", "schema": {}},
                "output_config": {"format": {"type": "json_schema", "schema": {}}},
            },
            "output_format is another name of `output_config.format`; send one of them",
        ),
        ({"stop": ["x"]}, "stop is a field of /v1/chat/completions"),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers is a field of Anthropic that would change the answer"),
        ({"temprature": 1}, "temprature is not a field of this API; did you mean `temperature`?"),
    ],
)
async def test_bad_fields_are_named(bench: Bench, fields: dict[str, Any], why: str) -> None:
    async with bench.http() as http:
        reply = await http.post("/v1/messages", json=message(**fields))
    assert reply.status_code == 400
    assert why in error_of(reply, "invalid_request_error")


async def test_errors_of_the_middleware(make_bench: MakeBench) -> None:
    bench = make_bench(api_key=("secret",), max_body_bytes=1000)
    headers = {"x-api-key": "secret", "content-type": "application/json"}
    async with bench.http(headers=headers) as http:
        for path in ("/v1/messages", "/v1/messages/count_tokens", "/v1/messages/nothing"):
            reply = await http.post(path, json=message(), headers={"x-api-key": "wrong"})
            assert reply.status_code == 401
            assert "API key" in error_of(reply, "authentication_error")
        reply = await http.post("/v1/messages", content=json.dumps(message(system="x" * 1000)))
        assert reply.status_code == 413
        error_of(reply, "request_too_large")
        for body in (b'{"max_tokens": 1,', b'"\xff"', b"[" * 100):
            reply = await http.post("/v1/messages", content=body)
            assert reply.status_code == 400
            error_of(reply, "invalid_request_error")
        reply = await http.post("/v1/messages", content=b"x", headers={"content-type": "text/plain"})
        assert reply.status_code == 415
        error_of(reply, "invalid_request_error")
        reply = await http.post("/v1/messages", json=message(model="claude"))
        assert reply.status_code == 404
        assert "claude" in error_of(reply, "not_found_error")
        reply = await http.post("/v1/messages/batches", json={})
        assert reply.status_code == 404
        error_of(reply, "not_found_error")
        reply = await http.get("/v1/messages/")
        assert reply.status_code == 405
        error_of(reply, "invalid_request_error")


async def test_errors_behind_a_proxys_prefix(make_bench: MakeBench) -> None:
    async with make_bench(root_path="/llm").http() as http:
        for path in ("/llm/v1/messages", "/v1/messages"):
            error_of(await http.post(path, json={}), "invalid_request_error")
        assert "param" in (await http.post("/llm/v1/chat/completions", json={})).json()["error"]
        assert "param" in (await http.post("/v1/messages2", json={})).json()["error"]


@pytest.mark.parametrize(
    ("refusal", "status", "type_", "kind"),
    [
        (Overloaded("The queue is full.", retry_after=3), 529, "overloaded_error", anthropic.APIStatusError),
        (EngineLoading("still loading"), 503, "api_error", anthropic.InternalServerError),
        (EngineDead("It died."), 503, "api_error", anthropic.InternalServerError),
        (EngineFailed("It failed."), 500, "api_error", anthropic.InternalServerError),
        (RuntimeError("a bug"), 500, "api_error", anthropic.InternalServerError),
    ],
)
async def test_errors_of_the_engine(
    bench: Bench, engine: FakeEngine, refusal: Any, status: int, type_: str, kind: type[anthropic.APIStatusError]
) -> None:
    engine.refusal = refusal
    async with bench.http() as http:
        for stream in (False, True):
            reply = await http.post("/v1/messages", json=message(stream=stream))
            assert reply.status_code == status
            error_of(reply, type_)
            assert reply.headers.get("retry-after") == ("3" if status == 529 else reply.headers.get("retry-after"))
    async with anthropic_client(bench) as client:
        with pytest.raises(kind) as caught:
            await client.messages.create(model="jamba", max_tokens=8, messages=[{"role": "user", "content": "Hi"}])
    assert caught.value.status_code == status
    assert caught.value.type == type_
    assert caught.value.request_id


async def test_an_error_after_the_beginning_of_a_stream_is_an_event(make_bench: MakeBench, ids: Ids) -> None:
    def script(request: Any) -> Any:
        yield from updates_of(request, ids(" hello the world"), None, None)  # pyright: ignore[reportArgumentType]
        yield EngineFailed("It failed.")

    bench = make_bench(engine=FakeEngine(script))
    async with bench.http() as http:
        events = checked_events((await http.post("/v1/messages", json=message(stream=True))).content)
    assert [event["type"] for event in events][:3] == ["message_start", "ping", "content_block_start"]
    assert events[-1]["type"] == "error"
    assert events[-1]["error"] == {"type": "api_error", "message": "It failed."}
    async with anthropic_client(bench) as client:
        with pytest.raises(anthropic.APIStatusError, match="It failed"):
            async with client.messages.stream(
                model="jamba", max_tokens=8, messages=[{"role": "user", "content": "Hi"}]
            ) as stream:
                await stream.get_final_message()


async def test_no_error_echoes_much_of_the_request(bench: Bench) -> None:
    long = "x" * 5000
    async with bench.http() as http:
        for fields in (
            {"model": long},
            {long: 1, "stop": [long]},
            {"tool_choice": {"type": long}},
            {"system": [{"type": long}]},
        ):
            reply = await http.post("/v1/messages", json=message(**fields))
            assert reply.status_code in (400, 404)
            assert len(reply.content) < 1500
