"""The programs that load a server: what their clients see, and how they judge it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from benchmarks.http import latency, overload, soak
from benchmarks.http.clients import Result, percentile, post
from tests.server.conftest import Bench

BODY: dict[str, Any] = {"prompt": "Hi", "stream": True}


async def test_a_client_sees_status_headers_and_tokens(bench: Bench) -> None:
    async with bench.served() as url:
        stream, invalid = await post(url, BODY), await post(url, {"prompt": 5})
    assert (stream.status, stream.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert stream.num_events > 1
    assert stream.first is not None
    assert stream.first <= stream.total
    assert (invalid.status, invalid.first, invalid.error) == (400, None, "")


async def test_a_client_without_a_server_gets_no_status() -> None:
    result = await post("http://127.0.0.1:9", BODY)
    assert (result.status, result.error) == (0, "ConnectionRefusedError")


async def test_a_client_that_is_cut_off_gets_no_status() -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    server = await asyncio.start_server(close, "127.0.0.1", 0)
    async with server:
        result = await post(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", BODY)
    assert result.status == 0
    assert result.error


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2
    assert percentile(list(map(float, range(100))), 0.99) == 99
    assert percentile([1.0], 0.99) == 1


def test_overload_tells_outcomes_apart() -> None:
    results = [
        Result(200, total=1.0),
        Result(200, total=2.0),
        Result(503, {"retry-after": "1"}, total=0.5),
        Result(503),
        Result(error="ConnectionResetError"),
    ]
    found = overload.summary(results)
    assert found["outcomes"] == {
        "200": 2, "503 with Retry-After": 1, "503": 1, "no reply (ConnectionResetError)": 1,
    }  # fmt: skip
    assert (found["admitted_p99"], found["refused_p99"]) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("change", "unmet"),
    [
        ({}, []),
        ({"outcomes": {"200": 5, "500": 1}}, ["only 200"]),
        ({"admitted_p99": 2.1}, ["p99 of the admitted"]),
        ({"memory": {"http": 103}}, ["memory of http"]),
        ({"descriptors": {"http": 16}}, ["as many open descriptors"]),
    ],
)
def test_overload_judges_each_requirement(change: dict[str, Any], unmet: list[str]) -> None:
    run = {"outcomes": {"200": 6}, "admitted_p99": 1.0, "memory": {"http": 100}, "descriptors": {"http": 15}}
    runs = {"as many as may run and wait": run, "flood": run, "flood again": run | change}
    verdicts = overload.judge({"runs": runs, "alive": True})
    assert [v.required.startswith(each) for v, each in zip([v for v in verdicts if not v.met], unmet, strict=True)] == (
        [True] * len(unmet)
    )


def test_the_soak_compares_late_memory_with_early() -> None:
    def found(late: int, **changes: Any) -> dict[str, Any]:
        samples = [(minute / 2, {"http": 100 if minute < 110 else late}) for minute in range(120)]
        same: dict[str, Any] = {"before": {"http": 15}, "after": {"http": 15}, "pids": {"http": 1}, "alive": True}
        gauges = dict.fromkeys(soak.IDLE, 0.0)
        return {"samples": samples, "ends": {"rubbish": {"400": 3}}, "gauges": gauges} | same | changes

    assert all(verdict.met for verdict in soak.judge(found(102), 60))
    assert [v.met for v in soak.judge(found(103), 60)].count(False) == 1
    assert [v.met for v in soak.judge(found(100, after={"http": 16}), 60)].count(False) == 1
    assert [v.met for v in soak.judge(found(100, ends={"rubbish": {"500": 1}}), 60)].count(False) == 1
    busy = dict.fromkeys(soak.IDLE, 0.0) | {"jamba_state_slots_used": 1.0}
    assert [v.met for v in soak.judge(found(100, gauges=busy), 60)].count(False) == 1
    assert soak.by_minute(found(103))[59] == {"http": 103}


def test_latency_allows_three_times_and_one_step() -> None:
    def found(p95: float, seconds: float) -> dict[str, Any]:
        row = {"ttft_p50": p95, "ttft_p95": p95, "ttft_max": p95, "failed": 0, "requests": 9}
        return {
            "short alone": row | {"ttft_p95": 0.02},
            "long alone": {"seconds": 30.0},
            "step": 0.1,
            "one long prompt": row | {"heavy_seconds": [seconds]},
        }

    assert [v.met for v in latency.judge(found(0.159, 33.0))] == [True, True]
    assert [v.met for v in latency.judge(found(0.161, 33.4))] == [False, False]
    assert "| one long prompt | 9 | 159 | 159 | 159 | 33.0 |" in latency.to_markdown(found(0.159, 33.0))
