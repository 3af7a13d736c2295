"""The log as JSON lines."""

from __future__ import annotations

import json
import logging
import re

import pytest

from jamba_server.server.cli.log import JsonFormatter
from tests.server.conftest import MakeBench, chat


def line(record: logging.LogRecord) -> dict[str, object]:
    text = JsonFormatter().format(record)
    assert "\n" not in text
    return json.loads(text)


async def test_a_request_has_fields_of_its_own(make_bench: MakeBench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "jamba_server.server.http")
    headers = {"X-Request-Id": "r1", "x-api-key": "secret"}
    async with make_bench(api_key=("secret",)).http() as http:
        usage = (await http.post("/v1/chat/completions", json=chat(), headers=headers)).json()["usage"]
    lines = [line(record) for record in caplog.records if "r1" in record.getMessage()]
    assert len(lines) == 2
    for found in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(found.pop("time")))
        assert str(found.pop("tenant")).startswith("key-")
    generation, request = lines
    assert generation["logger"] == "server.http.generation"
    assert (generation["prompt_tokens"], generation["completion_tokens"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert request | {"message": ""} == {
        "level": "debug", "logger": "server.http.middleware", "message": "", "request_id": "r1", "status": 200,
    }  # fmt: skip
    assert "secret" not in caplog.text


def test_a_traceback_and_odd_values_are_one_line() -> None:
    record = logging.LogRecord("jamba_server.a", logging.ERROR, "", 0, "a\n%s", ("é\u2028",), None)
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record.exc_info = (type(error), error, None)
    record.fields = {"value": {1}, "level": "forged"}
    found = line(record)
    assert (found["message"], found["level"], found["value"]) == ("a\né\u2028", "error", "{1}")
    assert str(found["traceback"]).endswith("ValueError: two\nlines")
