"""/v1/messages with Anthropic's client, on an engine that says what the test has written down."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types import Message, TextBlock, ThinkingBlock, ToolUseBlock
from anthropic.types.shared import ErrorResponse

from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.app import create_app
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.anthropic_api import (
    anthropic_client,
    checked,
    checked_count,
    checked_events,
    checked_message,
    message,
)
from tests.server.conftest import HELLO, Bench, Ids, MakeBench
from tests.server.fake_engine import MAX_MODEL_LEN, NUM_CACHED, FakeEngine, says
from tests.synthetic_tokenizer import write_tokenizer

USER: Any = [{"role": "user", "content": "Hi"}]
MARK = {"cache_control": {"type": "ephemeral"}}
WEATHER: Any = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
WEB_SEARCH: Any = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
CALL = 'Look.<tool_calls>[{"name": "weather", "arguments": {"city": "Paris"}}]</tool_calls>'
TOOL_TEMPLATE = (
    "{% if tools %}<tool_definitions>{% for tool in tools %}{{ tool.function.name }};{% endfor %}</tool_definitions>"
    "{% endif %}{% for message in messages %}<|bom|><|{{ message.role }}|> {{ message.content }}"
    "{% if message.tool_calls %}<tool_calls>[{% for call in message.tool_calls %}{{ call.function | tojson }}"
    "{% endfor %}]</tool_calls>{% endif %}<|eom|>{% endfor %}"
    "{% if add_generation_prompt %}<|bom|><|assistant|>{% endif %}"
)
REASONING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.reasoning_content %}<think>\n"
    "{{ message.reasoning_content }}\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture
def tools_bench(make_bench: MakeBench, engine: FakeEngine, ids: Ids) -> Bench:
    """A model that calls a tool."""
    engine.script = says(ids(CALL))
    return make_bench(template=TOOL_TEMPLATE)


@pytest.fixture(scope="session")
def reasoning_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("reasoning")
    write_tokenizer(folder, "reasoning")
    return Tokenizer.from_folder(folder)


@pytest.fixture
def reasoning_bench(reasoning_tokenizer: Tokenizer) -> Bench:
    """A model that reasons if the prompt lets it."""
    thoughts = reasoning_tokenizer.encode("Hm, hello.\n</think>\n\n", add_special_tokens=False)
    answer = reasoning_tokenizer.encode("hello", add_special_tokens=False)

    def script(request: Any) -> Any:
        opened = request.prompt.count(541) > request.prompt.count(542)
        return says([*(thoughts if opened else []), *answer])(request)

    engine = FakeEngine(script)
    template = ChatTemplate(REASONING_TEMPLATE, reasoning_tokenizer)
    config = ServerConfig(served_model_name=("jamba",))
    return Bench(create_app(config, engine, reasoning_tokenizer, template, GenerationDefaults(), demo=False), engine)


def last_prompt(bench: Bench, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(bench.engine.requests[-1].prompt, skip_special_tokens=False)


def without_ids(reply: Message) -> dict[str, Any]:
    """What two equal replies have in common. The helper for streams adds `parsed_output` to texts."""
    fields = reply.model_dump(exclude={"id", "stop_details"}, exclude_unset=True)
    content = [{k: v for k, v in block.items() if k not in ("id", "parsed_output")} for block in fields["content"]]
    return fields | {"content": content}


async def test_the_official_client_gets_a_message(bench: Bench) -> None:
    async with anthropic_client(bench) as client:
        reply = await client.messages.create(model="jamba", max_tokens=32, messages=USER)
    assert reply.id.startswith("msg_")
    assert (reply.type, reply.role, reply.model) == ("message", "assistant", "jamba")
    [block] = reply.content
    assert block.type == "text" and block.text == HELLO.removeprefix(" ")
    assert (reply.stop_reason, reply.stop_sequence) == ("end_turn", None)
    assert reply.usage.cache_read_input_tokens == NUM_CACHED


async def test_a_stream_has_anthropics_events_in_order(bench: Bench) -> None:
    async with bench.http() as http:
        reply = await http.post("/v1/messages", json=message(stream=True))
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = checked_events(reply.content)
    kinds = [event["type"] for event in events]
    deltas = kinds.count("content_block_delta")
    assert deltas > 1
    assert kinds == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["usage"]["cache_read_input_tokens"] == NUM_CACHED


async def test_the_stream_helper_ends_with_the_whole_message(tools_bench: Bench) -> None:
    request: Any = {"model": "jamba", "max_tokens": 100, "messages": USER, "tools": [WEATHER]}
    async with anthropic_client(tools_bench) as client:
        whole = await client.messages.create(**request)
        async with client.messages.stream(**request) as stream:
            kinds = {event.type async for event in stream}
            streamed = await stream.get_final_message()
    assert {"text", "input_json", "content_block_stop", "message_stop"} <= kinds
    [text, call] = whole.content
    assert isinstance(text, TextBlock) and text.text == "Look."
    assert isinstance(call, ToolUseBlock)
    assert (call.name, call.input) == ("weather", {"city": "Paris"})
    assert whole.stop_reason == "tool_use"
    assert without_ids(streamed) == without_ids(whole)


async def test_a_tool_round_trip(tools_bench: Bench, tokenizer: Tokenizer) -> None:
    async with anthropic_client(tools_bench) as client:
        first = await client.messages.create(
            model="jamba", max_tokens=100, messages=USER, tools=[WEATHER], tool_choice={"type": "any"}
        )
        call = first.content[-1]
        assert isinstance(call, ToolUseBlock)
        result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": "18C"}
        messages: Any = [*USER, first.to_param(), {"role": "user", "content": [result]}]
        await client.messages.create(model="jamba", max_tokens=60, messages=messages, tools=[WEATHER])
    assert last_prompt(tools_bench, tokenizer) == (
        "<|startoftext|><tool_definitions>weather;</tool_definitions><|bom|><|user|> Hi<|eom|><|bom|><|assistant|> "
        'Look.<tool_calls>[{"name": "weather", "arguments": {"city": "Paris"}}]</tool_calls><|eom|>'
        "<|bom|><|tool|> 18C<|eom|><|bom|><|assistant|>"
    )


@pytest.mark.parametrize(
    ("choice", "has_call"),
    [
        (None, True),
        ({"type": "auto"}, True),
        ({"type": "any"}, True),
        ({"type": "tool", "name": "weather", "disable_parallel_tool_use": True}, True),
        ({"type": "none"}, False),
    ],
)
async def test_the_choice_of_tools(tools_bench: Bench, choice: Any, has_call: bool) -> None:
    fields = {"tool_choice": choice} if choice else {}
    async with tools_bench.http() as http:
        reply = await http.post("/v1/messages", json=message(max_tokens=100, tools=[WEATHER], **fields))
    content = checked_message(reply.json())["content"]
    assert ("tool_use" in [block["type"] for block in content]) is has_call
    grammar = tools_bench.engine.requests[-1].params.grammar
    assert bool(grammar) is has_call


async def test_tools_of_anthropic_are_left_out_with_a_word(tools_bench: Bench, tokenizer: Tokenizer) -> None:
    async with tools_bench.http() as http:
        reply = await http.post("/v1/messages", json=message(tools=[WEATHER, WEB_SEARCH]))
        assert "web_search_20250305" in reply.headers["x-warning"]
        assert "web_search" not in last_prompt(tools_bench, tokenizer)
        reply = await http.post("/v1/messages", json=message(tools=[WEB_SEARCH], tool_choice={"type": "any"}))
        assert reply.status_code == 400


async def test_a_schema_becomes_a_grammar(bench: Bench) -> None:
    schema = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    format_ = {"type": "json_schema", "schema": schema}
    async with bench.http() as http:
        for fields in ({"output_config": {"format": format_}}, {"output_format": format_}):
            assert (await http.post("/v1/messages", json=message(**fields))).status_code == 200
            assert bench.engine.requests[-1].params.grammar
        bad = {"type": "json_schema", "schema": {"type": "object", "minimum": "x"}}
        reply = await http.post("/v1/messages", json=message(output_config={"format": bad}))
    assert reply.status_code == 400
    assert "output_config.format" in reply.json()["error"]["message"]


async def test_thinking_is_a_block_before_the_text(reasoning_bench: Bench) -> None:
    request: Any = {"model": "jamba", "max_tokens": 60, "messages": USER, "thinking": {"type": "adaptive"}}
    async with anthropic_client(reasoning_bench) as client:
        whole = await client.messages.create(**request)
        async with client.messages.stream(**request) as stream:
            kinds = {event.type async for event in stream}
            streamed = await stream.get_final_message()
    assert {"thinking", "signature", "text"} <= kinds
    assert without_ids(streamed) == without_ids(whole)
    thinking, text = whole.content
    assert isinstance(thinking, ThinkingBlock) and isinstance(text, TextBlock)
    assert (thinking.thinking, text.text) == ("Hm, hello.", "hello")
    assert thinking.signature
    details = whole.usage.output_tokens_details
    assert details is not None and 0 < details.thinking_tokens < whole.usage.output_tokens


@pytest.mark.parametrize("thinking", [None, {"type": "disabled"}, {"type": "between_tools"}])
async def test_without_thinking_the_prompt_closes_the_thoughts(
    reasoning_bench: Bench, reasoning_tokenizer: Tokenizer, thinking: Any
) -> None:
    async with reasoning_bench.http() as http:
        fields = {"thinking": thinking} if thinking else {}
        reply = checked_message((await http.post("/v1/messages", json=message(**fields))).json())
    assert [block["type"] for block in reply["content"]] == ["text"]
    assert last_prompt(reasoning_bench, reasoning_tokenizer).endswith("<think>\n\n</think>\n\n")


async def test_a_budget_of_thinking_reaches_the_engine(reasoning_bench: Bench) -> None:
    thinking = {"type": "enabled", "budget_tokens": 16, "display": "omitted"}
    async with reasoning_bench.http() as http:
        reply = checked_message((await http.post("/v1/messages", json=message(thinking=thinking))).json())
    params = reasoning_bench.engine.requests[-1].params
    assert (params.thinking_token_budget, params.thinking_end) == (16, (542,))
    assert reply["content"][0]["thinking"] == ""
    assert reply["content"][0]["signature"]


async def test_thoughts_of_earlier_replies_are_read(reasoning_bench: Bench, reasoning_tokenizer: Tokenizer) -> None:
    async with anthropic_client(reasoning_bench) as client:
        first = await client.messages.create(model="jamba", max_tokens=60, messages=USER, thinking={"type": "adaptive"})
        more: Any = [*USER, first.to_param(), {"role": "user", "content": "Go on."}]
        await client.messages.create(model="jamba", max_tokens=60, messages=more, thinking={"type": "adaptive"})
    assert "<|im_start|>assistant\n<think>\nHm, hello.\n</think>\n\nhello<|im_end|>" in last_prompt(
        reasoning_bench, reasoning_tokenizer
    )


async def test_stop_sequences_and_limits(bench: Bench) -> None:
    async with anthropic_client(bench) as client:
        stopped = await client.messages.create(model="jamba", max_tokens=32, messages=USER, stop_sequences=["the"])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "the")
        assert stopped.content[0].to_dict()["text"] == "hello "
        cut = await client.messages.create(model="jamba", max_tokens=1, messages=USER)
        assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 1)


async def test_a_reply_that_fills_the_context(bench: Bench, engine: FakeEngine, ids: Ids) -> None:
    engine.script = says(ids("x") * MAX_MODEL_LEN)
    async with bench.http() as http:
        reply = checked_message((await http.post("/v1/messages", json=message(max_tokens=32_000))).json())
    assert reply["stop_reason"] == "model_context_window_exceeded"
    usage = reply["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["output_tokens"] == MAX_MODEL_LEN


async def test_sampling_fields_reach_the_engine(make_bench: MakeBench) -> None:
    bench = make_bench(defaults=GenerationDefaults(temperature=0.3, top_k=7))
    async with bench.http() as http:
        await http.post("/v1/messages", json=message(temperature=0.5, top_p=0.9, top_k=40, metadata={"user_id": "u"}))
        params = bench.engine.requests[-1].params
        assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 40, 32)
        await http.post("/v1/messages", json=message(temperature=None, service_tier="auto"))
        params = bench.engine.requests[-1].params
        assert (params.temperature, params.top_k) == (0.3, 7)


async def test_a_last_message_of_the_assistant_is_continued(bench: Bench, tokenizer: Tokenizer) -> None:
    messages = [*USER, {"role": "assistant", "content": "Once upon"}]
    async with bench.http() as http:
        assert (await http.post("/v1/messages", json=message(messages=messages))).status_code == 200
    assert last_prompt(bench, tokenizer).endswith("<|bom|><|assistant|> Once upon")


async def test_a_system_message_in_mid_conversation_stays_there(bench: Bench, tokenizer: Tokenizer) -> None:
    messages = [*USER, {"role": "assistant", "content": "Hello"}, {"role": "system", "content": "Rule."}, *USER]
    async with bench.http() as http:
        await http.post("/v1/messages", json=message(messages=messages, system="First."))
    assert last_prompt(bench, tokenizer) == (
        "<|startoftext|><|bom|><|system|> First.<|eom|><|bom|><|user|> Hi<|eom|><|bom|><|assistant|> Hello<|eom|>"
        "<|bom|><|system|> Rule.<|eom|><|bom|><|user|> Hi<|eom|><|bom|><|assistant|>"
    )


async def test_tokens_are_counted_as_the_prompt_has_them(tools_bench: Bench) -> None:
    fields: Any = {"system": [{"type": "text", "text": "Be brief."}], "tools": [WEATHER], "messages": USER}
    async with anthropic_client(tools_bench) as client:
        counted = await client.messages.count_tokens(model="jamba", **fields)
        reply = await client.messages.create(model="jamba", max_tokens=8, **fields)
        assert not tools_bench.engine.requests[1:], "counting does not use the engine"
        assert counted.input_tokens == len(tools_bench.engine.requests[0].prompt)
        assert counted.input_tokens == reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0)
        long: Any = [{"role": "user", "content": "a " * MAX_MODEL_LEN}]
        assert (await client.messages.count_tokens(model="jamba", messages=long)).input_tokens > MAX_MODEL_LEN


async def test_marks_are_saved_and_counted(bench: Bench) -> None:
    content = [{"type": "text", "text": "Hello the world", **MARK}]
    async with bench.http() as http:
        plain = await http.post("/v1/messages", json=message(messages=[{"role": "user", "content": "Hello the world"}]))
        marked = await http.post("/v1/messages", json=message(messages=[{"role": "user", "content": content}]))
    usages = [checked_message(reply.json())["usage"] for reply in (plain, marked)]
    assert [request.prompt for request in bench.engine.requests] == [bench.engine.requests[0].prompt] * 2
    end = max(bench.engine.requests[1].save_positions)
    assert end > max(bench.engine.requests[0].save_positions, default=0)
    assert usages[0]["cache_creation_input_tokens"] == 0
    assert usages[1]["cache_creation_input_tokens"] == end - NUM_CACHED
    for usage in usages:
        total = sum(usage[f"{kind}input_tokens"] for kind in ("", "cache_read_", "cache_creation_"))
        assert total == len(bench.engine.requests[0].prompt)


async def test_fields_that_have_no_effect_are_named(tools_bench: Bench) -> None:
    fields: Any = {
        "context_management": {"edits": []},
        "tools": [{**WEATHER, "eager_input_streaming": True, "defer_loading": True}],
        "betas": ["x"],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "output_config": {"effort": "max"},
    }
    async with tools_bench.http(headers={"anthropic-version": "2023-06-01", "anthropic-beta": "x"}) as http:
        reply = await http.post("/v1/messages?beta=true", json=message(**fields))
    assert reply.status_code == 200
    ignored = reply.headers["x-ignored-fields"].split(", ")
    unknown = {"context_management", "tools.eager_input_streaming", "tools.defer_loading", "betas"}
    assert set(ignored) == unknown | {"thinking", "output_config.effort"}


async def test_probes_need_no_key(make_bench: MakeBench) -> None:
    async with make_bench(api_key=("secret",)).http() as http:
        assert (await http.head("/")).status_code == 200
        assert (await http.head("/api/hello")).status_code == 200
        assert (await http.get("/api/hello")).json() == {"message": "hello"}


async def test_both_headers_of_anthropics_clients_have_the_key(make_bench: MakeBench) -> None:
    bench = make_bench(api_key=("secret",))
    async with bench.http() as http:
        for headers in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
            reply = await http.post("/v1/messages/count_tokens", json={"messages": USER}, headers=headers)
            assert checked_count(reply.json()) > 0
            assert json.loads(reply.content).keys() == {"input_tokens"}


@pytest.mark.parametrize(
    "content",
    [
        "",
        [],
        [{"type": "text", "text": ""}],
        [{"type": "thinking", "thinking": "Hm."}],
        [{"type": "redacted_thinking", "data": "x"}],
        [{"type": "tool_use", "id": "t", "name": "weather", "input": {}}],
    ],
)
async def test_odd_last_messages_are_answered_or_refused(
    bench: Bench, tools_bench: Bench, reasoning_bench: Bench, content: Any
) -> None:
    for model in (bench, tools_bench, reasoning_bench):
        async with model.http() as http:
            for role in ("user", "assistant"):
                last = {"role": role, "content": content}
                reply = await http.post("/v1/messages", json=message(messages=[*USER, last]))
                if reply.status_code == 200:
                    checked_message(reply.json())
                else:
                    assert reply.status_code == 400
                    checked(ErrorResponse, reply.json())
