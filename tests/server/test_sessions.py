"""/v1/sessions: names of stored conversations, and whose they are."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from jamba_server.engine.process.client import EngineClient
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import Bench, MakeBench
from tests.server.real_engine import served_engine


async def respond(http: httpx.AsyncClient, text: str, **body: Any) -> dict[str, Any]:
    reply = await http.post("/v1/responses", json={"input": text, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def prompt(bench: Bench, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(bench.engine.requests[-1].prompt, skip_special_tokens=False)


async def test_a_session_continues_its_last_response(bench: Bench, tokenizer: Tokenizer) -> None:
    async with bench.http() as http:
        first = await respond(http, "a", session="talk")
        second = await respond(http, "b", session="talk")
        assert (first["session"], first["previous_response_id"]) == ("talk", None)
        assert second["previous_response_id"] == first["id"]
        assert "> a<" in prompt(bench, tokenizer)
        found = (await http.get("/v1/sessions/talk")).json()
        assert (found["response_id"], found["num_responses"]) == (second["id"], 2)
        await respond(http, "c", session="other")
        assert [s["id"] for s in (await http.get("/v1/sessions")).json()["data"]] == ["other", "talk"]


@pytest.mark.parametrize(("action", "body"), [("fork", {"id": "new"}), ("rewind", {}), ("pin", {"seconds": 5})])
async def test_unknown_fields_are_ignored_visibly(bench: Bench, action: str, body: dict[str, Any]) -> None:
    async with bench.http() as http:
        await respond(http, "a", session="talk")
        reply = await http.post(f"/v1/sessions/talk/{action}", json={**body, "unheard_of": 1})
        assert (reply.status_code, reply.headers.get("x-ignored-fields")) == (200, "unheard_of")


async def test_fork_rewind_and_delete(bench: Bench, tokenizer: Tokenizer) -> None:
    async with bench.http() as http:
        ids = [(await respond(http, text, session="talk"))["id"] for text in "abc"]
        fork = (await http.post("/v1/sessions/talk/fork", json={"id": "fork"})).json()
        assert (fork["id"], fork["response_id"], fork["num_responses"]) == ("fork", ids[-1], 3)
        again = await http.post("/v1/sessions/talk/fork", json={"id": "fork"})
        assert (again.status_code, again.json()["error"]["param"]) == (400, "id")
        rewound = (await http.post("/v1/sessions/talk/rewind", json={"responses": 2})).json()
        assert (rewound["response_id"], rewound["num_responses"]) == (ids[0], 1)
        assert (await respond(http, "d", session="talk"))["previous_response_id"] == ids[0]
        assert (await respond(http, "e", session="fork"))["previous_response_id"] == ids[-1]
        too_far = await http.post("/v1/sessions/talk/rewind", json={"responses": 3})
        assert (too_far.status_code, too_far.json()["error"]["param"]) == (400, "responses")
        empty = (await http.post("/v1/sessions/talk/rewind", json={"responses": 2})).json()
        assert (empty["response_id"], empty["num_responses"]) == (None, 0)
        assert (await respond(http, "f", session="talk"))["previous_response_id"] is None
        assert (await http.delete("/v1/sessions/talk")).json() == {"id": "talk", "object": "session", "deleted": True}
        assert (await http.get("/v1/sessions/talk")).status_code == 404
        assert (await http.get(f"/v1/responses/{ids[0]}")).status_code == 200


async def test_two_requests_at_once_do_not_lose_a_response_silently(bench: Bench) -> None:
    """The second to end says by its missing `session` that the first one is the session's last response."""
    async with bench.http() as http:
        table = bench.app.state.services.responses
        first = await respond(http, "a", session="talk")
        assert await table.sessions(lambda t: t.move("talk", "", first["id"], "elsewhere"))
        assert not await table.sessions(lambda t: t.move("talk", "", first["id"], "late"))


async def test_a_session_belongs_to_its_key(make_bench: MakeBench) -> None:
    bench = make_bench(api_key=("one", "two"))
    async with bench.http() as http:
        one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
        await http.post("/v1/responses", json={"input": "a", "session": "talk"}, headers=one)
        assert (await http.get("/v1/sessions", headers=two)).json()["data"] == []
        for method, path, body in (
            ("GET", "", None),
            ("DELETE", "", None),
            ("POST", "/fork", {"id": "x"}),
            ("POST", "/rewind", {}),
            ("POST", "/pin", {"seconds": 1}),
        ):
            reply = await http.request(method, f"/v1/sessions/talk{path}", json=body, headers=two)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "session_not_found")
        mine = await http.post("/v1/responses", json={"input": "b", "session": "talk"}, headers=two)
        assert mine.json()["previous_response_id"] is None
        assert (await http.get("/v1/sessions/talk", headers=one)).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"session": "a b"}, "session"),
        ({"session": "x" * 65}, "session"),
        ({"session": ".."}, "session"),
        ({"session": "a", "store": False}, "session"),
        ({"session": "a", "previous_response_id": "resp_1"}, "session"),
    ],
)
async def test_bad_values_are_named(bench: Bench, body: dict[str, Any], param: str) -> None:
    async with bench.http() as http:
        reply = await http.post("/v1/responses", json={"input": "a", **body})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_a_look_at_the_sessions_is_no_use_of_them(make_bench: MakeBench) -> None:
    async with make_bench(max_stored_responses=3).http() as http:
        old, new = [(await respond(http, text, session=text))["id"] for text in ("old", "new")]
        await respond(http, "b", session="new")
        listed = (await http.get("/v1/sessions")).json()["data"]
        assert [(s["id"], s["num_responses"]) for s in listed] == [("new", 2), ("old", 1)]
        await http.get("/v1/sessions/old")
        await respond(http, "c", session="another")
        assert [(await http.get(f"/v1/responses/{id_}")).status_code for id_ in (old, new)] == [404, 200]


@pytest.mark.parametrize("change", ["deleted", "pinned"])
async def test_a_pin_ends_if_the_session_has_changed_meanwhile(bench: Bench, change: str) -> None:
    engine, table = bench.engine, bench.app.state.services.responses
    async with bench.http() as http:
        await respond(http, "a", session="talk")
        engine.limit = engine.num_updates
        pin = asyncio.create_task(http.post("/v1/sessions/talk/pin", json={"seconds": 5}))
        await engine.stalled.wait()
        if change == "deleted":
            await http.delete("/v1/sessions/talk")
        else:
            await table.sessions(lambda table: table.pin("talk", "", "of another request", 2**40))
        engine.resume.set()
        reply = await pin
    if change == "deleted":
        assert (reply.status_code, reply.json()["error"]["code"]) == (404, "session_not_found")
        assert engine.unpinned == [engine.requests[-1].id]
    else:
        assert (reply.status_code, engine.unpinned) == (200, ["of another request"])


async def test_a_pinned_session_is_computed_and_protected() -> None:
    config = ServerConfig(served_model_name=("jamba-demo",), dtype="float32", threads=1, max_num_seqs=4)
    engine = EngineClient(config.engine(demo_folder()))
    await engine.start()
    async with served_engine(config, engine) as client:
        root = str(client.base_url).removesuffix("/v1/")
        async with httpx.AsyncClient(base_url=root) as http:
            await respond(http, "Who had a red ball?", session="talk", max_output_tokens=8, temperature=0)
            pinned = (await http.post("/v1/sessions/talk/pin", json={"seconds": 600})).json()
            assert pinned["jamba_cache"]["pinned_tokens"] > 0, json.dumps(pinned)
            assert pinned["jamba_cache"]["used_tokens"] > 0
            assert pinned["pinned_until"] > pinned["created_at"]
            assert engine.stats.pinned_states > 0
            await http.delete("/v1/sessions/talk")
            await respond(http, "Another one.", max_output_tokens=8)  # the engine takes the end of the pin with a step
            assert engine.stats.pinned_states == 0
    await engine.close()
