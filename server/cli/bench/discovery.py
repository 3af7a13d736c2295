"""Asks the server for its model, context length, version and token ids before the benchmark begins."""

from __future__ import annotations

from typing import Any, TypeVar

import httpx
import msgspec

from jamba_server.engine.errors import JambaError
from jamba_server.server.cli.bench.client import error_message
from jamba_server.server.cli.bench.sessions import TokenRange
from jamba_server.server.cli.bench.workloads import TEXT

Reply = TypeVar("Reply")
# Time limit in seconds for each reply of the server. A server that is still loading its model can delay a reply by the
# time of its option --startup-wait, 30 s by default. The limit must exceed that time.
TIMEOUT = 60.0


class BenchError(JambaError):
    """Raised if the server cannot be benchmarked. The message gives the reason."""


class _Card(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Card]


class _Tokens(msgspec.Struct):
    tokens: list[int]


class Target(msgspec.Struct, frozen=True):
    """The model under test, its context length, and the server's replies on its version and its models.

    The fields `version` and `models` are the server's unchanged replies to /version and /v1/models. `version` is None
    if the server has no /version.
    """

    model: str
    max_model_len: int | None
    version: Any
    models: Any


async def discover(http: httpx.AsyncClient, model: str | None) -> Target:
    """Asks the server for its models and its version. Returns the model named `model`, or the server's first model if
    `model` is None. Raises BenchError if there is no such model or the server does not answer."""
    response = await _ask(http, "GET", "/v1/models")
    if response.is_error:
        raise BenchError(f"{response.url} answers {response.status_code}: {error_message(response)}")
    cards = _decode(response, _Models).data
    chosen = next((card for card in cards if model in (None, card.id)), None)
    if chosen is None:
        raise BenchError(f"The server at {http.base_url} has no model {model!r}, but: {[card.id for card in cards]}.")
    version = await _ask(http, "GET", "/version")
    return Target(chosen.id, chosen.max_model_len, None if version.is_error else version.json(), response.json())


async def discover_tokens(http: httpx.AsyncClient, model: str) -> TokenRange:
    """Asks the server to tokenize a list of English words. Returns the range from the lowest to the highest token id in
    the server's reply."""
    body = {"model": model, "prompt": TEXT, "add_special_tokens": False}
    response = await _ask(http, "POST", "/tokenize", body)
    if response.is_error:
        raise BenchError(
            f"{response.url} answers {response.status_code}: {error_message(response)} "
            "Give --vocab-size, and the benchmark draws its token ids without asking the server."
        )
    tokens = _decode(response, _Tokens).tokens
    if not tokens:
        raise BenchError(f"{response.url} returned no tokens for a text. Give --vocab-size.")
    return TokenRange(min(tokens), max(tokens))


async def _ask(http: httpx.AsyncClient, method: str, path: str, body: object = None) -> httpx.Response:
    try:
        return await http.request(method, path, json=body, timeout=TIMEOUT)
    except httpx.RequestError as error:
        raise BenchError(f"No answer from {http.base_url} ({error!r}). Is the server running there?") from error


def _decode(response: httpx.Response, kind: type[Reply]) -> Reply:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except msgspec.DecodeError as error:
        raise BenchError(f"The reply of {response.url} does not follow the OpenAI API: {error}.") from error
