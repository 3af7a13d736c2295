"""Function calls, structured text and reasoning of responses, through the official client."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from openai import pydantic_function_tool
from pydantic import BaseModel

from jamba_server.server.demo import demo_folder
from tests.server.test_responses import events_of
from tests.server.test_tools import REASONING_TEMPLATE, Model, serve

FUNCTION = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
NAMESPACE = {
    "type": "namespace",
    "name": "crm",
    "description": "Customers.",
    "tools": [{"type": "function", "name": "find", "parameters": {"type": "object"}}],
}
TOOLS: Any = [FUNCTION, NAMESPACE]
CALLS = (
    '<tool_calls>[\n    {"name": "weather", "arguments": {"city": "Rome"}},\n'
    '    {"name": "crm__find", "arguments": {}}\n]</tool_calls>'
)
HERMES_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
async def jamba(tmp_path: Path) -> AsyncGenerator[Model]:
    """The demonstration's template writes tools and calls as Jamba 1.5 does."""
    async with serve(tmp_path, "jamba-1.5", (demo_folder() / "chat_template.jinja").read_text()) as model:
        yield model


@pytest.fixture
async def reasoner(tmp_path: Path) -> AsyncGenerator[Model]:
    async with serve(tmp_path, "reasoning", REASONING_TEMPLATE) as model:
        yield model


def output_of(call_id: str, text: str) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": text}


async def test_calls_and_their_results(jamba: Model) -> None:
    jamba.say(f" Let me see.{CALLS}")
    async with jamba.bench.openai() as client:
        response = await client.responses.create(model="jamba", input="a", tools=TOOLS)
        first = jamba.bench.engine.requests[0].prompt + jamba.tokens(f" Let me see.{CALLS}")
        message, *calls = response.output
        assert (response.output_text, message.type, response.status) == ("Let me see.", "message", "completed")
        found = [(c.namespace, c.name, c.arguments, c.call_id) for c in calls if c.type == "function_call"]
        assert [call[:3] for call in found] == [(None, "weather", '{"city": "Rome"}'), ("crm", "find", "{}")]
        results: Any = [output_of(call[3], text) for call, text in zip(found, ("18C", "none"), strict=True)]
        jamba.say(" warm")
        last = await client.responses.create(
            model="jamba", input=results, tools=TOOLS, previous_response_id=response.id
        )
        assert last.output_text == "warm"
        by_id = jamba.prompt
        history: Any = [{"role": "user", "content": "a"}, *(item.to_dict() for item in response.output), *results]
        await client.responses.create(model="jamba", input=history, tools=TOOLS, store=False)
    assert by_id == jamba.prompt
    reply = f"<|bom|><|assistant|> Let me see.{CALLS}<|eom|>"
    assert by_id.endswith(f"{reply}<|bom|><|tool|> 18C<|eom|><|bom|><|tool|> none<|eom|><|bom|><|assistant|>")
    assert '"name": "crm__find"' in by_id
    # The first prompt and its reply are the beginning of the second prompt, so all of it is found in the cache.
    assert jamba.bench.engine.requests[0].prompt[: len(first)] == first


async def test_the_events_of_calls(jamba: Model) -> None:
    jamba.say(f" Let me see.{CALLS}")
    async with jamba.bench.http() as http:
        body = {"input": "a", "tools": TOOLS, "stream": True}
        events = events_of((await http.post("/v1/responses", json=body)).content)
    added = [event["item"]["type"] for event in events if event["type"] == "response.output_item.added"]
    assert added == ["message", "function_call", "function_call"]
    for index, arguments in ((1, '{"city": "Rome"}'), (2, "{}")):
        own = [event for event in events if event.get("output_index") == index]
        deltas = [event["delta"] for event in own if event["type"] == "response.function_call_arguments.delta"]
        [done] = [event for event in own if event["type"] == "response.function_call_arguments.done"]
        assert "".join(deltas) == arguments == done["arguments"]
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["response"]["output"] == items


async def test_choices_of_tools_become_grammars(jamba: Model) -> None:
    jamba.say(CALLS)
    choices: list[Any] = ["none", "required", {"type": "function", "name": "find"}]
    async with jamba.bench.openai() as client:
        for choice in choices:
            await client.responses.create(model="jamba", input="a", tools=TOOLS, tool_choice=choice)
    none, required, named = (request.params.grammar for request in jamba.bench.engine.requests)
    assert not none
    assert [name in required for name in ("weather", "crm__find")] == [True, True]
    assert [name in named for name in ("weather", "crm__find")] == [False, True]
    assert ["call)*" in grammar or "block)*" in grammar for grammar in (required, named)] == [True, False]


class City(BaseModel):
    name: str
    people: int


async def test_a_text_is_parsed(jamba: Model) -> None:
    jamba.say('{"name":"Rome","people":3}')
    async with jamba.bench.openai() as client:
        response = await client.responses.parse(model="jamba", input="a", text_format=City)
        assert response.output_parsed == City(name="Rome", people=3)
        assert response.text is not None
        assert response.text.format is not None
        assert response.text.format.type == "json_schema"
        async with client.responses.stream(model="jamba", input="a", text_format=City) as stream:
            final = await stream.get_final_response()
        assert final.output_parsed == City(name="Rome", people=3)
        await client.responses.create(model="jamba", input="a", text={"format": {"type": "json_object"}})
        await client.responses.create(model="jamba", input="a", text={"format": {"type": "text"}})
    schema, same, any_object, text = (request.params.grammar for request in jamba.bench.engine.requests)
    assert "people" in schema
    assert schema == same
    assert any_object
    assert any_object != schema
    assert not text


async def test_arguments_are_parsed(jamba: Model) -> None:
    jamba.say('<tool_calls>[\n    {"name": "City", "arguments": {"name": "Rome", "people": 3}}\n]</tool_calls>')
    tool: Any = {"type": "function", **pydantic_function_tool(City)["function"]}
    async with jamba.bench.openai() as client:
        response = await client.responses.parse(model="jamba", input="a", tools=[tool])
    [call] = response.output
    assert call.type == "function_call"
    assert call.parsed_arguments == {"name": "Rome", "people": 3}


async def test_a_schema_that_cannot_be_enforced_is_named(jamba: Model) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    text = {"format": {"type": "json_schema", "name": "s", "schema": schema, "strict": True}}
    async with jamba.bench.http() as http:
        reply = await http.post("/v1/responses", json={"input": "a", "text": text})
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert "uniqueItems" in error["message"]
    assert error["param"].startswith("text.format.schema")


@pytest.mark.parametrize("kept", ["content", "encrypted_content"])
async def test_reasoning_in_a_loop_of_calls(reasoner: Model, kept: str) -> None:
    """Codex sends only `encrypted_content` back. The reasoning is in the next prompt all the same."""
    reasoner.say(f"I must\nask.\n</think>\n\n{HERMES_CALL}")
    fields: Any = {"model": "jamba", "tools": [FUNCTION], "store": False, "include": ["reasoning.encrypted_content"]}
    async with reasoner.bench.openai() as client:
        response = await client.responses.create(input="a", **fields)
        reasoning, call = (item.to_dict() for item in response.output)
        assert reasoning["content"] == [{"type": "reasoning_text", "text": "I must\nask."}]
        assert response.usage is not None
        assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
        sent_back = {"type": "reasoning", "summary": [], kept: reasoning[kept]}
        items: Any = [{"role": "user", "content": "a"}, sent_back, call, output_of(str(call["call_id"]), "18C")]
        await client.responses.create(input=items, **fields)
    assert f"<think>\nI must\nask.\n</think>\n\n{HERMES_CALL}<|im_end|>\n" in reasoner.prompt


async def test_the_effort_none_closes_the_thoughts(reasoner: Model) -> None:
    reasoner.say("yes")
    async with reasoner.bench.openai() as client:
        response = await client.responses.create(model="jamba", input="a", reasoning={"effort": "none"})
    assert [item.type for item in response.output] == ["message"]
    assert reasoner.prompt.rstrip().endswith("</think>")


async def test_one_form_of_the_text_may_be_asked_for(jamba: Model) -> None:
    jamba.say("yes")
    regex = {"structured_outputs": {"regex": "yes|no"}}
    async with jamba.bench.http() as http:
        reply = await http.post("/v1/responses", json={"input": "a", **regex})
        both = await http.post(
            "/v1/responses", json={"input": "a", "text": {"format": {"type": "json_object"}}, **regex}
        )
    assert reply.status_code == 200, reply.text
    assert "yes|no" in jamba.params.grammar
    assert both.json()["error"]["param"] == "text.format"
    assert "send one form only" in both.json()["error"]["message"]
