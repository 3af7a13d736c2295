"""Health, readiness, errors of the engine, request ids, origins, prefixes, and models."""

from __future__ import annotations

import re

import httpx
import openai
import pytest

from jamba_server.engine.errors import EngineDead, EngineFailed, Overloaded
from jamba_server.engine.process.client import Health
from jamba_server.server.http.lifecycle import RETRY_AFTER_SECONDS
from jamba_server.server.version import package_version
from tests.server.asgi import Exchange
from tests.server.conftest import Bench, MakeBench, chat
from tests.server.fake_engine import MAX_MODEL_LEN, FakeEngine

CHAT = "/v1/chat/completions"


# Health and drain -------------------------------------------------------------------------------------------------


async def test_a_healthy_server(bench: Bench) -> None:
    async with bench.http() as http:
        health, ready, version, live = [await http.get(path) for path in ("/health", "/ready", "/version", "/live")]
    assert (live.status_code, live.json()) == (200, {"status": "live", "reason": None})
    assert (health.status_code, health.json()) == (200, {"status": "ok", "reason": None})
    assert (ready.status_code, ready.json()) == (200, {"status": "ready", "reason": None})
    assert version.json() == {"version": package_version()}


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/v1/models", "/metrics", "/", "/docs", "/docs/assets/swagger-ui.css"]
)
async def test_head_is_get_without_its_body(bench: Bench, path: str) -> None:
    async with bench.served() as address, httpx.AsyncClient(base_url=address) as http:
        head, get = await http.head(path), await http.get(path)
    assert (head.status_code, head.content, head.headers["content-type"]) == (200, b"", get.headers["content-type"])


async def test_a_slash_at_the_end_means_nothing(make_bench: MakeBench) -> None:
    async with make_bench(root_path="/jamba").http() as http:
        models, reply = await http.get("/v1/models/"), await http.post(f"{CHAT}/", json=chat())
        prefixed = await http.get("/jamba/v1/models/")
    assert [r.status_code for r in (models, reply, prefixed)] == [200, 200, 200]
    assert models.json() == prefixed.json()
    assert models.json()["object"] == "list"


async def test_a_path_writes_no_lines_into_the_log(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "jamba_server.server.http.middleware")
    async with bench.http() as http:
        await http.get("/nothing%0a2026-01-01 INFO forged" + "x" * 1000)
    [record] = [r for r in caplog.records if "404" in r.getMessage()]
    assert "GET /nothing%0A2026-01-01%20INFO%20forged" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert len(record.getMessage()) < 500


async def test_a_restarting_engine_is_healthy_but_not_ready(bench: Bench) -> None:
    bench.engine.health = Health(alive=True, ready=False, reason="restarting")
    async with bench.http() as http:
        health, ready = [await http.get(path) for path in ("/health", "/ready")]
    assert (health.status_code, health.json()["reason"]) == (200, "restarting")
    assert (ready.status_code, ready.json()) == (503, {"status": "not ready", "reason": "restarting"})


async def test_a_loading_engine_is_alive_but_not_healthy(bench: Bench) -> None:
    bench.engine.load("loading weights", 0.25)
    async with bench.http() as http:
        replies = [await http.get(path) for path in ("/health", "/ready", "/live")]
        bench.engine.start()
        loaded = await http.get("/health")
    assert [reply.status_code for reply in replies] == [503, 503, 200]
    reason = "the engine is loading"
    expected = {"status": "loading", "reason": reason, "phase": "loading weights", "fraction": 0.25}
    assert replies[0].json() == expected
    assert loaded.status_code == 200


async def test_a_dead_engine_says_why(bench: Bench) -> None:
    bench.engine.health = Health(alive=False, ready=False, reason="three deaths in 60 s")
    async with bench.http() as http:
        health, ready, reply = await http.get("/health"), await http.get("/ready"), await http.post(CHAT, json=chat())
        assert (await http.get("/live")).status_code == 200
    assert (health.status_code, health.json()) == (503, {"status": "dead", "reason": "three deaths in 60 s"})
    assert ready.status_code == 503
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_dead")


async def test_drain_refuses_new_work_and_lets_the_old_finish(bench: Bench) -> None:
    bench.engine.limit = 2
    async with Exchange(bench.app, CHAT, chat(stream=True)) as exchange, bench.http() as http:
        assert await exchange.status() == 200
        await bench.engine.stalled.wait()
        bench.app.state.lifecycle.drain()
        ready, health = await http.get("/ready"), await http.get("/health")
        refused = [await http.post(CHAT, json=chat()), await http.post("/v1/completions", json={"prompt": "a"})]
        bench.engine.resume.set()
        received = b""
        while not received.endswith(b"data: [DONE]\n\n"):
            received += await exchange.next_bytes()
    assert (ready.status_code, ready.json()["reason"]) == (503, "the server is shutting down")
    assert health.status_code == 200
    for response in refused:
        assert (response.status_code, response.headers["retry-after"]) == (503, str(RETRY_AFTER_SECONDS))
        assert response.json()["error"]["code"] == "overloaded"
    assert b'"finish_reason":"stop"' in received
    assert bench.engine.aborted == []


# Errors of the engine, as the official client sees them -------------------------------------------------------------


@pytest.mark.parametrize(
    ("refusal", "kind", "status", "code"),
    [
        (Overloaded("full", retry_after=3), openai.InternalServerError, 503, "overloaded"),
        (EngineDead("gone"), openai.InternalServerError, 503, "engine_dead"),
        (EngineFailed("it"), openai.InternalServerError, 500, "engine_failed"),
    ],
)
async def test_errors_of_the_engine(
    bench: Bench,
    refusal: Overloaded | EngineDead | EngineFailed,
    kind: type[openai.APIStatusError],
    status: int,
    code: str,
) -> None:
    bench.engine.refusal = refusal
    async with bench.openai() as client:
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(model="jamba", messages=[{"role": "user", "content": "Hi"}])
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert caught.value.response.headers.get("retry-after") == ("3" if code == "overloaded" else None)


async def test_errors_of_the_request(make_bench: MakeBench) -> None:
    async with make_bench(api_key=("right",)).openai("wrong") as client:
        with pytest.raises(openai.AuthenticationError) as unknown:
            await client.models.list()
    assert unknown.value.code == "invalid_api_key"
    async with make_bench().openai() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.chat.completions.create(model="jamba", messages=[])
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError) as long:
            await client.completions.create(model="jamba", prompt=[5] * MAX_MODEL_LEN)
    assert bad.value.param == "messages"
    assert missing.value.code == "model_not_found"
    assert long.value.code == "context_length_exceeded"


async def test_an_unexpected_error_tells_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(messages: object, **options: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(bench.app.state.services.chat_template, "render_text", broken)
    async with bench.http() as http:
        response = await http.post(CHAT, json=chat())
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert "secret" not in response.text
    assert "secret" in caplog.text


# Request ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ("abc-1.2_3:4", "abc-1.2_3:4"),
        ("a b\tc\u00e9<script>", "abcscript"),
        ("x" * 1000, "x" * 128),
        ("", None),
        ("<>", None),
    ],
)
async def test_request_id(bench: Bench, caplog: pytest.LogCaptureFixture, sent: str, expected: str | None) -> None:
    caplog.set_level("INFO")
    headers = {b"X-Request-Id": sent.encode("latin-1")}
    async with bench.http() as http:
        good = await http.post(CHAT, json=chat(), headers=headers)
        bad = await http.post(CHAT, json={}, headers=headers)
    assert good.headers["x-request-id"] == (expected or good.headers["x-request-id"])
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", good.headers["x-request-id"])
    assert bad.json()["error"]["request_id"] == bad.headers["x-request-id"]
    for response in (good, bad):
        assert f"request_id={response.headers['x-request-id']} " in caplog.text


async def test_one_id_twice_at_once_makes_two_requests(bench: Bench) -> None:
    headers = {"x-request-id": "same"}
    bench.engine.limit = 0
    async with (
        Exchange(bench.app, CHAT, chat(stream=True), headers) as one,
        Exchange(bench.app, CHAT, chat(stream=True), headers) as other,
    ):
        assert [await one.status(), await other.status()] == [200, 200]
        assert len({request.id for request in bench.engine.requests}) == 2


# Origins, prefixes --------------------------------------------------------------------------------------------------


async def test_origins(make_bench: MakeBench) -> None:
    origin = {"Origin": "https://page.example"}
    preflight = {**origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    async with make_bench().http() as http:
        assert "access-control-allow-origin" not in (await http.get("/version", headers=origin)).headers
    async with make_bench(allowed_origins=("https://page.example",), api_key=("key",)).http() as http:
        allowed = await http.options(CHAT, headers=preflight)
        x_api_key = await http.options(CHAT, headers={**preflight, "Access-Control-Request-Headers": "x-api-key"})
        other = await http.options(CHAT, headers={**preflight, "Origin": "https://other.example"})
        error = await http.post(CHAT, json=chat(), headers=origin)
    assert (allowed.status_code, other.status_code, error.status_code) == (200, 400, 401)
    assert "x-api-key" in x_api_key.headers["access-control-allow-headers"]
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert error.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in other.headers


async def test_root_path(make_bench: MakeBench) -> None:
    async with make_bench(root_path="/jamba").http() as http:
        assert (await http.post(f"/jamba{CHAT}", json=chat())).status_code == 200
        assert (await http.post(CHAT, json=chat())).status_code == 200
        assert "/jamba/openapi.json" in (await http.get("/docs")).text
        assert (await http.get("/jamba")).json() == (await http.get("/")).json()


# Models -------------------------------------------------------------------------------------------------------------


async def test_models(bench: Bench) -> None:
    async with bench.openai() as client:
        models = [model async for model in client.models.list()]
        one = await client.models.retrieve("alias")
        with pytest.raises(openai.NotFoundError) as missing:
            await client.models.retrieve("a/b")
    assert [model.id for model in models] == ["jamba", "alias"]
    assert (one.id, one.object, one.owned_by) == ("alias", "model", "jamba")
    assert one.model_dump()["max_model_len"] == MAX_MODEL_LEN
    assert one.model_dump()["demonstration"] is False
    assert missing.value.code == "model_not_found"


async def test_a_demonstration_says_so(make_bench: MakeBench) -> None:
    async with make_bench(demo=True, served_model_name=("jamba-demo",)).http() as http:
        [card] = (await http.get("/v1/models")).json()["data"]
    assert card["demonstration"] is True
    assert "demonstration" in card["description"]


async def test_a_name_with_a_slash(make_bench: MakeBench) -> None:
    async with make_bench(served_model_name=("ai21labs/Jamba",)).http() as http:
        assert (await http.get("/v1/models/ai21labs/Jamba")).json()["id"] == "ai21labs/Jamba"


async def test_the_lifespan_ends(engine: FakeEngine, make_bench: MakeBench) -> None:
    app = make_bench().app
    async with app.router.lifespan_context(app):
        pass
