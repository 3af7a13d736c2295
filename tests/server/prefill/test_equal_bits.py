"""A reply whose prompt another server has computed is the reply of one server alone, bit for bit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from tests.server.prefill.servers import Served, config, decode_config, long_text, prefill_config, served, start

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Group:
    """A server alone, a prefill server, a decode server with a folder of its own, and one that shares the folder of the
    prefill server."""

    alone: Served
    prefill: Served
    over_http: Served
    shared: Served


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Group]:
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    configs = [
        config(None),
        prefill_config(one),
        decode_config(other, "http://later"),
        decode_config(one, "http://later"),
    ]
    engines = await asyncio.gather(*map(start, configs))
    try:
        async with AsyncExitStack() as stack:
            alone = await stack.enter_async_context(served(configs[0], engines[0]))
            prefill = await stack.enter_async_context(served(configs[1], engines[1]))
            decodes = [
                await stack.enter_async_context(served(decode_config(disk, prefill.url), engine))
                for disk, engine in ((other, engines[2]), (one, engines[3]))
            ]
            yield Group(alone, prefill, *decodes)
    finally:
        await asyncio.gather(*(engine.close() for engine in engines))


CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
GREEDY = {"max_tokens": 12, "temperature": 0, "logprobs": 3}
SAMPLED = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": 7}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["dog", "cat"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETIONS, GREEDY),
    "sampled": (COMPLETIONS, SAMPLED | {"logprobs": 2}),
    "two choices": (COMPLETIONS, SAMPLED | {"n": 2, "logprobs": 0}),
    "streamed": (COMPLETIONS, SAMPLED | {"stream": True, "logprobs": 1, "return_token_ids": True}),
    "grammar": (
        COMPLETIONS,
        SAMPLED | {"max_tokens": 40, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ),
    "chat": (CHAT, GREEDY | {"logprobs": True, "top_logprobs": 2}),
    "chat, two choices": (CHAT, SAMPLED | {"n": 2, "logprobs": True}),
    "chat, streamed": (CHAT, SAMPLED | {"stream": True, "logprobs": True}),
    "chat with a grammar": (CHAT, SAMPLED | {"max_tokens": 40, "response_format": {"type": "json_object"}}),
    "a response": (RESPONSES, {"max_output_tokens": 12, "temperature": 0}),
    "a message": (MESSAGES, {"max_tokens": 12, "temperature": 0, "model": "jamba-demo"}),
}


def body_of(path: str, text: str, **fields: Any) -> dict[str, Any]:
    if path == COMPLETIONS:
        return {"prompt": text, **fields}
    if path == RESPONSES:
        return {"input": text, **fields}
    return {
        "messages": [{"role": "system", "content": "You tell stories."}, {"role": "user", "content": text}],
        **fields,
    }


async def reply(server: Served, path: str, body: dict[str, Any], key: str = "one") -> tuple[Any, int, int]:
    """Returns the reply without ids and times, the number of prompt tokens, and the number of cached ones."""
    usage: dict[str, Any] = {}
    async with server.http(key) as http:
        if not body.get("stream"):
            found = await http.post(path, json=body)
            assert found.status_code == 200, found.text
            document = found.json()
            said = document.get("choices") or document.get("content") or [o["content"] for o in document["output"]]
            usage = document["usage"]
        else:
            body = body | {"stream_options": {"include_usage": True}}
            lines = (await http.post(path, json=body)).text.splitlines()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            said = [choice for event in events for choice in event["choices"]]
            usage = events[-1]["usage"]
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    cached = details.get("cached_tokens", usage.get("cache_read_input_tokens", 0))
    prompt = usage.get("prompt_tokens") or usage["input_tokens"] + (cached if path == MESSAGES else 0)
    return said, prompt, cached


@pytest.mark.parametrize("place", ["over_http", "shared"])
@pytest.mark.parametrize("name", CASES)
async def test_the_reply_is_that_of_one_server_alone(group: Group, name: str, place: str) -> None:
    server: Served = getattr(group, place)
    path, fields = CASES[name]
    body = body_of(path, long_text(f"{name} {place}"), **fields)
    before = await server.results()
    said, length, cached = await reply(server, path, body)
    expected, _, cold = await reply(group.alone, path, body)
    assert said == expected
    assert cold == 0
    assert cached == (length - 1) // 16 * 16, "only the last page was computed"
    result = "received" if place == "over_http" else "found"
    assert await server.results() == before | {result: before.get(result, 0) + 1}
    assert server.engine.stats.hits_disk_total


async def test_each_prompt_of_a_request_is_handed_over(group: Group) -> None:
    body = {"prompt": [long_text("p"), "short", long_text("q")], "n": 2, "max_tokens": 5, "temperature": 0}
    before = await group.over_http.results()
    said, _, cached = await reply(group.over_http, COMPLETIONS, body)
    assert (said, cached > 96) == ((await reply(group.alone, COMPLETIONS, body))[0], True)
    assert (await group.over_http.results())["received"] == before.get("received", 0) + 2


async def test_the_next_turn_brings_only_what_is_new(group: Group) -> None:
    """The first turn is in the disk tier of the decode server, so only the segments after it are fetched."""
    server, first = group.over_http, long_text("turn", 160)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": first}], "temperature": 0, "max_tokens": 8}
    said, length, _ = await reply(server, CHAT, body)
    counts = server.app.state.services.hand_overs.counts
    before, num_bytes = await server.results(), counts.num_bytes
    again, _, cached = await reply(server, CHAT, body)
    assert (again, cached >= length - 16) == (said, True)
    body["messages"] += [said[0]["message"], {"role": "user", "content": "And then?"}]
    assert (await reply(server, CHAT, body))[0] == (await reply(group.alone, CHAT, body))[0]
    assert await server.results() == before, "too little is missing"
    body["messages"][-1]["content"] = long_text("more")
    said, length, cached = await reply(server, CHAT, body)
    assert said == (await reply(group.alone, CHAT, body))[0]
    assert cached == (length - 1) // 16 * 16
    assert await server.results() == before | {"received": before["received"] + 1}
    layout = server.engine.info
    state = sum(_num_bytes(*kept) for kept in layout.segment_state.values())
    page = sum(_num_bytes(*kept) for kept in layout.segment_page.values())
    assert counts.num_bytes - num_bytes < 4 * (state + 10_000) + page * length / 16 / 2


def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    size = {"float32": 4, "bfloat16": 2}[dtype]
    for number in shape:
        size *= number
    return size


@pytest.mark.parametrize("place", ["over_http", "shared"])
async def test_owners_of_keys_share_nothing(group: Group, place: str) -> None:
    server: Served = getattr(group, place)
    body = body_of(CHAT, long_text(f"secret {place}"), **GREEDY | {"logprobs": True})
    said, length, _ = await reply(server, CHAT, body, "one")
    hits, before = group.prefill.engine.stats.prefix_hits_total, await server.results()
    other, _, cached = await reply(server, CHAT, body, "two")
    assert (other, cached) == (said, (length - 1) // 16 * 16)
    assert group.prefill.engine.stats.prefix_hits_total == hits, "the prefill server has computed the prompt again"
    result = "received" if place == "over_http" else "found"
    assert await server.results() == before | {result: before[result] + 1}
    body["cache_salt"] = "a salt of the client"
    assert (await reply(server, CHAT, body, "one"))[0] == said
    assert group.prefill.engine.stats.prefix_hits_total == hits


@pytest.mark.parametrize(
    "fields",
    [{"cache": {"read": False}}, {"cache": {"write": False}}, {"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}],
)
async def test_what_could_not_be_used_is_not_handed_over(group: Group, fields: dict[str, Any]) -> None:
    body = {"prompt": long_text(f"alone {fields}"), "max_tokens": 4, "temperature": 0, **fields}
    before = await group.over_http.results()
    said, _, cached = await reply(group.over_http, COMPLETIONS, body)
    assert (said, cached) == ((await reply(group.alone, COMPLETIONS, body))[0], 0)
    assert await group.over_http.results() == before


async def test_many_at_once(group: Group) -> None:
    bodies = [body_of(COMPLETIONS, long_text(f"crowd {number % 5}"), **SAMPLED) for number in range(12)]
    found = await asyncio.gather(*(reply(group.over_http, COMPLETIONS, body) for body in bodies))
    alone = await asyncio.gather(*(reply(group.alone, COMPLETIONS, body) for body in bodies))
    assert [said for said, _, _ in found] == [said for said, _, _ in alone]
    assert group.over_http.app.state.services.hand_overs.in_flight.total == 0
