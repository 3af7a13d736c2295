"""API keys: which requests carry one, and what is open without."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path

import pytest

from jamba_server.engine.errors import ConfigError
from jamba_server.server.config_sources import load_config
from tests.server.conftest import Bench, MakeBench, chat

CHAT = "/v1/chat/completions"
GUARDED = (
    "/v1/models", "/v1/models/jamba", "/version", "/metrics", "/tokenizer_info", "/nothing", "/docs/nothing",
    "/docs/assets", "//health",
)  # fmt: skip
KEY = {"Authorization": "Bearer second key"}


@pytest.fixture
def guarded(make_bench: MakeBench) -> Bench:
    return make_bench(api_key=("first key", "second key"))


@pytest.mark.parametrize("path", GUARDED)
async def test_every_path_wants_a_key(guarded: Bench, path: str) -> None:
    async with guarded.http() as http:
        without, within = [await http.get(f"http://server{path}", headers=headers) for headers in ({}, KEY)]
    assert without.status_code == 401
    assert without.headers["www-authenticate"] == "Bearer"
    assert without.json()["error"]["code"] == "invalid_api_key"
    assert without.json()["error"]["type"] == "invalid_request_error"
    assert within.status_code == (404 if any(part in path for part in ("nothing", "assets", "//h")) else 200)


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "Bearer first", "Bearer first key2", "Basic first key", "first key", "Bearer é"]
)
async def test_wrong_keys(guarded: Bench, value: str) -> None:
    async with guarded.http() as http:
        response = await http.post(CHAT, json=chat(), headers={b"Authorization": value.encode("latin-1")})
    assert response.status_code == 401
    assert guarded.engine.requests == []


KEYS: list[tuple[dict[str, str], int]] = [
    ({"Authorization": "Bearer first key"}, 200),
    ({"Authorization": "bearer second key"}, 200),
    ({"X-Api-Key": "first key"}, 200),
    ({"x-api-key": " second key "}, 200),
    ({"x-api-key": "second ke"}, 401),
    ({"x-api-key": ""}, 401),
    ({"x-api-key": "Bearer first key"}, 401),
    # one valid key is enough
    ({"Authorization": "Bearer none", "x-api-key": "first key"}, 200),
    ({"Authorization": "Bearer first key", "x-api-key": "none"}, 200),
    ({"Authorization": "Bearer first key", "x-api-key": "second key"}, 200),
    ({"Authorization": "Bearer none", "x-api-key": "none"}, 401),
    ({"Authorization": "Basic first key", "x-api-key": ""}, 401),
]


@pytest.mark.parametrize(("headers", "status"), KEYS)
async def test_keys_in_either_header(guarded: Bench, headers: dict[str, str], status: int) -> None:
    async with guarded.http() as http:
        assert (await http.post(CHAT, json=chat(), headers=headers)).status_code == status


async def test_every_key_is_compared_whatever_is_sent(guarded: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []

    def compare(sent: bytes, known: bytes) -> bool:
        compared[-1] += 1
        return sent == known

    monkeypatch.setattr(hmac, "compare_digest", compare)
    async with guarded.http() as http:
        for headers, _ in KEYS:
            compared.append(0)
            await http.get("/version", headers=headers)
    assert set(compared) == {4}  # two headers, two keys


async def test_what_is_open(guarded: Bench, make_bench: MakeBench) -> None:
    asset = "/docs/assets/swagger-ui.css"
    async with guarded.http() as http:
        for path in ("/health", "/ready", "/live", "/", "/docs", "/openapi.json", asset):
            assert (await http.get(path)).status_code == 200, path
        assert (await http.post("/", json={})).status_code == 405
        assert (await http.get("/docs/assets/../../v1/models")).status_code != 200
    async with make_bench(api_key=("key",), metrics_public=True).http() as http:
        assert [(await http.get(path)).status_code for path in ("/metrics", "/version")] == [200, 401]


async def test_open_paths_behind_a_prefix(make_bench: MakeBench) -> None:
    async with make_bench(api_key=("key",), root_path="/jamba").http() as http:
        paths = ("/health", "/jamba/health", "/jamba", "/jamba/", "/jamba/docs", "/jamba/docs/assets/swagger-ui.css")
        assert [(await http.get(path)).status_code for path in paths] == [200] * 6
        paths = ("/jamba/version", "/jamba/jamba/health", "/jambahealth", "/jamba/jamba", "/jambadocs")
        assert [(await http.get(path)).status_code for path in paths] == [401] * 5
        assert (await http.get("/jamba/version", headers={"Authorization": "Bearer key"})).status_code == 200


async def test_requests_with_different_keys_belong_to_different_tenants(guarded: Bench) -> None:
    """Tenants take turns in the scheduler. The engine sees a part of a key's hash and never the key."""
    async with guarded.http() as http:
        for key in ("second key", "first key"):
            assert (await http.post(CHAT, json=chat(), headers={"x-api-key": key})).status_code == 200
    hashes = [hashlib.sha256(key).hexdigest() for key in (b"second key", b"first key")]
    assert [request.tenant for request in guarded.engine.requests] == [f"key-{each[:12]}" for each in hashes]
    assert len({request.parent for request in guarded.engine.requests}) == 2


# Keys as options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["", " ", "\n", ",", ["good", " "], [""]])
def test_a_blank_key_is_no_key(value: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--api-key is"):
        load_config({"api_key": value}, {})
    file = tmp_path / "jamba.yaml"
    file.write_text(json.dumps({"api_key": value}))
    with pytest.raises(ConfigError, match="api_key is"):
        load_config({}, {}, file)


@pytest.mark.parametrize("value", ["", " ", "\n"])
def test_an_empty_variable_starts_no_open_server(value: str) -> None:
    with pytest.raises(ConfigError, match="JAMBA_API_KEY is"):
        load_config({}, {"JAMBA_API_KEY": value})


def test_a_line_feed_is_no_part_of_a_key(tmp_path: Path) -> None:
    file = tmp_path / "jamba.yaml"
    file.write_text('api_key: "yaml\\n"')
    assert load_config({}, {}, file).api_key == ("yaml",)
    assert load_config({}, {"JAMBA_API_KEY": "one, two\n"}).api_key == ("one", "two")
    assert load_config({"api_key": ["flag\r\n"]}, {}).api_key == ("flag",)
