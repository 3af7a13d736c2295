"""When a prefill server that has failed is asked again, and which replies are errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from jamba_server.engine.types import Request, SamplingParams
from jamba_server.server.http.prefill.peer import LONGEST_REST, MAX_REPLY_BYTES, HandOverFailed, PrefillServer


def test_a_server_rests_longer_after_each_failure_in_a_row() -> None:
    now = 0.0
    server, rests = PrefillServer("http://a:1", None, clock=lambda: now), list[float]()
    for _ in range(8):
        server.failed()
        server.failed()  # a request that was sent before the first failure
        began = now
        while server.rests:
            now += 0.5
        rests.append(now - began)
    assert rests == [1, 2, 4, 8, 16, 32, 60, LONGEST_REST]
    server.succeeded()
    server.failed()
    now += 1
    assert not server.rests


def answering(answer: Callable[[httpx.Request], httpx.Response]) -> PrefillServer:
    return PrefillServer("http://a:1/path", "k", transport=httpx.MockTransport(answer))


REQUEST = Request(id="r", prompt=[5, 6, 7, 8, 9], params=SamplingParams(), save_positions=(2, 5), cache_salt="a\0b")


async def compute(server: PrefillServer) -> Any:
    return await server.compute(REQUEST, 4, "f", 2.5)


async def test_what_is_asked_for() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"segments": [{"end": 4, "num_bytes": 9}], "cached_tokens": 0})

    server = answering(answer)
    [segment] = await compute(server)
    assert (segment.end, segment.num_bytes, server.prompt_tokens) == (4, 9, 0)
    [request] = seen
    assert str(request.url) == "http://a:1/path/v1/prefill"
    assert (request.headers["x-request-timeout"], request.headers["authorization"]) == ("2.500", "Bearer k")
    body = httpx.Response(200, content=request.content).json()
    assert body == {
        "prompt": [5, 6, 7, 8],
        "fingerprint": "f",
        "cache_salt": "a\0b",
        "priority": 0,
        "save_positions": [2],
    }
    await server.close()


@pytest.mark.parametrize(
    ("reply", "result", "rests"),
    [
        (httpx.Response(503, json={"error": {"message": "full"}}), "refused", True),
        (httpx.Response(500, text="<html>"), "refused", True),
        (httpx.Response(400, json={"error": {"message": "too long"}}), "refused", False),
        (httpx.Response(409, json={"error": {"message": "another"}}), "other_model", True),
        (httpx.Response(200, text="no JSON"), "damaged", True),
        (httpx.Response(200, json={"segments": [], "cached_tokens": 0}), "damaged", True),
        (httpx.Response(200, content=b"x" * (MAX_REPLY_BYTES + 1)), "damaged", True),
        (httpx.Response(200, json={"segments": [{"end": 5, "num_bytes": 1}], "cached_tokens": 0}), "damaged", True),
        (
            httpx.Response(200, json={"segments": [{"end": e, "num_bytes": 1} for e in (3, 2, 4)], "cached_tokens": 0}),
            "damaged",
            True,
        ),
    ],
)
async def test_bad_replies(reply: httpx.Response, result: str, rests: bool) -> None:
    server = answering(lambda request: reply)
    with pytest.raises(HandOverFailed) as failure:
        await compute(server)
    assert (failure.value.result, failure.value.rests, server.prompt_tokens) == (result, rests, 0)
    await server.close()


@pytest.mark.parametrize("size", [2, 4])
async def test_a_file_must_have_the_size_in_the_list(tmp_path: Path, size: int) -> None:
    server = answering(lambda request: httpx.Response(200, content=b"abc"))
    await server.fetch(b"k", tmp_path / "good", 3)
    assert (tmp_path / "good").read_bytes() == b"abc"
    assert (tmp_path / "good").stat().st_mode & 0o777 == 0o600
    with pytest.raises(HandOverFailed, match="came with 3 bytes") as failure:
        await server.fetch(b"k", tmp_path / "bad", size)
    assert failure.value.result == "damaged"
    await server.close()
