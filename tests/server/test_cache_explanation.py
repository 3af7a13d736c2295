"""The field `cache` of requests and the object `jamba_cache` of replies, with a real engine."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
import pytest_asyncio

from jamba_server.engine.process.client import EngineClient
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from tests.server.conftest import Bench
from tests.server.real_engine import served_engine

pytestmark = pytest.mark.asyncio(loop_scope="module")
SYSTEM = {"role": "system", "content": " ".join(["once upon a time there was a dog"] * 10)}
EXPLAIN = {"explain": True}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


class Server:
    def __init__(self, http: httpx.AsyncClient, model: str) -> None:
        self.http, self.model = http, model

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        reply = await self.http.post(path, json={"max_tokens": 8, "temperature": 0, **body})
        assert reply.status_code == 200, reply.text
        return reply.json()

    async def chat(self, *messages: dict[str, str], **body: Any) -> tuple[str, dict[str, Any]]:
        reply = await self.post("chat/completions", messages=messages, **{"cache": EXPLAIN} | body)
        return reply["choices"][0]["message"]["content"], reply["jamba_cache"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncGenerator[Server]:
    """One for all tests of this module. The prompts of each begin as those of no other."""
    config = ServerConfig(served_model_name=("jamba-demo",), dtype="float32", threads=1, max_num_seqs=4)
    engine = EngineClient(config.engine(demo_folder()))
    await engine.start()
    async with served_engine(config, engine) as client, httpx.AsyncClient(base_url=str(client.base_url)) as http:
        yield Server(http, "jamba-demo")
    await engine.close()


async def test_a_chat_says_at_which_message_it_departs(server: Server) -> None:
    talk = [SYSTEM, user("What did the dog do in the garden then?"), user("Who had a red ball there?")]
    answer, cache = await server.chat(*talk)
    assert (cache["used_tokens"], cache["tier"], cache["reason"]) == (0, None, "not_seen")
    assert cache["differs_at_message"] is None, "nothing was cached"
    same, cache = await server.chat(*talk)
    assert same == answer
    assert (cache["tier"], cache["reason"], cache["differs_at_message"]) == ("device", "complete", None)
    assert cache["restore_ms"] > 0
    _, cache = await server.chat(talk[0], user("Which dog was it that came?"), talk[2])
    assert cache["differs_at_message"] == 1
    assert cache["kv_tokens"] >= cache["used_tokens"] > 0
    _, cache = await server.chat(*talk, {"role": "assistant", "content": answer}, user("And then?"))
    assert cache["differs_at_message"] is None, "it continues the cached text"
    assert cache["used_tokens"] == cache["kv_tokens"]
    assert cache["reason"] == "complete", "less than a page is new"
    _, cache = await server.chat({"role": "system", "content": "Another one."}, *talk[1:])
    assert cache["differs_at_message"] == 0


async def test_a_request_can_leave_the_cache_alone(server: Server) -> None:
    talk = [user("A request that leaves nothing behind, whatever comes after it in this test of the cache.")]
    answer, cache = await server.chat(*talk, cache={"explain": True, "write": False})
    again, cache = await server.chat(*talk, cache={"explain": True, "write": False})
    assert (again, cache["used_tokens"], cache["reason"]) == (answer, 0, "not_seen")
    await server.chat(*talk)
    again, cache = await server.chat(*talk, cache={"explain": True, "read": False})
    assert (again, cache["used_tokens"], cache["reason"]) == (answer, 0, "read_disabled")
    assert cache["kv_tokens"] > 0
    again, cache = await server.chat(*talk)
    assert (again, cache["reason"]) == (answer, "complete")


async def test_another_salt_is_the_reason(server: Server) -> None:
    talk = [user("A request whose prefix is cached under another salt than the one that it has itself.")]
    await server.chat(*talk, cache_salt="a")
    _, cache = await server.chat(*talk, cache_salt="b")
    assert (cache["reason"], cache["used_tokens"]) == ("salt", 0)
    assert cache["missed_tokens"]["salt"] > 0


async def test_a_pin_is_reported(server: Server) -> None:
    _, cache = await server.chat(user("Keep this."), cache={"pin": 60})
    assert cache["pinned_tokens"] > 0
    root = str(server.http.base_url).removesuffix("v1/")
    metrics = (await server.http.get(f"{root}metrics")).text
    pinned = [line for line in metrics.splitlines() if line.startswith("jamba_pinned_states")]
    assert float(pinned[0].split()[-1]) >= 1


async def test_every_endpoint_explains(server: Server) -> None:
    for path, body, events in (
        ("completions", {"prompt": "Once upon a time"}, "jamba_cache"),
        ("chat/completions", {"messages": [user("Hello.")]}, "jamba_cache"),
        ("messages", {"messages": [user("Hello.")]}, "jamba_cache"),
        ("responses", {"input": "Hello.", "max_tokens": None, "max_output_tokens": 8}, "response"),
    ):
        body = {name: value for name, value in {"max_tokens": 8, **body}.items() if value is not None}
        reply = await server.http.post(path, json={**body, "cache": EXPLAIN})
        assert reply.status_code == 200, reply.text
        assert reply.json()["jamba_cache"]["reason"] in ("not_seen", "complete", "no_state")
        assert "jamba_cache" not in (await server.http.post(path, json=body)).json()
        text = (await server.http.post(path, json={**body, "cache": EXPLAIN, "stream": True})).text
        data = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        found = [event[events] for event in data if event.get(events)]
        last = found[-1]["jamba_cache"] if events == "response" else found[-1]
        assert last["reason"] in ("complete", "no_state")


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ({"pin": -1}, "cache.pin"),
        ({"pin": 1e9}, "cache.pin"),
        ({"pin": 5, "write": False}, "pin"),
        ({"explane": True}, "did you mean `explain`"),
    ],
)
async def test_bad_values_are_named(bench: Bench, cache: dict[str, Any], words: str) -> None:
    async with bench.http() as http:
        reply = await http.post("/v1/chat/completions", json={"messages": [user("a")], "cache": cache})
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


async def test_an_explanation_is_for_one_prompt(bench: Bench) -> None:
    async with bench.http() as http:
        reply = await http.post("/v1/completions", json={"prompt": ["a", "b"], "cache": EXPLAIN})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "cache"
