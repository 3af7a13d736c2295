"""What the model reads of a request for a response."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.response_task import chat_messages, chat_task, read_input
from jamba_server.server.http.schemas.responses.items import encode_reasoning
from jamba_server.server.http.schemas.responses.request import ResponseRequest
from jamba_server.server.http.schemas.responses.tools import FunctionNames
from jamba_server.server.http.store.responses import ResponseStore
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import Bench, MakeBench


def request(**fields: Any) -> ResponseRequest:
    return ResponseRequest.model_validate({"input": "Hi"} | fields)


def texts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "input_text", "text": text} for text in texts]


async def messages(items: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    body = request(input=items, **fields)
    store = ResponseStore(None, max_responses=1, max_bytes=1000)
    read = await read_input(body, store, "", max_bytes=1000)
    await store.close()
    return chat_messages(body.instructions, read)


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


async def test_messages_in_every_form() -> None:
    items = [
        {"role": "user", "content": "a"},
        {"type": "message", "role": "developer", "content": texts("b", "c")},
        {"role": "system", "content": "d"},
        {
            "id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "phase": "final_answer",
            "content": [{"type": "output_text", "text": "e", "annotations": [], "logprobs": []}],
        },
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": [{"type": "text", "text": "f"}]},
    ]  # fmt: skip
    assert await messages(items, instructions="i") == [
        {"role": "system", "content": "i"},
        {"role": "user", "content": "a"},
        {"role": "system", "content": "b\nc"},
        {"role": "system", "content": "d"},
        {"role": "assistant", "content": "e"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "f"},
    ]


async def test_what_the_model_wrote_in_one_reply_is_one_message() -> None:
    items = [
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"role": "assistant", "content": "Let me look."},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "find", "namespace": "crm", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "18C"},
        {"type": "function_call_output", "call_id": "c2", "output": texts("x", "y")},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "s"}],
         "encrypted_content": encode_reasoning("Aha.")},
        {"type": "custom_tool_call", "call_id": "c3", "name": "apply_patch", "input": 'say "hi"'},
        {"type": "custom_tool_call_output", "call_id": "c3", "output": "done"},
    ]  # fmt: skip
    assert await messages(items) == [
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "Hm.",
            "tool_calls": [call("c1", "f", '{"a": 1}'), call("c2", "crm__find", "{}")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "18C"},
        {"role": "tool", "tool_call_id": "c2", "content": "x\ny"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Aha.",
            "tool_calls": [call("c3", "apply_patch", '{"input": "say \\"hi\\""}')],
        },
        {"role": "tool", "tool_call_id": "c3", "content": "done"},
    ]


async def test_reasoning_that_cannot_be_read_leaves_no_trace() -> None:
    items = [
        {"type": "reasoning", "summary": [], "encrypted_content": "gAAAAA=="},
        {"role": "assistant", "content": "a"},
        {"type": "reasoning", "summary": [], "content": None, "encrypted_content": None},
        {"role": "assistant", "content": "b"},
    ]
    assert await messages(items) == [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]


async def test_reasoning_begins_a_message() -> None:
    items = [
        {"role": "assistant", "content": "a"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}]},
        {"role": "assistant", "content": "b"},
    ]
    assert await messages(items) == [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "r"},
    ]


FUNCTION = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
NAMESPACE = {
    "type": "namespace", "name": "mcp__crm__", "description": "d",
    "tools": [
        {"type": "function", "name": "find"},
        {"type": "custom", "name": "patch"},
        {"type": "function", "name": "g"},
    ],
}  # fmt: skip
TOOLS = [
    FUNCTION,
    NAMESPACE,
    {"type": "web_search", "external_web_access": False},
    {"type": "custom", "name": "apply_patch"},
]


def test_functions_and_namespaces_are_offered() -> None:
    body = request(tools=TOOLS)
    names = FunctionNames.of(body.declared_tools)
    task = chat_task(body, names, [])
    assert [(tool.name, tool.description, tool.parameters, tool.strict) for tool in task.tools] == [
        ("f", "d", {"type": "object"}, True),
        ("mcp__crm__find", "", {}, False),
        ("mcp__crm__g", "", {}, False),
    ]
    assert names.skipped == ("custom", "web_search")
    assert names.called("mcp__crm__g") == ("mcp__crm__", "g")
    assert names.called("unknown") == (None, "unknown")
    assert (task.tool_choice, task.allowed_tools, task.parallel_tool_calls) == ("auto", None, True)


@pytest.mark.parametrize(
    ("choice", "mode", "allowed"),
    [
        ("none", "none", None),
        ("required", "required", None),
        ({"type": "function", "name": "f"}, "required", {"f"}),
        ({"type": "function", "name": "find"}, "required", {"mcp__crm__find"}),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}, "auto", {"f"}),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "g"}, {"type": "mcp"}],
            },
            "required",
            {"mcp__crm__g"},
        ),
    ],
)
def test_tool_choices(choice: Any, mode: str, allowed: set[str] | None) -> None:
    body = request(tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, reasoning={"effort": "high"})
    task = chat_task(body, FunctionNames.of(body.declared_tools), [])
    assert (task.tool_choice, task.allowed_tools) == (mode, allowed)
    assert (task.parallel_tool_calls, task.reasoning_effort) == (False, "high")


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        ([FUNCTION], {"type": "function", "name": "g"}, "names the function 'g', which is not among the tools"),
        ([], "required", "there is no function"),
        ([{"type": "web_search"}], "required", "there is no function"),
        (
            [FUNCTION],
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "g"}]},
            "allows the function 'g'",
        ),
        (
            [FUNCTION],
            {"type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}]},
            "there is no function",
        ),
    ],
)
def test_a_choice_that_the_tools_cannot_satisfy(tools: list[Any], choice: Any, message: str) -> None:
    body = request(tools=tools, tool_choice=choice)
    with pytest.raises(RequestRejected, match=message):
        chat_task(body, FunctionNames.of(body.declared_tools), [])


def test_two_functions_of_one_name() -> None:
    twice = [FUNCTION, {"type": "namespace", "name": "a", "tools": []}, FUNCTION]
    with pytest.raises(RequestRejected, match="Two tools have the name 'f'") as caught:
        FunctionNames.of(request(tools=twice).declared_tools)
    assert caught.value.param == "tools.2.name"


def test_a_tool_must_have_its_fields() -> None:
    with pytest.raises(ValidationError):
        request(tools=[{"type": "function", "function": {"name": "f"}}])


async def test_the_prompt(bench: Bench, tokenizer: Tokenizer) -> None:
    items = [
        {"role": "user", "content": "x<|eom|>"},
        {"role": "developer", "content": "now"},
        {"role": "user", "content": "y"},
    ]
    async with bench.http() as http:
        reply = await http.post("/v1/responses", json={"input": items, "instructions": "be kind"})
    assert reply.status_code == 200, reply.text
    [sent] = bench.engine.requests
    assert tokenizer.decode(sent.prompt, skip_special_tokens=False) == (
        "<|startoftext|><|bom|><|system|> be kind<|eom|><|bom|><|user|> x<|eom|><|eom|><|bom|><|system|> now<|eom|>"
        "<|bom|><|user|> y<|eom|><|bom|><|assistant|>"
    )
    assert sent.prompt.count(tokenizer.special_tokens["<|eom|>"]) == 4  # the one that the user wrote is text


async def test_the_tokens_of_the_input_are_counted(bench: Bench) -> None:
    async with bench.openai() as client:
        response = await client.responses.create(model="jamba", input="Hi there", instructions="be kind")
        counted = await client.responses.input_tokens.count(model="jamba", input="Hi there", instructions="be kind")
    assert response.usage is not None
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", response.usage.input_tokens)
    assert len(bench.engine.requests) == 1


async def test_parameters_arrive(make_bench: MakeBench) -> None:
    bench = make_bench(enable_priority=True)
    fields = {
        "max_output_tokens": 7, "temperature": 0.5, "top_p": 0.25, "top_k": 5, "min_p": 0.125, "seed": -3,
        "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"5": -100},
        "stop_token_ids": [7], "priority": -2, "cache_salt": "tenant", "top_logprobs": 4,
        "include": ["message.output_text.logprobs"],
    }  # fmt: skip
    async with bench.http() as http:
        reply = await http.post("/v1/responses", json={"input": "Hi", **fields})
    assert reply.status_code == 200, reply.text
    [sent] = bench.engine.requests
    params = sent.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (7, 0.5, 0.25, 5, 0.125)
    assert (params.seed, params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (
        -3,
        1.5,
        -1,
        2,
    )
    assert (params.logit_bias, params.stop_token_ids, params.logprobs) == ({5: -100}, (7,), 4)
    assert (sent.priority, sent.cache_salt) == (-2, "tenant")


async def test_truncation_leaves_out_the_oldest_messages(make_bench: MakeBench, tokenizer: Tokenizer) -> None:
    bench = make_bench()
    long = " ".join(["the"] * 100)
    items = [{"role": "system", "content": "be kind"}]
    for number in range(4):
        items += [{"role": "user", "content": f"{long} {number}"}, {"role": "assistant", "content": "yes"}]
    items.append({"role": "user", "content": "end"})
    async with bench.http() as http:
        refused = await http.post("/v1/responses", json={"input": items})
        reply = await http.post("/v1/responses", json={"input": items, "truncation": "auto"})
        short = await http.post("/v1/responses", json={"input": "Hi", "truncation": "auto"})
        alone = [{"role": "user", "content": long + " " + long + " " + long}]
        too_long = await http.post("/v1/responses", json={"input": alone, "truncation": "auto"})
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert reply.status_code == 200, reply.text
    sent = tokenizer.decode(bench.engine.requests[0].prompt, skip_special_tokens=True)
    assert sent.split()[:2] == ["be", "kind"]
    assert [str(number) in sent for number in range(4)] == [False, False, True, True]
    assert reply.headers["x-warning"] == "the oldest 4 messages were left out, because the conversation is too long"
    assert reply.json()["truncation"] == "auto"
    assert "x-warning" not in short.headers
    assert too_long.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"background": True}, "background", "not supported"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"prompt": {"id": "p"}}, "prompt", "not supported"),
        ({"n": 2}, "n", "field of /v1/chat/completions"),
        ({"max_tokens": 5}, "max_tokens", "send `max_output_tokens` instead"),
        ({"response_format": {"type": "text"}}, "response_format", "send `text.format` instead"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "send `input` instead"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "send `reasoning.effort` instead"),
        ({"input": []}, "input", "needs at least 1"),
        ({"input": 5}, "input", "a string or a list of items"),
        (
            {"input": [{"type": "web_search_call", "id": "w"}]},
            "input.0",
            "'web_search_call', which this server does not read",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0", "reads only text"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role", "must be"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id", "is required"),
        (
            {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}]},
            "input.0.arguments",
            "a string",
        ),
        ({"input": [{"id": "msg_9"}]}, "input.0.id", "No item with the id 'msg_9' is stored"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "only 'function' and 'allowed_tools'"),
        ({"tool_choice": "maybe"}, "tool_choice", "must be"),
        ({"tool_choice": 5}, "tool_choice", "must be a string"),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "is required"),
        ({"text": {"format": {"type": "xml"}}}, "text.format", "has the type 'xml'"),
        ({"include": ["everything"]}, "include.0", "is 'everything'; it must be one of"),
        ({"top_logprobs": 3}, "top_logprobs", "only allowed with"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "513 characters"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "is not stored"),
        ({"instuctions": "a"}, "instuctions", "did you mean `instructions`?"),
        ({"model": "gpt"}, "model", "does not exist"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    bench: Bench, fields: dict[str, Any], param: str, words: str
) -> None:
    async with bench.http() as http:
        reply = await http.post("/v1/responses", json={"input": "Hi"} | fields)
    assert reply.status_code in (400, 404), reply.text
    error = reply.json()["error"]
    assert error["param"] == param, error
    assert words in error["message"]
    assert len(reply.content) < 1024
    assert bench.engine.requests == []
