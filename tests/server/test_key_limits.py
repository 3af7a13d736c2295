"""Limits of API keys: requests and tokens a minute, concurrency, and the file that they are read from."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from jamba_server.engine.errors import ConfigError, RequestRejected
from jamba_server.server.http.errors import RateLimited
from jamba_server.server.http.limits.account import Account, duration
from jamba_server.server.http.limits.bucket import Bucket
from jamba_server.server.http.limits.key_file import Key, read_keys
from jamba_server.server.http.limits.keys import Keys
from tests.server.conftest import Bench, MakeBench, chat

CHAT = "/v1/chat/completions"


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


# Buckets and accounts -------------------------------------------------------------------------------------------------


def test_a_bucket_fills_up_evenly(clock: FakeClock) -> None:
    bucket = Bucket(60, clock)
    bucket.spend(60)
    assert (bucket.level, bucket.seconds_until(1)) == (0, 1)
    clock.now += 2.5
    assert (bucket.level, bucket.seconds_until(60)) == (2.5, 57.5)
    clock.now += 1000
    assert bucket.level == 60


def test_a_debt_is_paid_before_anything_can_be_spent(clock: FakeClock) -> None:
    bucket = Bucket(60, clock)
    bucket.spend(90)
    assert (bucket.level, bucket.seconds_until(1)) == (-30, 31)


def test_requests_per_minute(clock: FakeClock) -> None:
    account = Account(Key(key="k", requests_per_minute=2), clock)
    for _ in range(2):
        with account.request():
            pass
    with pytest.raises(RateLimited, match="may send 2 requests per minute") as caught, account.request():
        pass
    assert (caught.value.type, caught.value.retry_after) == ("requests", 30)
    clock.now += 30
    with account.request():
        pass


def test_requests_at_the_same_time(clock: FakeClock) -> None:
    account = Account(Key(key="k", max_concurrent=1), clock)
    match = "1 requests with this API key are running"
    with account.request(), pytest.raises(RateLimited, match=match), account.request():
        pass
    with account.request():
        pass


def test_tokens_per_minute(clock: FakeClock) -> None:
    account = Account(Key(key="k", tokens_per_minute=60), clock)
    account.take_prompt(50)
    with pytest.raises(RateLimited, match="60 tokens per minute; 10 are left, and the prompt has 11") as caught:
        account.take_prompt(11)
    assert (caught.value.type, caught.value.retry_after) == ("tokens", 1)
    account.take_reply(30)  # a reply may go beyond the limit
    with pytest.raises(RateLimited, match="0 are left") as caught, account.request():
        pass
    assert caught.value.retry_after == 21
    with pytest.raises(RequestRejected, match="61 tokens, but this API key may use 60 tokens"):
        account.take_prompt(61)


def test_headers_say_what_is_left(clock: FakeClock) -> None:
    account = Account(Key(key="k", requests_per_minute=60, tokens_per_minute=1000), clock)
    with account.request():
        account.take_prompt(250)
    assert account.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "750",
        "x-ratelimit-reset-tokens": "15s",
    }
    assert Account(Key(key="k"), clock).headers() == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0ms"), (0.0121, "13ms"), (1, "1s"), (7.66, "7.66s"), (90, "1m30s"), (3600, "60m0s")]
)
def test_durations_have_the_form_of_openais_headers(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_other_limits_keep_what_was_used(clock: FakeClock) -> None:
    keys = Keys([Key(key="a", name="team", requests_per_minute=10, tokens_per_minute=10)], clock)
    account = keys.account("team")
    assert account is not None
    with account.request():
        account.take_prompt(10)
    keys.replace([Key(key="b", name="team", requests_per_minute=20, tokens_per_minute=10)])
    assert keys.account("team") is account
    assert account.headers()["x-ratelimit-remaining-requests"] == "20"
    assert account.headers()["x-ratelimit-remaining-tokens"] == "0"
    assert (keys.owner_of([b"a"]), keys.owner_of([b"", b"b"])) == (None, "team")


# The file -------------------------------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> str:
    (folder / "keys").write_text(text)
    return str(folder / "keys")


def test_a_mounted_secret_with_a_line_feed(tmp_path: Path) -> None:
    assert read_keys((), write(tmp_path, "sk-secret\n")) == (Key(key="sk-secret"),)


def test_lines_of_a_key_file(tmp_path: Path) -> None:
    path = write(tmp_path, '# ours\n\n  plain  \r\n{"key": " limited ", "name": "batch", "max_concurrent": 2}\n')
    found = read_keys(("flag",), path)
    assert found == (Key(key="flag"), Key(key="plain"), Key(key="limited", name="batch", max_concurrent=2))
    assert [key.owner[:4] for key in found] == ["key-", "key-", "batc"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        (" \n# nothing\n", "has no key"),
        ('{"key": ""}', "line 1: Expected `str` of length >= 1"),
        ('{"key": " "}', "line 1: the key is blank"),
        ('plain\n{"key": "a", "limit": 5}', "line 2: Object contains unknown field `limit`"),
        ('{"key": "a", "tokens_per_minute": 0}', "line 1: Expected `int` >= 1"),
        ('{"key": "hidden"', "line 1 begins with a brace but is not a JSON object"),
        ('hidden\n{"key": "hidden", "name": "b"}', "is given twice"),
    ],
)
def test_a_key_file_with_a_mistake(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_keys((), write(tmp_path, text))
    assert "hidden" not in str(caught.value)


# Through the server ---------------------------------------------------------------------------------------------------


@pytest.fixture
def limited(make_bench: MakeBench, tmp_path: Path) -> Bench:
    text = (
        '{"key": "two", "name": "two", "requests_per_minute": 2}\n'
        '{"key": "few", "name": "few", "tokens_per_minute": 40}\n'
        '{"key": "one", "name": "one", "max_concurrent": 1}\nfree\n'
    )
    return make_bench(api_key_file=write(tmp_path, text))


def key(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {name}"}


async def test_the_official_client_sees_a_rate_limit(limited: Bench) -> None:
    message: Any = [{"role": "user", "content": "Hi"}]
    async with limited.openai("two") as client:
        raw = await client.chat.completions.with_raw_response.create(model="jamba", messages=message)
        assert raw.headers["x-ratelimit-limit-requests"] == "2"
        assert raw.headers["x-ratelimit-remaining-requests"] == "1"
        await client.chat.completions.create(model="jamba", messages=message)
        assert [model.id async for model in client.models.list()] == ["jamba", "alias"]  # reading is free
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="jamba", messages=message)
    response = caught.value.response
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
    assert 0 < int(response.headers["retry-after"]) <= 30
    assert response.headers["x-ratelimit-remaining-requests"] == "0"


async def test_keys_do_not_share_their_limits(limited: Bench) -> None:
    async with limited.http() as http:
        statuses = [
            (await http.post(CHAT, json=chat(), headers=key(k))).status_code for k in ("two",) * 3 + ("free",) * 3
        ]
        free = await http.post(CHAT, json=chat(), headers=key("free"))
    assert statuses == [200, 200, 429, 200, 200, 200]
    assert not any(name.startswith("x-ratelimit") for name in free.headers)
    assert [request.tenant for request in limited.engine.requests[:2]] == ["two", "two"]


async def test_prompts_and_replies_use_up_tokens(limited: Bench) -> None:
    async with limited.http() as http:
        first = await http.post(CHAT, json=chat(), headers=key("few"))
        used = first.json()["usage"]["total_tokens"]
        second = await http.post(CHAT, json=chat(stream=True), headers=key("few"))
        left = int(second.headers["x-ratelimit-remaining-tokens"])
        long = await http.post(CHAT, json=chat(messages=[{"role": "user", "content": "the " * 50}]), headers=key("few"))
    assert 40 - 2 * used <= left < 40
    assert (long.status_code, long.json()["error"]["message"][:14]) == (400, "The prompt has")


async def test_too_many_prompt_tokens_for_now_get_429_inside_the_route(limited: Bench) -> None:
    account = limited.app.state.services.edge.keys.account("few")
    account.take_reply(38)
    async with limited.http() as http:
        refused = await http.post(CHAT, json=chat(), headers=key("few"))
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "tokens")
    assert int(refused.headers["retry-after"]) >= 1
    assert limited.engine.requests == []
    assert limited.app.state.services.edge.waiting.total == 0


async def test_a_running_request_takes_the_only_place(limited: Bench) -> None:
    limited.engine.limit = 0
    async with limited.http() as http:
        running = asyncio.create_task(http.post(CHAT, json=chat(), headers=key("one")))
        await limited.engine.stalled.wait()
        refused = await http.post(CHAT, json=chat(), headers=key("one"))
        limited.engine.resume.set()
        assert (await running).status_code == 200
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert (await http.post(CHAT, json=chat(), headers=key("one"))).status_code == 200
