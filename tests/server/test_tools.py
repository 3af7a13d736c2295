"""Tools in /v1/chat/completions, streamed and not, mostly through the official client."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.reply_style import ReplyStyle, find_reply_style
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import TEMPLATE
from tests.server.fake_engine import EOS, says
from tests.server.served_model import (
    CLOCK,
    HERMES_CALL,
    JAMBA_CALL,
    JAMBA_TEMPLATE,
    PARIS,
    REASONING_TEMPLATE,
    TOOLS,
    Model,
    call,
    events,
    hermes,
    jamba,
    serve,
    without_ids,
)
from tests.synthetic_tokenizer import Family, write_tokenizer

__all__ = ["hermes", "jamba"]


# Tool calls -----------------------------------------------------------------------------------------------------------


async def test_thoughts_and_a_call(hermes: Model) -> None:
    hermes.say(f"I ask\nthe service.\n</think>\n\n{HERMES_CALL}")
    message = await hermes.message(tools=TOOLS)
    thoughts = "I ask\nthe service."
    assert without_ids(message) == {
        "role": "assistant", "content": None, "refusal": None, "reasoning": thoughts, "reasoning_content": thoughts,
        "tool_calls": [call("get_weather", PARIS)], "finish_reason": "tool_calls",
    }  # fmt: skip
    assert re.fullmatch("call_[0-9a-f]{24}", message["tool_calls"][0]["id"])


@pytest.mark.parametrize("tags_are_text", [False, True])
async def test_a_call_between_special_tokens(jamba: Model, tags_are_text: bool) -> None:
    jamba.say(f" Well.{JAMBA_CALL}")
    if tags_are_text:
        tokens = jamba.tokenizer.encode(f" Well.{JAMBA_CALL}", add_special_tokens=False)
        jamba.bench.engine.script = says(tokens)
    message = await jamba.message(tools=TOOLS)
    assert without_ids(message)["tool_calls"] == [call("get_weather", PARIS)]
    assert (message["content"], message["finish_reason"]) == ("Well. ", "tool_calls")


async def test_the_official_client_runs_a_tool_and_goes_on(hermes: Model) -> None:
    messages: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
    async with hermes.bench.openai() as client:
        hermes.say(f"think\n</think>\n\n{HERMES_CALL}\n{HERMES_CALL}")
        calls = await streamed_calls(client, messages)
        reply = await client.chat.completions.create(model="jamba", messages=messages, tools=TOOLS)  # pyright: ignore
        message = reply.choices[0].message
        assert message.tool_calls is not None
        assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == calls  # pyright: ignore
        assert calls == [("get_weather", PARIS)] * 2
        assert message.content is None
        assert len({c.id for c in message.tool_calls}) == 2
        messages.append(message)
        messages += [{"role": "tool", "tool_call_id": c.id, "content": "18C"} for c in message.tool_calls]
        hermes.say("</think>18 degrees")
        reply = await client.chat.completions.create(model="jamba", messages=messages, tools=TOOLS)  # pyright: ignore
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("18 degrees", "stop")
    past_calls = f"<|im_start|>assistant\n<think>\nthink\n</think>\n\n{HERMES_CALL}\n{HERMES_CALL}<|im_end|>\n"
    response = "<tool_response>\n18C\n</tool_response>"
    assert f"{past_calls}<|im_start|>user\n{response}\n{response}<|im_end|>\n" in hermes.prompt


async def streamed_calls(client: AsyncOpenAI, messages: list[Any]) -> list[tuple[str, str]]:
    calls: list[list[str]] = []
    stream = await client.chat.completions.create(model="jamba", messages=messages, tools=TOOLS, stream=True)  # pyright: ignore
    async for chunk in stream:
        for piece in chunk.choices[0].delta.tool_calls or []:
            assert piece.function is not None
            if piece.index == len(calls):
                assert piece.id is not None
                calls.append([piece.function.name or "", ""])
            calls[piece.index][1] += piece.function.arguments or ""
    return [(name, arguments) for name, arguments in calls]


async def test_every_choice_has_calls_of_its_own(hermes: Model) -> None:
    hermes.say(f"</think>{HERMES_CALL}", "</think>no", f"</think>{HERMES_CALL}")
    choices = (await hermes.post(tools=TOOLS, n=3)).json()["choices"]
    assert [choice["finish_reason"] for choice in choices] == ["tool_calls", "stop", "tool_calls"]
    first, _, last = (choice["message"].get("tool_calls") for choice in choices)
    assert first[0]["id"] != last[0]["id"]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "nobody", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "clock" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "clock", "argum',
        "<tool_call>",
    ],
)
async def test_what_is_no_call_is_content(hermes: Model, text: str) -> None:
    hermes.say(f"</think>\n\nSee: {text}")
    message = await hermes.message(tools=TOOLS)
    assert (message["content"], message["finish_reason"]) == (f"See: {text}", "stop")
    assert "tool_calls" not in message


async def test_without_tools_the_tags_are_content(hermes: Model) -> None:
    hermes.say(f"</think>{HERMES_CALL}")
    assert (await hermes.message())["content"] == HERMES_CALL
    assert hermes.params.grammar == ""


async def test_a_reply_that_is_cut_off(hermes: Model) -> None:
    hermes.say(f"</think>{HERMES_CALL}{HERMES_CALL}")
    length = len(hermes.tokens(f"</think>{HERMES_CALL}")) + 5
    message = await hermes.message(tools=TOOLS, max_tokens=length)
    assert message["finish_reason"] == "length"
    assert without_ids(message)["tool_calls"] == [call("get_weather", PARIS)]
    assert message["content"].startswith("<tool_call>\n{")


async def test_a_stop_string_inside_of_a_call(hermes: Model) -> None:
    hermes.say(f"</think>{HERMES_CALL}")
    message = await hermes.message(tools=TOOLS, tool_choice="required", stop="ris")
    assert without_ids(message)["tool_calls"] == [call("get_weather", '{"city": "Pa')]
    assert (message["content"], message["finish_reason"]) == (None, "stop")


async def test_tool_choice_none(hermes: Model) -> None:
    hermes.say(f"</think>{HERMES_CALL}")
    message = await hermes.message(tools=TOOLS, tool_choice="none", bad_words=["a"])
    assert (message["content"], message["finish_reason"]) == (HERMES_CALL, "stop")
    assert "get_weather" in hermes.prompt  # the prompts of all turns begin alike
    assert hermes.params.bad_words[-1] == (hermes.tokenizer.tags["<tool_call>"],)
    assert hermes.params.grammar == ""


@pytest.mark.parametrize(
    ("tool_choice", "names"),
    [
        ("auto", {"get_weather", "clock"}),
        ("required", {"get_weather", "clock"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_weather"}}]},
            },
            {"get_weather"},
        ),
    ],
)
async def test_the_grammar_has_the_functions_that_may_be_called(
    hermes: Model, tool_choice: Any, names: set[str]
) -> None:
    hermes.say(f"</think>{HERMES_CALL}")
    message = await hermes.message(tools=TOOLS, tool_choice=tool_choice)
    assert {name for name in ("get_weather", "clock") if name in hermes.params.grammar} == names
    assert ("tool_calls" in message) == ("get_weather" in names)
    assert "clock" in hermes.prompt


async def test_arguments_under_a_grammar_are_streamed_as_they_come(hermes: Model) -> None:
    hermes.say(f"</think>{HERMES_CALL}")
    streamed = events(await hermes.post(tools=TOOLS, tool_choice="required", stream=True))
    pieces = [piece for e in streamed for choice in e["choices"] for piece in choice["delta"].get("tool_calls", [])]
    assert pieces[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert len(pieces) > len(PARIS) / 2
    assert "".join(piece["function"]["arguments"] for piece in pieces) == PARIS


async def test_a_named_function_is_called_once(hermes: Model) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    hermes.say(f"</think>{HERMES_CALL}\n{HERMES_CALL}")
    message = await hermes.message(tools=TOOLS, tool_choice=named)
    assert without_ids(message)["tool_calls"] == [call("get_weather", PARIS)]
    grammar = hermes.params.grammar
    await hermes.message(tools=TOOLS, tool_choice=named, parallel_tool_calls=False)
    assert hermes.params.grammar == grammar
    await hermes.message(tools=TOOLS[:1], tool_choice="required")
    assert hermes.params.grammar != grammar  # several calls


async def test_parts_of_a_schema_that_are_not_enforced_are_named(hermes: Model) -> None:
    hermes.say("</think>a")
    loose = {"properties": {"a": {"oneOf": [{"type": "string"}, {"type": "null"}], "not": {"const": ""}}}}
    hopeless = {"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 1}}, "required": ["a"]}
    functions = [function("loose", parameters=loose), function("hopeless", parameters=hopeless), CLOCK]
    response = await hermes.post(tools=functions)
    assert response.headers["x-warning"] == (
        "the grammar does not enforce these parts of the schemas of functions: "
        "loose #/properties/a/oneOf, loose #/properties/a/not, hopeless #"
    )
    assert "x-warning" not in (await hermes.post(tools=[CLOCK])).headers


async def test_one_call_at_most(jamba: Model) -> None:
    jamba.say(' <tool_calls>[{"name": "clock", "arguments": {}}, {"name": "clock", "arguments": {}}]</tool_calls>')
    message = await jamba.message(tools=TOOLS, parallel_tool_calls=False)
    assert without_ids(message)["tool_calls"] == [call("clock", "{}")]
    assert message["content"] == ', {"name": "clock", "arguments": {}}]</tool_calls>'


async def test_log_probabilities_list_all_tokens(hermes: Model) -> None:
    text = f"a\n</think>\n\n{HERMES_CALL}"
    hermes.say(text)
    fields = {"tools": TOOLS, "logprobs": True, "return_token_ids": True}
    [choice] = (await hermes.post(**fields)).json()["choices"]
    expected = [hermes.tokenizer.token_text(token) for token in [*hermes.tokens(text), EOS]]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == expected
    assert choice["token_ids"] == [*hermes.tokens(text), EOS]
    streamed = events(await hermes.post(**fields, stream=True))
    choices = [choice for e in streamed for choice in e["choices"]]
    assert [entry["token"] for c in choices for entry in (c["logprobs"] or {"content": []})["content"]] == expected
    assert [token for c in choices for token in c.get("token_ids", [])] == choice["token_ids"]


async def test_other_tools_are_left_out_with_a_word(hermes: Model) -> None:
    hermes.say("</think>a")
    custom = {"type": "custom", "custom": {"name": "shell", "format": {"type": "text"}}}
    response = await hermes.post(tools=[custom, {"type": "web_search"}, CLOCK], tool_choice="auto")
    assert response.status_code == 200, response.text
    assert response.headers["x-warning"] == "tools of other types than function were left out: custom, web_search"
    assert "shell" not in hermes.prompt
    error = (await hermes.post(tools=[custom], tool_choice="required")).json()["error"]
    assert error["param"] == "tool_choice"


def function(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [function("f")] * 129}, "tools"),
        ({"tools": [function("f"), function("f")]}, "tools"),
        ({"tools": [function("")]}, "tools.0.function.name"),
        ({"tools": [function("a" * 129)]}, "tools.0.function.name"),
        ({"tools": [function("a b")]}, "tools.0.function.name"),
        ({"tools": [function("f", parameters=[])]}, "tools.0.function.parameters"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{}]}, "tools.0.type"),
        ({"tools": "f"}, "tools"),
        ({"tools": [function("f")], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [function("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [function("f")], "tool_choice": {"type": "custom", "custom": {"name": "g"}}}, "tool_choice.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"documents": [{"text": "a"}] * 257}, "documents"),
        ({"documents": ["a"]}, "documents.0"),
        ({"chat_template_kwargs": {str(n): 1 for n in range(65)}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"unheard_of": 1}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"chat_template": "a"}, "chat_template"),
        ({"best_of": 2}, "best_of"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": {"name": "f"}}, "function_call"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_named(hermes: Model, fields: dict[str, Any], param: str) -> None:
    response = await hermes.post(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], len(response.content) < 1000) == (param, True)
    assert hermes.bench.engine.requests == []


async def test_content_of_a_form_may_look_like_the_beginning_of_a_call(jamba: Model) -> None:
    text = '<tool_calls>[{"name": "clock", "arguments": {oh'
    jamba.say(" x")
    jamba.bench.engine.script = says(jamba.tokenizer.encode(f" {text}", add_special_tokens=False))
    message = await jamba.message(tools=TOOLS, guided_choice=[text, "b"])
    assert (message["content"], message["finish_reason"], "tool_calls" in message) == (text, "stop", False)


# The style of a model -------------------------------------------------------------------------------------------------

BOTH_STYLES = "{{ tools }}<tool_calls><tool_call>"


@pytest.mark.parametrize(
    ("family", "template", "style"),
    [
        ("jamba-1.5", JAMBA_TEMPLATE, ReplyStyle("jamba")),
        ("reasoning", REASONING_TEMPLATE, ReplyStyle("hermes", reasoning=True)),
        ("jamba-1.5", TEMPLATE, ReplyStyle()),
        ("jamba-1.5", BOTH_STYLES, ReplyStyle("jamba")),
        ("reasoning", BOTH_STYLES, ReplyStyle("hermes")),
        ("reasoning", JAMBA_TEMPLATE, ReplyStyle("jamba")),  # the template decides, with tags of ordinary text
        ("reasoning", "<tool_call>", ReplyStyle()),  # a template without tools
    ],
)
def test_the_style_is_found_in_template_and_vocabulary(
    tmp_path: Path, family: Family, template: str, style: ReplyStyle
) -> None:
    write_tokenizer(tmp_path, family)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert find_reply_style(ChatTemplate(template, tokenizer), tokenizer) == style
    assert find_reply_style(None, tokenizer) == ReplyStyle()


async def test_parsers_can_be_chosen(tmp_path: Path) -> None:
    settings: Any = {"tool_call_parser": "none", "reasoning_parser": "none"}
    async with serve(tmp_path, "reasoning", REASONING_TEMPLATE, **settings) as model:
        model.say(f"a</think>{HERMES_CALL}")
        message = await model.message(tools=TOOLS)
        assert (message["content"], "tool_calls" in message) == (f"a</think>{HERMES_CALL}", False)
        error = (await model.post(tools=TOOLS, tool_choice="required")).json()["error"]
        assert error["param"] == "tool_choice"
        assert "--tool-call-parser" in error["message"]
