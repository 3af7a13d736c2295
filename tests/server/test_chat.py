"""/v1/chat/completions through the official client."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import HELLO, Bench, Ids, MakeBench, chat
from tests.server.fake_engine import EOS, MAX_MODEL_LEN, NUM_CACHED, says, score

REPLY = "hello the world"  # the space that the template's role token leaves is not part of it


async def test_a_reply(bench: Bench, ids: Ids) -> None:
    async with bench.openai() as client:
        reply = await client.chat.completions.create(model="jamba", messages=[{"role": "user", "content": "Hi"}])
    assert reply.id.startswith("chatcmpl-")
    assert (reply.object, reply.model) == ("chat.completion", "jamba")
    [choice] = reply.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content, choice.message.refusal) == ("assistant", REPLY, None)
    assert reply.usage is not None
    [request] = bench.engine.requests
    assert reply.usage.prompt_tokens == len(request.prompt)
    assert reply.usage.completion_tokens == len(ids(HELLO)) + 1  # the end of the text is a token, too
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == NUM_CACHED


async def test_the_prompt_is_the_rendered_chat(bench: Bench, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "x<|eom|>", "name": "bob"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
        {"role": "user", "content": ""},
    ]
    async with bench.http() as http:
        response = await http.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 200
    [request] = bench.engine.requests
    expected = (
        "<|startoftext|><|bom|><|system|> a\nb<|eom|><|bom|><|user|> (bob)x<|eom|><|eom|><|bom|><|assistant|> <|eom|>"
        "<|bom|><|user|> <|eom|><|bom|><|assistant|>"
    )
    assert tokenizer.decode(request.prompt, skip_special_tokens=False) == expected
    eom = tokenizer.special_tokens["<|eom|>"]
    assert request.prompt.count(eom) == 4  # the one that the user wrote is text
    assert request.save_positions == tuple(sorted(request.save_positions))
    first = request.prompt[: request.save_positions[0]]
    assert tokenizer.decode(first, skip_special_tokens=False).endswith("<|bom|><|user|> (bob)")


async def test_every_parameter_arrives(make_bench: MakeBench, tokenizer: Tokenizer) -> None:
    bench = make_bench(enable_priority=True)
    fields = {
        "max_completion_tokens": 7, "min_tokens": 2, "temperature": 0.5, "top_p": 0.25, "top_k": 5, "min_p": 0.125,
        "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 2, "logit_bias": {"5": -100, "6": 1.5},
        "seed": -3, "stop_token_ids": [7, 8], "ignore_eos": True, "logprobs": True, "top_logprobs": 4, "priority": -2,
        "bad_words": ["hello", " the"], "allowed_token_ids": [9, 8], "cache_salt": "tenant", "stop": ["none"] * 64,
    }  # fmt: skip
    async with bench.http() as http:
        response = await http.post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == 200, response.text
    [request] = bench.engine.requests
    params = request.params
    assert (params.max_tokens, params.min_tokens, params.temperature, params.top_p) == (7, 2, 0.5, 0.25)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.125, 1.5)
    assert (params.presence_penalty, params.frequency_penalty, params.logit_bias) == (-1, 2, {5: -100, 6: 1.5})
    assert (params.seed, params.stop_token_ids, params.ignore_eos) == (-3, (7, 8), True)
    assert (params.logprobs, params.prompt_logprobs, request.priority) == (4, None, -2)
    words = [tokenizer.encode(text, add_special_tokens=False) for text in ("hello", " hello", "the", " the")]
    assert params.bad_words == tuple(map(tuple, words))
    assert (params.allowed_token_ids, request.cache_salt) == ((9, 8), "tenant")


async def test_the_model_s_defaults_fill_what_is_left_out(make_bench: MakeBench) -> None:
    bench = make_bench(
        defaults=GenerationDefaults(temperature=0.25, top_p=0.5, top_k=9, min_p=0.1, repetition_penalty=1.25)
    )
    async with bench.http() as http:
        await http.post("/v1/chat/completions", json=chat())
        await http.post("/v1/chat/completions", json=chat(temperature=0, top_p=None, top_k=-1, repetition_penalty=1))
    silent, spoken = (request.params for request in bench.engine.requests)
    assert (silent.temperature, silent.top_p, silent.top_k, silent.min_p) == (0.25, 0.5, 9, 0.1)
    assert silent.repetition_penalty == 1.25
    assert (spoken.temperature, spoken.top_p, spoken.top_k, spoken.repetition_penalty) == (0, 0.5, 0, 1)


@pytest.mark.parametrize(("limit", "expected"), [(None, "rest"), (5, 5), (100_000, "rest")])
async def test_max_tokens_is_the_context_s_rest_at_most(bench: Bench, limit: int | None, expected: int | str) -> None:
    async with bench.http() as http:
        await http.post("/v1/chat/completions", json=chat(max_tokens=limit))
    [request] = bench.engine.requests
    rest = bench.engine.info.max_model_len - len(request.prompt)
    assert request.params.max_tokens == (rest if expected == "rest" else expected)


async def test_a_request_without_a_seed_gets_one(bench: Bench) -> None:
    async with bench.http() as http:
        for fields in ({}, {}, {"seed": 11}, {"seed": 11}):
            await http.post("/v1/chat/completions", json=chat(**fields))
    seeds = [request.params.seed for request in bench.engine.requests]
    assert seeds[0] != seeds[1]
    assert seeds[2:] == [11, 11]


async def test_several_choices(bench: Bench, ids: Ids) -> None:
    bench.engine.script = says(ids(" hello"), ids(" the"), ids(" in"))
    async with bench.openai() as client:
        reply = await client.chat.completions.create(model="jamba", messages=[{"role": "user", "content": "Hi"}], n=3)
    assert [(c.index, c.message.content) for c in reply.choices] == [(0, "hello"), (1, "the"), (2, "in")]
    requests = bench.engine.requests
    assert [request.index for request in requests] == [0, 1, 2]
    assert len({request.group for request in requests}) == 1
    assert requests[0].group
    assert len({request.params.seed for request in requests}) == 1  # the index tells their noise apart
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == len(requests[0].prompt)
    assert reply.usage.completion_tokens == sum(len(ids(t)) + 1 for t in (" hello", " the", " in"))
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == NUM_CACHED


async def test_length(bench: Bench) -> None:
    async with bench.openai() as client:
        reply = await client.chat.completions.create(
            model="jamba", messages=[{"role": "user", "content": "Hi"}], max_tokens=1
        )
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("hello", "length")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 1


async def test_a_stop_string_ends_its_choice_and_not_the_others(bench: Bench, ids: Ids) -> None:
    bench.engine.script = says(ids(" hello STOP it"), ids(" the other one"))
    async with bench.openai() as client:
        reply = await client.chat.completions.create(
            model="jamba", messages=[{"role": "user", "content": "Hi"}], n=2, stop=["TOP", "nothing"]
        )
    assert [choice.message.content for choice in reply.choices] == ["hello S", "the other one"]
    assert [choice.finish_reason for choice in reply.choices] == ["stop", "stop"]
    assert [getattr(choice, "stop_reason", "") for choice in reply.choices] == ["TOP", None]
    assert bench.engine.aborted == [bench.engine.requests[0].id]


async def test_include_stop_str_in_output(bench: Bench, ids: Ids) -> None:
    bench.engine.script = says(ids(" hello STOP it"))
    async with bench.http() as http:
        fields = chat(stop="STOP", include_stop_str_in_output=True)
        reply = (await http.post("/v1/chat/completions", json=fields)).json()
    assert reply["choices"][0]["message"]["content"] == "hello STOP"


async def test_logprobs(bench: Bench, ids: Ids, tokenizer: Tokenizer) -> None:
    bench.engine.script = says(ids(" hello €"))  # the sign is three byte tokens
    async with bench.openai() as client:
        reply = await client.chat.completions.create(
            model="jamba", messages=[{"role": "user", "content": "Hi"}], logprobs=True, top_logprobs=2
        )
    logprobs = reply.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    tokens = [*ids(" hello €"), EOS]
    assert [entry.logprob for entry in logprobs.content] == [score(t, 0).logprob for t in tokens]
    assert [entry.token for entry in logprobs.content] == [tokenizer.token_text(t) for t in tokens]
    assert bytes(b for entry in logprobs.content for b in entry.bytes or []) == " hello €<|endoftext|>".encode()
    assert [(t.token, t.logprob) for t in logprobs.content[0].top_logprobs] == [
        (tokenizer.token_text(1800), -1 / 8),
        (tokenizer.token_text(1801), -2 / 8),
    ]


async def test_logprobs_without_top_are_of_the_chosen_tokens(bench: Bench) -> None:
    async with bench.http() as http:
        reply = (await http.post("/v1/chat/completions", json=chat(logprobs=True))).json()
    assert bench.engine.requests[0].params.logprobs == 0
    assert {tuple(entry["top_logprobs"]) for entry in reply["choices"][0]["logprobs"]["content"]} == {()}


async def test_a_model_without_a_chat_template_says_so(make_bench: MakeBench) -> None:
    async with make_bench(template=None).http() as http:
        response = await http.post("/v1/chat/completions", json=chat())
    assert response.status_code == 400
    assert "no chat template" in response.json()["error"]["message"]


@pytest.mark.parametrize("model", [None, "jamba", "alias"])
async def test_the_model_s_names(bench: Bench, model: str | None) -> None:
    async with bench.http() as http:
        response: httpx.Response = await http.post("/v1/chat/completions", json=chat(model=model))
    assert response.json()["model"] == (model or "jamba")


async def test_fields_without_effect_are_accepted(bench: Bench) -> None:
    fields = chat(
        user="u", metadata={"a": "b"}, store=True, service_tier="auto", safety_identifier="s", prompt_cache_key="k",
        tool_choice="none", response_format={"type": "text"}, modalities=["text"],
    )  # fmt: skip
    async with bench.http() as http:
        assert (await http.post("/v1/chat/completions", json=fields)).status_code == 200


async def test_requests_of_one_choice_have_no_group(bench: Bench) -> None:
    async with bench.http() as http:
        await http.post("/v1/chat/completions", json=chat())
    assert bench.engine.requests[0].group == ""


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_tokens": -1}, None),
        ({"max_completion_tokens": -1}, None),
        ({"max_tokens": 3, "max_completion_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
    ],
)
async def test_the_longest_reply(bench: Bench, fields: dict[str, Any], limit: int | None) -> None:
    async with bench.http() as http:
        assert (await http.post("/v1/chat/completions", json=chat(**fields))).status_code == 200
    [request] = bench.engine.requests
    assert request.params.max_tokens == (limit or MAX_MODEL_LEN - len(request.prompt))


async def test_the_prompt_may_end_before_the_assistant_s_turn(bench: Bench, tokenizer: Tokenizer) -> None:
    async with bench.http() as http:
        for wanted in (True, False):
            await http.post("/v1/chat/completions", json=chat(add_generation_prompt=wanted))
    with_turn, without = (tokenizer.decode(r.prompt, skip_special_tokens=False) for r in bench.engine.requests)
    assert with_turn == without + "<|bom|><|assistant|>"
