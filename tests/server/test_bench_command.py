from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from typer.testing import CliRunner

from benchmarks.shapes import write_config
from jamba_server.engine.errors import ConfigError, JambaError
from jamba_server.server.cli.bench.command import Bench, BenchOptions, bench, open_http
from jamba_server.server.cli.bench.discovery import BenchError
from jamba_server.server.cli.bench.report import Report
from jamba_server.server.cli.bench.runner import ClosedLoop, Poisson, Replay
from jamba_server.server.cli.bench.sessions import TokenRange
from jamba_server.server.cli.bench.workloads import SharedPrefix
from tests.server.bench_fakes import FakeServer, run_virtual

SMALL = BenchOptions(concurrency="1,2", num_prompts=4, num_warmups=0, input_len=10, output_len=5)


def measure(server: FakeServer, options: BenchOptions) -> Report:
    async def main(now: Callable[[], float]) -> Report:
        async with server.http() as http:
            return await Bench(http, options, now=now).run()

    return run_virtual(main)


def prompts(server: FakeServer) -> list[tuple[int, ...]]:
    return [tuple(body["prompt"]) for body in server.bodies]


def test_every_load_is_measured_exactly() -> None:
    server = FakeServer(prefill=0.5, step=0.125)  # a reply of five tokens takes 1 s
    server.cached = 5
    one, two = measure(server, SMALL).levels
    assert (one.load, two.load) == (ClosedLoop(1), ClosedLoop(2))
    assert (one.duration_s, two.duration_s) == (4.0, 2.0)
    assert (one.output_throughput, two.output_throughput) == (5.0, 10.0)
    assert (one.prompt_tokens, one.output_tokens, one.cached_share) == (40, 20, 0.5)
    for level in (one, two):
        assert level.ttft_ms is not None and level.itl_ms is not None
        assert level.tpot_ms is not None and level.e2el_ms is not None
        assert (level.ttft_ms.p99, level.itl_ms.p99, level.tpot_ms.p50, level.e2el_ms.mean) == (500, 125, 125, 1000)


def test_no_prompt_is_sent_twice() -> None:
    server = FakeServer()
    options = BenchOptions(concurrency="1,2,3", num_prompts=4, num_warmups=2, input_len=10, output_len=1)
    levels = measure(server, options).levels
    assert len(server.bodies) == 3 * (4 + 2)
    assert len(set(prompts(server))) == 3 * (4 + 2)
    assert [level.completed for level in levels] == [4, 4, 4]  # warm-ups are not counted


def test_every_client_is_warmed_up_once() -> None:
    server = FakeServer()
    measure(server, BenchOptions(concurrency="3,5", num_prompts=1, output_len=1))
    assert len(server.bodies) == (3 + 1) + (5 + 1)


def test_the_same_seed_sends_the_same_prompts() -> None:
    def sent(seed: int) -> list[tuple[int, ...]]:
        server = FakeServer()
        measure(server, BenchOptions(concurrency="1,2", num_prompts=4, input_len=10, output_len=1, seed=seed))
        return sorted(prompts(server))

    assert sent(1) == sent(1)
    assert sent(1) != sent(2)


def test_token_ids_come_from_tokenize_or_from_the_vocabulary_size() -> None:
    server = FakeServer()
    measure(server, SMALL)
    drawn = {token for prompt in prompts(server) for token in prompt}
    assert 17 <= min(drawn) < max(drawn) <= 900
    server.tokenize_status = 404
    server.bodies.clear()
    with pytest.raises(BenchError, match=r"/tokenize answers 404.*--vocab-size"):
        measure(server, SMALL)
    measure(server, BenchOptions(concurrency="1", num_prompts=9, input_len=50, output_len=1, vocab_size=4))
    assert {token for prompt in prompts(server) for token in prompt} == {0, 1, 2, 3}


def test_the_default_number_of_sessions_follows_the_clients() -> None:
    levels = measure(FakeServer(), BenchOptions(concurrency="2,8", num_warmups=0, output_len=1)).levels
    assert [level.completed for level in levels] == [16, 32]


def test_sessions_too_long_for_the_server_are_left_out_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("seconds,input_tokens,output_tokens\n0,90,10\n1,95,10\n3,5,5\n")
    server = FakeServer()
    server.max_model_len = 100
    (level,) = measure(server, BenchOptions(workload="trace", trace=str(path), num_warmups=0)).levels
    assert (level.load, level.planned, level.left_out, level.completed) == (Replay(), 2, 1, 2)
    assert level.duration_s == 4.0  # 3 s until the last arrives, 1 s for its reply
    with pytest.raises(BenchError, match="exceeds the server's context of 100"):
        measure(server, BenchOptions(input_len=96, output_len=5))


def test_multi_turn_needs_no_token_ids() -> None:
    server = FakeServer()
    server.tokenize_status = 404
    options = BenchOptions(workload="multi-turn", turns=2, concurrency="3", num_prompts=3, num_warmups=0, input_len=7)
    (level,) = measure(server, options).levels
    assert (level.planned, level.completed) == (6, 6)
    assert level.prompt_tokens == 3 * 7 + 3 * (7 + 64 + 7)


def test_errors_are_counted_and_the_rest_is_measured() -> None:
    server = FakeServer()
    server.refuse = {1: 503, 2: 503}
    one, two = measure(server, SMALL).levels
    assert (one.completed, one.failed, two.completed, two.failed) == (2, 2, 4, 0)
    assert [(error.kind, error.count, error.example) for error in one.errors] == [("http_503", 2, "No room.")]


def test_a_load_without_replies_is_the_last() -> None:
    server = FakeServer()
    server.refuse = dict.fromkeys(range(100), 500)
    levels = measure(server, SMALL).levels
    assert [(level.completed, level.failed) for level in levels] == [(0, 4)]


def test_failing_warm_ups_end_the_bench() -> None:
    server = FakeServer()
    server.refuse = dict.fromkeys(range(100), 401)
    with pytest.raises(BenchError, match="Every warm-up request failed, the first with http_401: No room"):
        measure(server, BenchOptions(num_warmups=2))


def test_goodput_is_of_the_given_slos() -> None:
    slow = FakeServer(prefill=0.5)
    options = BenchOptions(concurrency="1", num_prompts=2, num_warmups=0, output_len=5, goodput=["ttft:500"])
    assert measure(slow, options).levels[0].goodput == 1.0
    assert measure(FakeServer(prefill=0.625), options).levels[0].goodput == 0.0


def test_an_unknown_model_is_refused_with_the_served_ones() -> None:
    with pytest.raises(BenchError, match=r"no model 'other', but: \['tiny'\]"):
        measure(FakeServer(), BenchOptions(model="other"))


def test_conditions_name_the_server_and_hide_the_key(tmp_path: Path) -> None:
    options = BenchOptions(concurrency="1", num_prompts=1, api_key="secret", output=tmp_path / "x.json")
    conditions = measure(FakeServer(), options).conditions
    assert conditions["server_version"] == {"version": "1.2.3"}
    assert conditions["server_models"]["data"][0]["id"] == "tiny"
    assert conditions["workload"] == {"type": "random", "input_len": 256, "output_len": 64, "range_ratio": 0.0}
    assert {"date", "client_machine", "client_versions"} <= conditions.keys()
    assert conditions["arguments"]["output"] == str(tmp_path / "x.json")
    assert "secret" not in json.dumps(conditions)


# Options ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BenchOptions(workload="chat"), "'chat' must be one of: random, shared-prefix, multi-turn, agents, trace"),
        (BenchOptions(prefix_len=3), "--prefix-len means nothing for --workload random"),
        (BenchOptions(workload="trace", trace="x", input_len=3, turns=2), "--input-len, --turns means nothing"),
        (BenchOptions(workload="trace"), "needs --trace FILE"),
        (BenchOptions(workload="multi-turn", vocab_size=9), "--vocab-size means nothing"),
        (BenchOptions(concurrency="1", request_rate="1"), "exclude each other"),
        (BenchOptions(workload="trace", trace="x", time_scale=2.0, concurrency="1"), "--time-scale means nothing"),
        (BenchOptions(concurrency="1,x"), "--concurrency '1,x' must be numbers above 0"),
        (BenchOptions(concurrency="0"), "--concurrency '0'"),
        (BenchOptions(concurrency="1.5"), "--concurrency '1.5'"),
        (BenchOptions(request_rate="inf"), "--request-rate 'inf'"),
        (BenchOptions(num_prompts=0), "--num-prompts 0 must be at least 1"),
        (BenchOptions(num_warmups=-1), "--num-warmups -1"),
        (BenchOptions(seed=-1), "--seed -1"),
        (BenchOptions(max_seconds=0.0), "--max-seconds 0"),
        (BenchOptions(temperature=3.0), "--temperature 3 must be from 0 to 2"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_sent(options: BenchOptions, message: str) -> None:
    server = FakeServer()
    with pytest.raises(ConfigError, match=message):
        measure(server, options)


def test_loads_and_workloads_of_the_options() -> None:
    assert BenchOptions().make_loads() == [ClosedLoop(1), ClosedLoop(8), ClosedLoop(32)]
    assert BenchOptions(request_rate="0.5,2").make_loads() == [Poisson(0.5), Poisson(2.0)]
    assert BenchOptions(workload="trace", concurrency="3").make_loads() == [ClosedLoop(3)]
    assert BenchOptions(workload="shared-prefix", prefix_len=9).make_workload() == SharedPrefix(prefix_len=9)


def test_a_poisson_load_has_the_arrivals_of_its_seed() -> None:
    def arrivals(seed: int) -> list[float]:
        planned = Bench(httpx.AsyncClient(), BenchOptions(request_rate="2", seed=seed)).sessions(TokenRange(0, 9), 0)
        return [session.arrival for session in planned]

    assert arrivals(1) == arrivals(1) != arrivals(2)
    assert len(arrivals(1)) == 64


def test_the_url_may_end_in_v1() -> None:
    assert str(open_http("http://host:8000/v1/", "key").base_url) == "http://host:8000"
    assert open_http("http://host:8000", "key").headers["Authorization"] == "Bearer key"
    with pytest.raises(ConfigError, match="must begin with http"):
        open_http("host:8000", None)


# The command over real sockets --------------------------------------------------------------------------------------


def make_app(ports: set[int]) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": "tiny"}]}

    @app.post("/tokenize")
    def tokenize() -> dict[str, Any]:
        return {"tokens": [5, 9], "count": 2}

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        assert request.client is not None
        ports.add(request.client.port)
        assert request.headers["authorization"] == "Bearer secret"

        async def events() -> AsyncIterator[str]:
            for _ in range(body["max_tokens"]):
                yield 'data: {"choices": [{"text": "x", "finish_reason": null}]}\n\n'
                await asyncio.sleep(0)
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            yield 'data: {"choices": [{"text": "", "finish_reason": "length"}]}\n\n'
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


@pytest.fixture(scope="module")
def ports() -> set[int]:
    """Of the clients whose completions the server has seen."""
    return set()


@pytest.fixture(scope="module")
def url(ports: set[int]) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(make_app(ports), log_level="error", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def invoke(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command("bench")(bench)
    result = CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})
    if isinstance(result.exception, JambaError):  # the application prints its message
        return result.exit_code, f"{result.output}{result.exception}"
    return result.exit_code, result.output


def test_the_command_writes_its_report(url: str, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    flags = "--concurrency 1,3 --num-prompts 6 --input-len 20 --output-len 8 --api-key secret --goodput e2el:60000"
    code, text = invoke(url, *flags.split(), "--output", str(output))
    assert code == 0, text
    assert "3 clients" in text and "TTFT p50 (ms)" in text
    report = json.loads(output.read_text())
    assert [level["load"] for level in report["levels"]] == [
        {"type": "closed_loop", "concurrency": 1},
        {"type": "closed_loop", "concurrency": 3},
    ]
    for level in report["levels"]:
        assert (level["completed"], level["failed"], level["short_replies"]) == (6, 0, 0)
        assert (level["prompt_tokens"], level["output_tokens"]) == (120, 48)
        assert level["goodput"] == level["request_throughput"] > 0
    assert report["conditions"]["server_version"] is None
    assert "secret" not in output.read_text()


def test_the_command_shows_the_decode_limit(url: str, tmp_path: Path) -> None:
    write_config("3b", tmp_path)
    flags = [
        "--concurrency",
        "2",
        "--num-prompts",
        "2",
        "--input-len",
        "20",
        "--output-len",
        "8",
        "--api-key",
        "secret",
    ]
    flags += ["--bandwidth", "40GB"]
    flags += ["--checkpoint", str(tmp_path), "--output", str(tmp_path / "report.json")]
    code, text = invoke(url, *flags, "--quantization", "int8", "--quantize-mamba")
    assert code == 0, text
    # 3.09 GB of weights, and 18.6 MB for a sequence's state, read and written
    assert "decode limit at 1 sequence: 3.11 GB per token / 40 GB/s = 12.9 tok/s\n" in text
    assert "decode limit at 2 sequences: 3.13 GB per step / 40 GB/s = 25.6 tok/s; measured " in text
    assert json.loads((tmp_path / "report.json").read_text())["conditions"]["arguments"]["checkpoint"] == str(tmp_path)
    for wrong in (["--quantization", "int3"], ["--quantize-mamba"]):
        code, text = invoke(url, *flags, *wrong)
        assert (code, "it must be one of int8, int4" in text) == (1, True)
    code, text = invoke(url, "--bandwidth", "40GB", "--quantization", "int8")
    assert (code, "--bandwidth, --quantization means nothing without --checkpoint" in text) == (1, True)


def test_a_client_keeps_its_connection(url: str, ports: set[int]) -> None:
    ports.clear()
    flags = "--concurrency 1 --num-prompts 5 --num-warmups 0 --input-len 20 --output-len 8 --api-key secret"
    code, text = invoke(url, *flags.split())
    assert code == 0, text
    assert len(ports) == 1


def test_the_command_without_a_server_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    code, text = invoke(f"http://127.0.0.1:{port}")
    assert code == 1
    assert f"No answer from http://127.0.0.1:{port}" in text


def test_the_command_refuses_an_output_it_cannot_write(url: str, tmp_path: Path) -> None:
    code, text = invoke(url, "--output", str(tmp_path / "missing" / "x.json"))
    assert code == 1
    assert "is not a folder to write in" in text


def test_the_command_fails_when_nothing_completed(url: str) -> None:
    flags = "--concurrency 1 --num-prompts 2 --num-warmups 0 --input-len 20 --output-len 100000 --max-seconds 0.05"
    code, text = invoke(url, *flags.split(), "--api-key", "secret")
    assert code == 1
    assert "1 x cut_off" in text and "No request was completed with 1 client" in text
