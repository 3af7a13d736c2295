"""Codex's requests on a real engine: every turn is answered, and nearly all of each prompt comes from the cache."""

from __future__ import annotations

from typing import Any

import httpx

from jamba_server.engine.process.client import EngineClient
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from tests.server import codex
from tests.server.real_engine import served_engine
from tests.server.test_responses import events_of

NUM_TURNS = 10


async def test_a_conversation_of_ten_turns_reads_its_prompts_from_the_cache() -> None:
    config = ServerConfig(served_model_name=("jamba-demo",), dtype="float32", threads=1, max_num_seqs=4)
    engine = EngineClient(config.engine(demo_folder()))
    await engine.start()
    async with (
        served_engine(config, engine) as openai,
        httpx.AsyncClient(base_url=str(openai.base_url), headers=codex.HEADERS, timeout=60) as http,
    ):
        items = codex.first_items("The tests of this project fail. Find out why and repair it.")
        num_calls = 0
        for turn in range(NUM_TURNS):
            # The small model would never call a tool by itself.
            choice = {"tool_choice": "required"} if turn % 2 == 0 else {}
            output, usage = await _turn(http, codex.body(items, max_output_tokens=48, **choice))
            if turn:
                cached = usage["input_tokens_details"]["cached_tokens"]
                assert cached >= 0.9 * usage["input_tokens"], (turn, usage)
            num_calls += sum(item["type"] == "function_call" for item in output)
            items += [codex.sent_back(item) for item in output] + codex.answers(output, turn)
        assert num_calls >= NUM_TURNS // 2
    await engine.close()


async def _turn(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the output items, as `response.output_item.done` brings them, and the usage."""
    reply = await http.post("responses", json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-ignored-fields"] == "client_metadata, reasoning_effort"  # the template reads no effort
    assert reply.headers["x-warning"] == "the model does not see the tools of these types: custom, web_search"
    events = events_of(reply.content)
    items = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert events[-1]["response"]["output"] == items
    return items, events[-1]["response"]["usage"]
