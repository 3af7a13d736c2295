"""Sessions that move to another server in a file."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from jamba_server.engine.disk_tier.transfer import Arrivals
from jamba_server.engine.process.client import EngineClient
from jamba_server.server.config import ServerConfig
from jamba_server.server.demo import demo_folder
from jamba_server.server.http.schemas.sessions import SESSION_FILE
from jamba_server.server.http.session_files.disk import found_segments
from tests.server.conftest import MakeBench
from tests.server.real_engine import served_engine

HEADERS = {"Content-Type": SESSION_FILE}
PREFIX = 48  # bytes before the header


async def respond(http: httpx.AsyncClient, text: str, **body: Any) -> dict[str, Any]:
    reply = await http.post("/v1/responses", json={"input": text, "session": "talk", **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def export(http: httpx.AsyncClient, **headers: str) -> bytes:
    reply = await http.get("/v1/sessions/talk/export", headers=headers)
    assert (reply.status_code, reply.headers["content-type"]) == (200, SESSION_FILE)
    assert len(reply.content) == int(reply.headers["content-length"])
    return reply.content


async def send(http: httpx.AsyncClient, file: bytes, path: str = "", **headers: str) -> httpx.Response:
    return await http.post(f"/v1/sessions/import{path}", content=file, headers=HEADERS | headers)


def header_of(file: bytes) -> dict[str, Any]:
    return json.loads(file[PREFIX : PREFIX + struct.unpack_from("<Q", file, 8)[0]])


def with_text(file: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The file with another header, whose hash is right."""
    end = PREFIX + struct.unpack_from("<Q", file, 8)[0]
    text = change(file[PREFIX:end])
    return file[:8] + struct.pack("<Q32s", len(text), sha256(text).digest()) + text + file[end:]


def with_header(file: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    def changed(text: bytes) -> bytes:
        header = json.loads(text)
        change(header)
        return json.dumps(header).encode()

    return with_text(file, changed)


async def test_a_session_moves_with_its_responses(make_bench: MakeBench) -> None:
    one, other = make_bench(), make_bench()
    async with one.http() as http:
        first = await respond(http, "a", instructions="Be kind.")
        last = await respond(http, "b", instructions="Be kind.")
        file = await export(http)
        await respond(http, "c")
        expected = one.engine.requests[-1].prompt
    async with other.http() as http:
        reply = await send(http, file)
        assert reply.headers["x-warning"].startswith("the prefix cache's segments are left out: this server has no")
        moved = reply.json()
        assert (moved["id"], moved["num_responses"], moved["num_segments"]) == ("talk", 2, 0)
        assert moved["segments_left_out"] == "no_disk_tier"
        stored = (await http.get(f"/v1/responses/{moved['response_id']}")).json()
        before = (await http.get(f"/v1/responses/{stored['previous_response_id']}")).json()
        for found, original in ((before, first), (stored, last)):
            assert found["id"] != original["id"]
            changed = {"id", "previous_response_id"}
            assert {k: v for k, v in found.items() if k not in changed} == {
                k: v for k, v in original.items() if k not in changed
            }
        await respond(http, "c")
        assert other.engine.requests[-1].prompt == expected
        taken = await send(http, file)
        assert (taken.status_code, taken.json()["error"]["param"]) == (400, "id")
        copy = (await send(http, file, "?id=copy")).json()
        assert (copy["id"], copy["num_responses"]) == ("copy", 2)
        assert [s["id"] for s in (await http.get("/v1/sessions")).json()["data"]] == ["copy", "talk"]


async def test_what_is_imported_belongs_to_the_importing_key(make_bench: MakeBench) -> None:
    bench = make_bench(api_key=("one", "two"))
    one, two = ({"Authorization": f"Bearer {key}"} for key in ("one", "two"))
    async with bench.http() as http:
        await http.post("/v1/responses", json={"input": "a", "session": "talk"}, headers=one)
        assert (await http.get("/v1/sessions/talk/export", headers=two)).status_code == 404
        moved = (await send(http, await export(http, **one), **two)).json()
        path = f"/v1/responses/{moved['response_id']}"
        assert (await http.get(path, headers=two)).status_code == 200
        assert (await http.get(path, headers=one)).status_code == 404
        assert (await http.get("/v1/sessions/talk", headers=one)).json()["response_id"] != moved["response_id"]


async def test_keys_that_share_prefixes_take_no_segments(make_bench: MakeBench) -> None:
    bench = make_bench(api_key=("one",), share_prefix_cache=True)
    key = {"Authorization": "Bearer one"}
    async with bench.http() as http:
        await http.post("/v1/responses", json={"input": "a", "session": "talk"}, headers=key)
        file = with_header(await export(http, **key), lambda h: h.update(segments=[3])) + b"abc"
        reply = await send(http, file, "?id=new", **key)
    assert (reply.json()["segments_left_out"], reply.json()["num_segments"]) == ("shared_cache", 0)
    assert "--share-prefix-cache" in reply.headers["x-warning"]


async def test_an_empty_session(make_bench: MakeBench) -> None:
    bench = make_bench()
    async with bench.http() as http:
        await respond(http, "a")
        await http.post("/v1/sessions/talk/rewind", json={})
        moved = (await send(http, await export(http), "?id=new")).json()
        assert (moved["response_id"], moved["num_responses"]) == (None, 0)


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return header["turns"][0]


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda file: b"", "ends 48 bytes too early"),
    "another file": (lambda file: b"PK\3\4" + file[4:], "not the file of a session"),
    "torn": (lambda file: file[:-1], "ends 1 bytes too early"),
    "longer": (lambda file: file + b"x", "goes on after its end"),
    "a byte differs": (lambda file: file[:-2] + bytes([file[-2] ^ 1]) + file[-1:], "not the one that was written"),
    "a huge header": (lambda file: file[:8] + struct.pack("<Q", 1 << 62) + file[16:], "limit is"),
    "no object": (lambda file: with_header(file, lambda h: h.clear()), "missing required field"),
    "a path as name": (lambda file: with_header(file, lambda h: h.update(session="../x")), "is not one of a session"),
    "negative size": (lambda file: with_header(file, lambda h: h.update(segments=[-1])), "none may be empty"),
    "many segments": (lambda file: with_header(file, lambda h: h.update(segments=[1] * 20_000)), "at most 16384"),
    "missing segment": (lambda file: with_header(file, lambda h: h.update(segments=[1 << 60])), "bytes too early"),
    "an item of no type": (
        lambda file: with_header(file, lambda h: _first(h).update(input=[{"type": "spell"}])),
        "response 0 is not valid",
    ),
    "a reference": (
        lambda file: with_header(file, lambda h: _first(h).update(input=[{"type": "item_reference", "id": "x"}])),
        "refers to items",
    ),
    "no response": (lambda file: with_header(file, lambda h: _first(h).update(response=[])), "response 0 is not valid"),
    "an output of no type": (
        lambda file: with_header(file, lambda h: _first(h)["response"].update(output=[{"type": "x"}])),
        "response 0 is not valid",
    ),
    "a tool that no request may have": (
        lambda file: with_header(file, lambda h: _first(h)["response"].update(tools=[{"x": 1}])),
        "response 0 is not valid: response.tools.0",
    ),
    "a number that is too large": (
        lambda file: with_text(file, lambda text: text.replace(b'"created_at"', b'"x": 1e999, "created_at"')),
        "response 0 is not valid: response: Number out of range",
    ),
    "a number that is too long": (
        lambda file: with_text(file, lambda text: text.replace(b'"created_at"', b'"x": 1' + b"0" * 5000 + b', "c"')),
        "limit of 4300",
    ),
    "invalid UTF-8": (
        lambda file: with_text(file, lambda text: text.replace(b"talk", b"ta\xffk")),
        "The header is not",
    ),
    "deep": (lambda file: _nested(file), "nests deeper"),
}


def _nested(file: bytes) -> bytes:
    text = b'{"turns":' + b"[" * 1000 + b"]" * 1000 + b"}"
    return file[:8] + struct.pack("<Q32s", len(text), sha256(text).digest()) + text


async def test_bad_files_get_400_and_leave_nothing(make_bench: MakeBench) -> None:
    one, other = make_bench(), make_bench()
    async with one.http() as http:
        await respond(http, "a")
        file = await export(http)
    async with other.http() as http:
        for name, (change, words) in BAD.items():
            reply = await send(http, change(file))
            assert reply.status_code == 400, f"{name}: {reply.text}"
            assert words in reply.json()["error"]["message"], name
        assert (await http.get("/v1/sessions")).json()["data"] == []
        form = await http.post("/v1/sessions/import", files={"file": file})
        assert form.status_code == 415, "a page of another site could send it"
        assert (await send(http, file, "?id=a/b")).json()["error"]["param"] == "id"
        assert (await send(http, file)).status_code == 200


async def test_the_size_is_limited(make_bench: MakeBench) -> None:
    one, small = make_bench(), make_bench(max_body_bytes=1000)
    few = make_bench(max_stored_responses=1)
    async with one.http() as http:
        for text in "ab":
            await respond(http, text)
        file = await export(http)
    async with small.http() as http:
        assert "--max-body-bytes" in (await send(http, file)).json()["error"]["message"]
    async with few.http() as http:
        assert "--max-stored-responses" in (await send(http, file)).json()["error"]["message"]


@asynccontextmanager
async def served(disk: Path | None, **settings: Any) -> AsyncGenerator[tuple[httpx.AsyncClient, EngineClient]]:
    config = ServerConfig(
        served_model_name=("jamba-demo",),
        dtype="float32",
        threads=1,
        max_num_seqs=4,
        state_cache_disk_path=None if disk is None else str(disk),
        **settings,
    )
    engine = EngineClient(config.engine(demo_folder()))
    await engine.start()
    try:
        async with served_engine(config, engine) as client:
            root = str(client.base_url).removesuffix("/v1/")
            async with httpx.AsyncClient(base_url=root, timeout=30) as http:
                # A thread of the engine hashes the weights before it opens the disk tier.
                while disk is not None and not (engine.stats.tiers and engine.stats.tiers.fingerprint):
                    await http.get("/health")
                yield http, engine
    finally:
        await engine.close()


GREEDY = {"max_output_tokens": 8, "temperature": 0, "cache": {"explain": True}}
FIRST = " ".join(["once upon a time there was a dog"] * 10)


async def test_a_conversation_that_does_not_fit_is_exported_without_segments(tmp_path: Path) -> None:
    async with served(tmp_path, max_model_len=64) as (http, _):
        await respond(http, "Who had a red ball?", max_output_tokens=4)
        await respond(http, "And then?", max_output_tokens=24)
        for _ in range(3):
            await http.post("/v1/responses", json={"input": "a dog", "session": "talk", "truncation": "auto"})
        reply = await http.get("/v1/sessions/talk/export")
        assert header_of(reply.content)["segments_left_out"] == "not_cached"
        assert len(header_of(reply.content)["turns"]) == 5
        wanted = await http.get("/v1/sessions/talk/export?segments=false")
        assert header_of(wanted.content)["segments_left_out"] == "not_wanted"
        assert "x-warning" not in wanted.headers


async def found(engine: EngineClient, number: int) -> None:
    """Returns when the engine has found `number` segments, for which it looks once a second."""
    while found_segments(engine) < number:
        await asyncio.sleep(0.01)


def full_disk(*_: object) -> None:
    raise OSError("No space left on device")


async def test_the_next_server_computes_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(tmp_path / "one") as (http, _):
        await respond(http, FIRST, **GREEDY)
        await respond(http, "Who had a red ball?", **GREEDY)
        file = await export(http)
        expected = await respond(http, "And then?", **GREEDY)
        assert expected["jamba_cache"]["tier"] == "device"
    num_segments = len(header_of(file)["segments"])
    assert num_segments, "the disk tier has the conversation"
    async with served(tmp_path / "other") as (http, engine):
        hurt = bytearray(file)
        hurt[-5] ^= 1
        reply = await send(http, bytes(hurt))
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_session_file")
        assert "cannot be used" in reply.json()["error"]["message"]
        assert (await http.get("/v1/sessions")).json()["data"] == []
        await found(engine, num_segments - 1)  # those before the damaged one are kept
        foreign = await send(http, with_header(file, lambda h: h.update(fingerprint="0" * 64)), "?id=foreign")
        assert foreign.json()["segments_left_out"] == "other_model"
        with monkeypatch.context() as patch:
            patch.setattr(Arrivals, "take", full_disk)
            full = (await send(http, file, "?id=full")).json()
        assert (full["segments_left_out"], full["num_responses"]) == ("not_written", 2)
        large = with_header(file, lambda h: h["segments"].__setitem__(0, 1 << 40))
        assert "has at most" in (await send(http, large, "?id=large")).json()["error"]["message"]
        moved = (await send(http, file)).json()
        assert (moved["segments_left_out"], moved["num_segments"]) == (None, num_segments)
        await found(engine, num_segments)
        reply = await respond(http, "And then?", **GREEDY)
        assert reply["output"][0]["content"] == expected["output"][0]["content"]
        cache = reply["jamba_cache"]
        assert (cache["tier"], cache["used_tokens"]) == ("disk", expected["jamba_cache"]["used_tokens"])
        assert cache["restore_ms"] > 0
        assert (await respond(http, "Who was it?", **GREEDY))["jamba_cache"]["tier"] == "device"
        assert engine.stats.hits_disk_total == cache["used_tokens"]
        assert not list((tmp_path / "other").glob("*/*.part")), "nothing unfinished is left"
