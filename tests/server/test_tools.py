"""Tools, thoughts and templates in /v1/chat/completions, streamed and not, mostly through the official client."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from openai import AsyncOpenAI

from jamba_server.engine.types import EngineInfo
from jamba_server.server.config import GenerationDefaults, ServerConfig
from jamba_server.server.http.app import create_app
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.reply_style import ReplyStyle, find_reply_style
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import TEMPLATE, Bench
from tests.server.fake_engine import EOS, INFO, FakeEngine, says
from tests.synthetic_tokenizer import Family, write_tokenizer

CHAT = "/v1/chat/completions"
REASONING_TEMPLATE = (Path(__file__).parent.parent / "templates" / "reasoning.jinja").read_text(encoding="utf-8")
# A template in the manner of Jamba 1.7: tools and documents in the system message, calls between special tokens.
JAMBA_TEMPLATE = (
    "<|bom|><|system|> {% if tools %}<tool_definitions>{{ tools | tojson }}</tool_definitions>{% endif %}"
    "{% for document in documents or [] %}{{ document.text }}{% endfor %}{{ style }}<|eom|>"
    "{% for message in messages %}<|bom|><|{{ message.role }}|> {{ message.content }}"
    "{% if message.tool_calls %}<tool_calls>[{% for call in message.tool_calls %}{{ call.function | tojson }}"
    "{% endfor %}]</tool_calls>{% endif %}<|eom|>{% endfor %}"
    "{% if add_generation_prompt %}<|bom|><|assistant|>{% endif %}"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
PARIS = '{"city": "Paris"}'
HERMES_CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
JAMBA_CALL = f' <tool_calls>[\n    {{"name": "get_weather", "arguments": {PARIS}}}\n]</tool_calls>'


class LongEngine(FakeEngine):
    """A fake engine with room for the prompts of templates with tools."""

    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(INFO, max_model_len=8192)


@dataclass
class Model:
    """A served model, and the tokens of its replies."""

    bench: Bench
    tokenizer: Tokenizer

    def tokens(self, text: str) -> list[int]:
        """The tags of the text are special tokens if the vocabulary has them as such."""
        special = self.tokenizer.special_tokens
        pieces = re.split("(</?tool_calls>)", text)
        nested = [
            [special[piece]] if piece in special else self.tokenizer.encode(piece, add_special_tokens=False)
            for piece in pieces
        ]
        return [token for tokens in nested for token in tokens]

    def say(self, *replies: str) -> None:
        self.bench.engine.script = says(*map(self.tokens, replies))
        self.bench.engine.requests.clear()

    @property
    def prompt(self) -> str:
        return self.tokenizer.decode(self.bench.engine.requests[-1].prompt, skip_special_tokens=False)

    @property
    def params(self) -> Any:
        return self.bench.engine.requests[-1].params

    async def post(self, **fields: Any) -> httpx.Response:
        async with self.bench.http() as http:
            return await http.post(CHAT, json={"messages": QUESTION, **fields})

    async def message(self, **fields: Any) -> dict[str, Any]:
        """The message of a reply. The streamed reply must have the same message and the same end."""
        reply = await self.post(**fields)
        assert reply.status_code == 200, reply.text
        [choice] = reply.json()["choices"]
        streamed = await self.post(**fields, stream=True)
        message, finish_reason = collect(events(streamed))
        assert without_ids(message) == without_ids({key: v for key, v in choice["message"].items() if key != "refusal"})
        assert finish_reason == choice["finish_reason"]
        return choice["message"] | {"finish_reason": finish_reason}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", response.text
    return [json.loads(line) for line in lines[:-1]]


def collect(chunks: list[dict[str, Any]]) -> tuple[dict[str, Any], str | None]:
    """Puts a message together from the events of a stream, as OpenAI's guide does."""
    message: dict[str, Any] = {"role": None, "content": ""}
    calls: list[dict[str, Any]] = []
    finish_reason = None
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["role"] = delta.get("role") or message["role"]
            for name in ("content", "reasoning", "reasoning_content"):
                if name in delta:
                    message[name] = message.get(name, "") + delta[name]
            for piece in delta.get("tool_calls", []):
                if piece["index"] == len(calls):
                    assert piece["function"]["arguments"] == ""
                    calls.append(json.loads(json.dumps({key: piece[key] for key in ("id", "type", "function")})))
                else:
                    assert piece.keys() == {"index", "function"}
                    assert piece["index"] == len(calls) - 1
                    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
            finish_reason = choice["finish_reason"] or finish_reason
    if calls:
        message |= {"tool_calls": calls, "content": message["content"] or None}
    return message, finish_reason


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"tool_calls": [call | {"id": ""} for call in message.get("tool_calls", [])]}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "", "type": "function", "function": {"name": name, "arguments": arguments}}


@asynccontextmanager
async def serve(
    folder: Path, family: Family, template: str, defaults: GenerationDefaults | None = None, **settings: Any
) -> AsyncGenerator[Model]:
    write_tokenizer(folder, family)
    tokenizer = Tokenizer.from_folder(folder)
    engine = LongEngine(says([EOS]))
    config = ServerConfig(served_model_name=("jamba",), **settings)
    app = create_app(
        config, engine, tokenizer, ChatTemplate(template, tokenizer), defaults or GenerationDefaults(), demo=False
    )
    async with app.router.lifespan_context(app):
        yield Model(Bench(app, engine), tokenizer)


@pytest.fixture
async def hermes(tmp_path: Path) -> AsyncGenerator[Model]:
    async with serve(tmp_path, "reasoning", REASONING_TEMPLATE) as model:
        yield model


@pytest.fixture
async def jamba(tmp_path: Path) -> AsyncGenerator[Model]:
    async with serve(tmp_path, "jamba-1.5", JAMBA_TEMPLATE) as model:
        yield model


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
        ({"tools": [function("a" * 65)]}, "tools.0.function.name"),
        ({"tools": [function("a.b")]}, "tools.0.function.name"),
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


# The conversation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [PARIS, {"city": "Paris"}])
async def test_calls_and_results_in_the_history(hermes: Model, arguments: Any) -> None:
    hermes.say("</think>a")
    past = {"role": "assistant", "content": None, "reasoning": "need it", "tool_calls": [
        {"id": "call_1", "type": "function", "index": 0, "function": {"name": "get_weather", "arguments": arguments}},
    ]}  # fmt: skip
    result = {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "18C"}]}
    response = await hermes.post(messages=[*QUESTION, past, result], tools=TOOLS)
    assert response.status_code == 200, response.text
    assert f"<think>\nneed it\n</think>\n\n{HERMES_CALL}<|im_end|>\n" in hermes.prompt
    assert hermes.prompt.endswith("<tool_response>\n18C\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "a", "tool_calls": [call("f", "{}")]}, "messages.0.tool_calls"),
        ({"role": "user", "content": "a", "tool_call_id": "1"}, "messages.0.tool_call_id"),
        ({"role": "tool"}, "messages.0.content"),
        ({"role": "assistant", "tool_calls": [call("f", "[]")]}, "messages.0.tool_calls.0.function.arguments"),
        ({"role": "assistant", "tool_calls": [call("f", '{"a')]}, "messages.0.tool_calls.0.function.arguments"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages.0.tool_calls.0.function"),
        ({"role": "assistant", "tool_calls": [call("f", "{}") | {"type": "custom"}]}, "messages.0.tool_calls.0.type"),
        ({"role": "assistant", "tool_calls": [call("", "{}")]}, "messages.0.tool_calls.0.function.name"),
    ],
)
async def test_what_is_wrong_in_the_history_is_named(hermes: Model, message: dict[str, Any], param: str) -> None:
    async with hermes.bench.http() as http:
        body = json.dumps({"messages": [message]})
        response = await http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_documents_and_variables_of_the_template(jamba: Model) -> None:
    jamba.say(" a")
    fields = {"documents": [{"title": "T", "text": "All cats are grey."}], "chat_template_kwargs": {"style": "S"}}
    assert (await jamba.post(**fields)).status_code == 200
    assert "<|system|> All cats are grey.S<|eom|>" in jamba.prompt
    assert (await jamba.post(chat_template_kwargs={"style": 1}, documents=[])).status_code == 200


async def test_the_last_message_is_continued(jamba: Model) -> None:
    jamba.say(" are grey.")
    messages = [*QUESTION, {"role": "assistant", "content": "All cats"}]
    reply = await jamba.post(messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert reply.json()["choices"][0]["message"]["content"] == " are grey."
    assert jamba.prompt.endswith("<|assistant|> All cats")


async def test_a_template_of_the_request(tmp_path: Path) -> None:
    async with serve(tmp_path, "jamba-1.5", JAMBA_TEMPLATE, allow_request_templates=True) as model:
        model.say("a")
        assert (await model.post(chat_template="<|bom|>{{ messages[0].content }}!")).status_code == 200
        assert model.prompt == "<|startoftext|><|bom|>Hi!"
        error = (await model.post(chat_template="{% if %}")).json()["error"]
        assert error["param"] == "chat_template"


# Thoughts -------------------------------------------------------------------------------------------------------------


async def test_thoughts_count(hermes: Model) -> None:
    hermes.say("ab\n</think>\n\nc")
    reply = (await hermes.post()).json()
    assert reply["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}  # the end tag is the fourth
    assert reply["usage"]["completion_tokens"] == 8
    last = events(await hermes.post(stream=True, stream_options={"include_usage": True}))[-1]
    assert last["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}


async def test_thoughts_are_left_out_on_request(hermes: Model) -> None:
    hermes.say("ab\n</think>\n\nc")
    message = await hermes.message(include_reasoning=False)
    assert (message["content"], "reasoning" in message, "reasoning_content" in message) == ("c", False, False)


async def test_thoughts_without_an_end(hermes: Model) -> None:
    hermes.say("ab")
    message = await hermes.message()
    assert (message["content"], message["reasoning"], message["finish_reason"]) == ("", "ab", "stop")


async def test_a_stop_string_ends_thoughts_too(hermes: Model) -> None:
    hermes.say("ab STOP c</think>d")
    message = await hermes.message(stop="STOP")
    assert (message["content"], message["reasoning"], message["finish_reason"]) == ("", "ab ", "stop")


@pytest.mark.parametrize("fields", [{"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}])
async def test_thoughts_are_switched_off(hermes: Model, fields: dict[str, Any]) -> None:
    hermes.say("\n\nHello")
    message = await hermes.message(**fields)
    assert (message["content"], "reasoning" in message) == ("\n\nHello", False)
    assert hermes.prompt.endswith("<think>\n\n</think>\n\n")


async def test_an_effort_that_the_template_does_not_know_is_ignored_visibly(hermes: Model, jamba: Model) -> None:
    hermes.say("</think>a")
    response = await hermes.post(reasoning_effort="low", unheard_of=1)
    assert (response.status_code, response.headers["x-ignored-fields"]) == (200, "unheard_of, reasoning_effort")
    assert hermes.prompt.endswith("<think>\n")
    jamba.say(" a")
    response = await jamba.post(reasoning_effort="none")
    assert (response.status_code, "x-ignored-fields" in response.headers) == (200, False)
    response = await jamba.post(reasoning_effort="high", thinking_token_budget=5)
    assert (response.status_code, response.headers["x-ignored-fields"]) == (
        200,
        "reasoning_effort, thinking_token_budget",
    )


async def test_a_budget_of_thoughts(hermes: Model) -> None:
    hermes.say("</think>a")
    assert (await hermes.post(thinking_token_budget=9)).status_code == 200
    end = hermes.tokenizer.tags["</think>"]
    assert (hermes.params.thinking_token_budget, hermes.params.thinking_end) == (9, (end,))
    assert (await hermes.post(thinking_token_budget=9, reasoning_effort="none")).status_code == 200
    assert (hermes.params.thinking_token_budget, hermes.params.thinking_end) == (None, ())


# What a reply says beside the message ---------------------------------------------------------------------------------


async def test_log_probabilities_of_the_prompt(hermes: Model) -> None:
    hermes.say("</think>a")
    reply = (await hermes.post(prompt_logprobs=2)).json()
    prompt = hermes.bench.engine.requests[-1].prompt
    first, second, *_ = reply["prompt_logprobs"]
    assert (first, len(reply["prompt_logprobs"])) == (None, len(prompt))
    text = hermes.tokenizer.token_text
    assert second["1800"] == {"logprob": -1 / 8, "rank": 1, "decoded_token": text(1800)}
    assert second["1801"]["rank"] == 2
    assert second[str(prompt[1])]["decoded_token"] == text(prompt[1])
    async with hermes.bench.http() as http:
        body = {"prompt": [5, 6, 7], "prompt_logprobs": 0, "max_tokens": 1}
        [choice] = (await http.post("/v1/completions", json=body)).json()["choices"]
    assert [None if entry is None else list(entry) for entry in choice["prompt_logprobs"]] == [None, ["6"], ["7"]]
    assert choice["logprobs"] is None


async def test_token_ids(hermes: Model) -> None:
    hermes.say("</think>a")
    reply = (await hermes.post(return_token_ids=True)).json()
    prompt = hermes.bench.engine.requests[-1].prompt
    assert (reply["prompt_token_ids"], reply["choices"][0]["token_ids"]) == (prompt, [*hermes.tokens("</think>a"), EOS])
    first, *others = events(await hermes.post(return_token_ids=True, stream=True, n=2))
    assert first["prompt_token_ids"] == prompt
    assert not any("prompt_token_ids" in event for event in others)
    async with hermes.bench.http() as http:
        body = {"prompt": [[5, 6], [7]], "return_token_ids": True, "n": 2, "max_tokens": 2}
        choices = (await http.post("/v1/completions", json=body)).json()["choices"]
        streamed = events(await http.post("/v1/completions", json=body | {"stream": True}))
    assert [choice["prompt_token_ids"] for choice in choices] == [[5, 6], [5, 6], [7], [7]]
    assert {tuple(choice["token_ids"]) for choice in choices} == {tuple(hermes.tokens("</think>a")[:2])}
    for choice in choices:
        mine = [c for event in streamed for c in event["choices"] if c["index"] == choice["index"]]
        assert [token for c in mine for token in c["token_ids"]] == choice["token_ids"]
        assert [c["prompt_token_ids"] for c in mine if "prompt_token_ids" in c] == [choice["prompt_token_ids"]]


async def test_timings(hermes: Model) -> None:
    hermes.say("</think>a")
    reply = (await hermes.post(timings_per_token=True)).json()
    timings, usage = reply["timings"], reply["usage"]
    assert timings["cache_n"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert timings["cache_n"] + timings["prompt_n"] == usage["prompt_tokens"]
    assert (timings["predicted_n"], timings["queue_ms"]) == (usage["completion_tokens"], 250.0)
    streamed = events(await hermes.post(timings_per_token=True, stream=True))
    assert ["timings" in event for event in streamed] == [False] * (len(streamed) - 1) + [True]
    assert "usage" not in streamed[-1]
    async with hermes.bench.http() as http:
        assert (await http.post("/v1/completions", json={"prompt": [5], "timings_per_token": True})).json()["timings"]
    assert "timings" not in (await hermes.post()).json()


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
