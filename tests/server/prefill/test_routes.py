"""The routes and options of the roles, without a model."""

from __future__ import annotations

from typing import Any

import pytest

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.terminal import describe_role
from jamba_server.server.config import ServerConfig
from tests.server.conftest import MakeBench, chat

HEX = "ab" * 32


async def test_a_prefill_server_writes_no_replies(make_bench: MakeBench) -> None:
    bench = make_bench(role="prefill")
    async with bench.http() as http:
        for path, body in (("/v1/chat/completions", chat()), ("/v1/batches", {}), ("/v1/embeddings", {"input": "a"})):
            reply = await http.post(path, json=body)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")
            assert "--role prefill" in reply.json()["error"]["message"]
        for path in ("/health", "/ready", "/v1/models", "/metrics", "/openapi.json", "/docs"):
            assert (await http.get(path)).status_code == 200, path
        assert "/v1/prefill" in (await http.get("/openapi.json")).json()["paths"]
        assert "chat page" not in (await http.get("/", headers={"Accept": "text/html"})).text
    assert bench.engine.requests == []


async def test_other_servers_compute_no_prompts_for_others(make_bench: MakeBench) -> None:
    async with make_bench().http() as http:
        reply = await http.post("/v1/prefill", json={"prompt": [5], "fingerprint": HEX})
        assert reply.status_code == 404
        assert "/v1/prefill" not in (await http.get("/openapi.json")).json()["paths"]


async def test_a_key_is_needed(make_bench: MakeBench) -> None:
    async with make_bench(role="prefill", api_key=("k",)).http() as http:
        assert (await http.post("/v1/prefill", json={"prompt": [5], "fingerprint": HEX})).status_code == 401
        assert (await http.get(f"/v1/prefill/segments/{HEX}")).status_code == 401


async def test_a_prompt_needs_an_open_tier(make_bench: MakeBench) -> None:
    bench = make_bench(role="prefill")
    async with bench.http() as http:
        reply = await http.post("/v1/prefill", json={"prompt": [5], "fingerprint": HEX})
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
        assert "not open yet" in reply.json()["error"]["message"]
        bench.app.state.lifecycle.drain()
        reply = await http.post("/v1/prefill", json={"prompt": [5], "fingerprint": HEX})
        assert "shutting down" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": "text"}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"fingerprint": "x"}, "fingerprint"),
        ({"fingerprint": None}, "fingerprint"),
        ({"cache_salt": "x" * 5000}, "cache_salt"),
        ({"save_positions": [-1]}, "save_positions"),
        ({"save_positions": [1] * 5000}, "save_positions"),
        ({"priority": 2**60}, "priority"),
    ],
)
async def test_bad_requests_get_400(make_bench: MakeBench, change: dict[str, Any], param: str) -> None:
    async with make_bench(role="prefill").http() as http:
        reply = await http.post("/v1/prefill", json={"prompt": [5], "fingerprint": HEX} | change)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"].startswith(param)


async def test_keys_of_segments_are_hexadecimal(make_bench: MakeBench) -> None:
    async with make_bench(role="prefill").http() as http:
        for key in ("..%2f..%2fetc", "ab", HEX.upper(), "g" * 64):
            assert (await http.get(f"/v1/prefill/segments/{key}")).status_code in (400, 404), key


URL = ("http://a:1",)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"role": "prefill"}, "needs state_cache_disk_path"),
        ({"role": "decode", "prefill_url": URL}, "needs state_cache_disk_path"),
        ({"role": "decode", "state_cache_disk_path": "/x"}, "prefill_url is empty"),
        ({"prefill_url": URL}, "role is 'both' and prefill_url is http://a:1"),
        ({"role": "prefill", "state_cache_disk_path": "/x", "prefill_url": URL}, "go together"),
        ({"role": "decode", "state_cache_disk_path": "/x", "prefill_url": ("a:1",)}, "must be like http"),
        ({"role": "decode", "state_cache_disk_path": "/x", "prefill_url": ("http://",)}, "must be like http"),
        ({"role": "decode", "state_cache_disk_path": "/x", "prefill_url": ("http://a:x",)}, "must be like http"),
        ({"role": "decode", "state_cache_disk_path": "/x", "prefill_url": ("http://[::1",)}, "must be like http"),
        ({"role": "decode", "state_cache_disk_path": "/x", "prefill_url": ("http://a/?b",)}, "must be like http"),
        ({"role": "prefill", "state_cache_disk_path": "/x", "data_dir": "/y"}, "data_dir"),
    ],
)
def test_options_that_contradict_each_other(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerConfig(**settings).check()


def test_a_line_says_which_role_was_chosen() -> None:
    assert describe_role(ServerConfig()) == []
    [line] = describe_role(ServerConfig(role="prefill"))
    assert "computes prompts for decode servers" in line
    [line] = describe_role(ServerConfig(role="decode", prefill_url=("http://a:1", "http://b:2")))
    assert "http://a:1, http://b:2" in line
    assert "at least 512 tokens" in line


def test_the_key_of_prefill_servers_is_not_printed() -> None:
    assert "secret" not in str(ServerConfig(prefill_api_key="secret").non_defaults())
