"""Headers that tell browsers what not to do, on every reply."""

from __future__ import annotations

import asyncio

import pytest

from jamba_server.server.http.loop_lag import measure_lag
from tests.server.conftest import Bench, MakeBench, chat

PATHS = (
    "/",
    "/page/main.js",
    "/docs",
    "/docs/assets/swagger-ui.css",
    "/health",
    "/metrics",
    "/openapi.json",
    "/nothing",
    "/v1/models",
)


@pytest.mark.parametrize("path", PATHS)
async def test_every_reply_has_them(bench: Bench, path: str) -> None:
    async with bench.http() as http:
        reply = await http.get(path, headers={"accept": "text/html"})
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["x-frame-options"] == "DENY"
    assert reply.headers["referrer-policy"] == "no-referrer"
    is_page = reply.headers["content-type"].startswith("text/html")
    policy = reply.headers["content-security-policy"]
    # The chat page names what it loads. /docs is Swagger UI, which needs more.
    assert policy.startswith("default-src 'self'" if is_page and path != "/" else "default-src 'none'")
    assert "unsafe" not in policy or path == "/docs"
    assert "frame-ancestors 'none'" in policy
    assert "strict-transport-security" not in reply.headers
    assert reply.headers.get_list("x-frame-options") == ["DENY"]


async def test_errors_and_streams_have_them_too(make_bench: MakeBench) -> None:
    async with make_bench(api_key=("key",)).http() as http:
        refused = await http.post("/v1/chat/completions", json=chat())
        streamed = await http.post("/v1/chat/completions", json=chat(stream=True), headers={"x-api-key": "key"})
    assert (refused.status_code, streamed.status_code) == (401, 200)
    assert {reply.headers["x-content-type-options"] for reply in (refused, streamed)} == {"nosniff"}


async def test_with_tls_browsers_are_told_to_stay_with_it(make_bench: MakeBench) -> None:
    async with make_bench(ssl_certfile="a", ssl_keyfile="b").http() as http:
        reply = await http.get("/health")
    assert reply.headers["strict-transport-security"].startswith("max-age=")


async def test_the_lag_of_a_blocked_loop_is_measured() -> None:
    lags: list[float] = []
    task = asyncio.create_task(measure_lag(lags.append, interval=0.01))
    await asyncio.sleep(0)
    blocked_until = asyncio.get_running_loop().time() + 0.06
    while asyncio.get_running_loop().time() < blocked_until:
        pass
    while not lags:
        await asyncio.sleep(0)
    task.cancel()
    assert lags[0] >= 0.04
