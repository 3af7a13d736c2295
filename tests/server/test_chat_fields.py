"""Conversations with tool results, thoughts, templates, and what a reply of /v1/chat/completions says beside its
message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from tests.server.fake_engine import EOS
from tests.server.served_model import (
    CHAT,
    HERMES_CALL,
    JAMBA_TEMPLATE,
    PARIS,
    QUESTION,
    TOOLS,
    Model,
    call,
    events,
    hermes,
    jamba,
    serve,
)

__all__ = ["hermes", "jamba"]


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


@pytest.mark.parametrize("arguments", ['{"city": "Pa', '{"', "[1]", "Paris", '{"city": "\\ud83d"}', '{"a": NaN}'])
async def test_arguments_that_are_no_object_reach_the_model_unchanged(hermes: Model, arguments: str) -> None:
    """Clients send back the calls of a reply that was cut off, and invalid calls together with an error as their
    result."""
    hermes.say("</think>a")
    past = {"role": "assistant", "tool_calls": [call("get_weather", arguments)]}
    result = {"role": "tool", "tool_call_id": "call_1", "content": "Error: the arguments are not JSON"}
    response = await hermes.post(messages=[*QUESTION, past, result], tools=TOOLS)
    assert response.status_code == 200, response.text
    assert f'{{"name": "get_weather", "arguments": {arguments}}}' in hermes.prompt


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "a", "tool_calls": [call("f", "{}")]}, "messages.0.tool_calls"),
        ({"role": "user", "content": "a", "tool_call_id": "1"}, "messages.0.tool_call_id"),
        ({"role": "tool"}, "messages.0.content"),
        (
            {"role": "assistant", "tool_calls": [call("f", cast("Any", []))]},
            "messages.0.tool_calls.0.function.arguments",
        ),
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
