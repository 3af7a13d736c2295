"""The clients of the soak test. Some behave well. Others disconnect early, do not read, read or send slowly, or send
invalid requests.

Each kind of client is a coroutine function that sends one request in a particular manner. `VISITORS` maps the name of
each kind to the number of clients of this kind that run at the same time, and to the function.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.http.clients import COMPLETIONS, Result, connected, head, lines_of, post, read_head, send

FIRST_TOKEN, VOCABULARY = 3, 1000  # prompts consist of token ids in this range, which every model's vocabulary has


@dataclass(frozen=True, slots=True)
class Place:
    """Says where clients send their requests (`url`). `longest` is the largest number of tokens in a prompt."""

    url: str
    longest: int


Visit = Callable[[Place, random.Random], Awaitable[str]]


def prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(FIRST_TOKEN, VOCABULARY) for _ in range(length)]


def body(draw: random.Random, *, length: int, tokens: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt(draw, length), "max_tokens": tokens, "ignore_eos": True, "stream": True, **fields}


def outcome(result: Result) -> str:
    return str(result.status) if result.status else f"no reply ({result.error})"


async def reads_all(place: Place, draw: random.Random) -> str:
    """Sends a short prompt and reads the whole reply, which is a stream or one JSON object and sometimes has several
    choices."""
    fields = {"stream": draw.random() < 0.7, "n": draw.choice((1, 1, 1, 4))}
    return outcome(await post(place.url, body(draw, length=draw.randint(4, 200), tokens=draw.randint(1, 64), **fields)))


async def sends_a_long_prompt(place: Place, draw: random.Random) -> str:
    length = draw.randint(place.longest // 2, place.longest)
    return outcome(await post(place.url, body(draw, length=length, tokens=8)))


async def vanishes(place: Place, draw: random.Random) -> str:
    """Sends a request and closes the connection too early: right after the request, or after some events of the
    reply."""
    result = Result()
    async with connected(place.url) as (reader, writer):
        await send(writer, place.url, body(draw, length=draw.randint(4, 400), tokens=200, n=draw.choice((1, 2))))
        if draw.random() < 0.3:
            await asyncio.sleep(draw.random() / 10)
            return "vanished before the reply"
        await read_head(reader, result)
        number, last = 0, draw.randint(1, 40)
        async for _ in lines_of(reader):
            number += 1
            if number >= last:
                break
    return "vanished in the reply"


async def never_reads(place: Place, draw: random.Random) -> str:
    """Asks for a long stream and does not read it for some seconds."""
    parts = urlsplit(place.url)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, (parts.hostname, parts.port))
        content = json.dumps(body(draw, length=8, tokens=1000, n=2, logprobs=5)).encode()
        await loop.sock_sendall(client, head(place.url, COMPLETIONS, len(content)) + content)
        await asyncio.sleep(draw.uniform(5, 45))
    return "never read"


async def reads_slowly(place: Place, draw: random.Random) -> str:
    result = Result()
    async with connected(place.url) as (reader, writer):
        await send(writer, place.url, body(draw, length=8, tokens=100))
        await read_head(reader, result)
        async for _ in lines_of(reader):
            await asyncio.sleep(0.05)
    return outcome(result)


async def sends_slowly(place: Place, draw: random.Random) -> str:
    """Sends a request's body in small pieces, and sometimes stops in the middle of the headers or of the body."""
    content = json.dumps(body(draw, length=200, tokens=4)).encode()
    whole = head(place.url, COMPLETIONS, len(content)) + content
    end = len(whole) if draw.random() < 0.5 else draw.randrange(len(whole))
    result = Result()
    async with connected(place.url) as (reader, writer):
        for start in range(0, end, 64):
            writer.write(whole[start : min(end, start + 64)])
            await writer.drain()
            await asyncio.sleep(0.02)
        if end < len(whole):
            await asyncio.sleep(draw.uniform(0, 5))
            return "stopped sending"
        await read_head(reader, result)
    return outcome(result)


async def sends_rubbish(place: Place, draw: random.Random) -> str:
    """Sends a request with an invalid body, which the server must refuse."""
    bad = (
        {"prompt": "a", "max_tokens": -5},
        {"prompt": [2**40]},
        {"prompt": "a", "n": 10**6},
        {},
        {"prompt": {"a": 1}},
    )
    return outcome(await post(place.url, draw.choice(bad)))


VISITORS: Mapping[str, tuple[int, Visit]] = {
    "reads all": (6, reads_all),
    "long prompt": (1, sends_a_long_prompt),
    "vanishes": (4, vanishes),
    "never reads": (3, never_reads),
    "reads slowly": (2, reads_slowly),
    "sends slowly": (2, sends_slowly),
    "rubbish": (1, sends_rubbish),
}
# Longest pause between two requests of a client, by its kind, in seconds.
PAUSES: Mapping[str, float] = {"rubbish": 0.5, "long prompt": 5.0, "sends slowly": 0.2}
