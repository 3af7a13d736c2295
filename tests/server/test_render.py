"""POST /v1/chat/completions/render and /tokenize show the prompt that a chat request gives to the model."""

from __future__ import annotations

from typing import Any

import pytest

from jamba_server.server.demo import demo_folder
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import Bench, MakeBench

CHAT, RENDER, TOKENIZE = "/v1/chat/completions", "/v1/chat/completions/render", "/tokenize"
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
# The fields of requests. /tokenize has all of them, too.
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"messages": HI},
    "tools": {"messages": HI, "tools": [TOOL, {"type": "web_search"}]},
    "a result": {
        "messages": [
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "r", "tool_call_id": "c"},
        ],
        "tools": [TOOL],
    },
    "documents": {"messages": HI, "documents": [{"title": "T", "text": "a text"}]},
    "variables": {"messages": HI, "chat_template_kwargs": {"generation_preamble": "Sure,"}},
    "an end": {"messages": [*HI, {"role": "assistant", "content": "Yes"}], "add_generation_prompt": False},
    "a continued message": {"messages": [*HI, {"role": "assistant", "content": "Yes"}], "continue_final_message": True},
    "no thoughts": {"messages": HI, "reasoning_effort": "none"},
    "another template": {"messages": HI, "chat_template": "{{ messages[0].content }}<think>"},
}


@pytest.fixture
def jamba(make_bench: MakeBench) -> Bench:
    template = (demo_folder() / "chat_template.jinja").read_text(encoding="utf-8")
    return make_bench(template=template, allow_request_templates=True)


@pytest.mark.parametrize("name", REQUESTS)
async def test_the_preview_is_the_prompt(jamba: Bench, tokenizer: Tokenizer, name: str) -> None:
    body = REQUESTS[name]
    async with jamba.http() as http:
        preview = await http.post(RENDER, json=body)
        assert preview.status_code == 200, preview.text
        assert jamba.engine.requests == []
        tokenized = await http.post(TOKENIZE, json=body)
        assert (await http.post(CHAT, json=body)).status_code == 200
    [request] = jamba.engine.requests
    shown = preview.json()
    assert shown["token_ids"] == tokenized.json()["tokens"] == request.prompt
    assert shown["prompt"] == tokenizer.decode(request.prompt, skip_special_tokens=False).removeprefix(
        "" if "<|bom|>" in shown["prompt"] else "<|startoftext|>"
    )
    assert (shown["count"], shown["max_model_len"]) == (len(request.prompt), jamba.engine.info.max_model_len)
    assert tuple(shown["save_positions"]) == request.save_positions
    assert shown["opens_reasoning"] == (name == "another template")
    assert preview.headers.get("x-warning") == tokenized.headers.get("x-warning")
    assert ("web_search" in preview.headers.get("x-warning", "")) == (name == "tools")


async def test_the_fields_of_the_template_need_messages(jamba: Bench) -> None:
    async with jamba.http() as http:
        for name, value in (
            ("tools", [TOOL]),
            ("documents", [{"text": "a"}]),
            ("continue_final_message", True),
            ("add_generation_prompt", False),
            ("chat_template", "x"),
            ("chat_template_kwargs", {"a": 1}),
            ("reasoning_effort", "none"),
        ):
            error = (await http.post(TOKENIZE, json={"prompt": "Hi", name: value})).json()["error"]
            assert error["param"] == name
            assert "only allowed with `messages`" in error["message"]
        empty = {"prompt": "Hi", "tools": [], "documents": None, "chat_template_kwargs": {}, "chat_template": ""}
        assert (await http.post(TOKENIZE, json=empty)).status_code == 200


@pytest.mark.parametrize("path", [CHAT, RENDER, TOKENIZE])
async def test_templates_of_requests_are_behind_a_flag(bench: Bench, jamba: Bench, path: str) -> None:
    async with bench.http() as http:
        error = (await http.post(path, json={"messages": HI, "chat_template": "x"})).json()["error"]
        assert error["param"] == "chat_template"
        assert "--allow-request-templates" in error["message"]
    async with jamba.http() as http:
        error = (await http.post(path, json={"messages": HI, "chat_template": "{{"})).json()["error"]
        assert error["param"] == "chat_template"
        assert "line 1" in error["message"]


@pytest.mark.parametrize("path", [RENDER, TOKENIZE])
async def test_errors_of_a_preview(bench: Bench, path: str) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"tools": [TOOL]}, "tools"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"model": "another"}, "model"),
    ]
    async with bench.http() as http:
        for fields, param in cases:
            reply = await http.post(path, json={"messages": HI, **fields})
            assert reply.status_code in (400, 404)
            assert reply.json()["error"]["param"] == param
