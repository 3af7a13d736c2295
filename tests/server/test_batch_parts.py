"""The parts of batches: lines, their order, and the command `jamba run-batch`."""

from __future__ import annotations

import asyncio
import io
import json
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rich.console import Console

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.run_batch import callers
from jamba_server.server.cli.run_batch.output import Output
from jamba_server.server.cli.run_batch.run import Run, read_input, run_file
from jamba_server.server.config import ServerConfig
from jamba_server.server.http.app import ROUTERS
from jamba_server.server.http.batches.call import Outcome
from jamba_server.server.http.batches.endpoints import PATHS, called_routes
from jamba_server.server.http.batches.job import read_contents
from jamba_server.server.http.batches.lines import BadLine, check_line, places
from jamba_server.server.http.batches.order import LEADERS, Order, Pending, beginnings
from jamba_server.server.http.batches.results import error_line, reply_line
from jamba_server.server.http.errors import OnProgress
from tests.server.batch_client import BODIES, CHAT, COMPLETIONS, Json, jsonl, line
from tests.server.conftest import Bench, MakeBench

# Lines ----------------------------------------------------------------------------------------------------------------


def test_a_line_keeps_the_text_of_its_body() -> None:
    text = b'{"custom_id":"a","method":"POST","url":"/v1/completions","body":{ "prompt": "x",  "seed": 12e0 }}'
    assert bytes(check_line(text, [COMPLETIONS], max_bytes=1000).body) == b'{ "prompt": "x",  "seed": 12e0 }'


def test_a_result_is_one_line_for_clients_that_divide_the_text_with_splitlines() -> None:
    text = "a\u2028b\u2029c\x85d"
    body = json.dumps({"content": text}, ensure_ascii=False).encode()
    written = reply_line("1", Outcome(200, "r", body)) + error_line(text, "code", text)
    results = [json.loads(part) for part in written.decode().splitlines()]
    assert [results[0]["response"]["body"]["content"], results[1]["custom_id"], results[1]["error"]["message"]] == [
        text
    ] * 3


@pytest.mark.parametrize(
    "text",
    [
        b"\xff",
        b"null",
        b"[" * 100_000,
        b'{"custom_id": "a"}',
        b'{"custom_id": 5, "method": "POST", "url": "/v1/completions", "body": {}}',
        b'{"custom_id": "a", "method": "POST", "url": 5, "body": {}}',
        b'{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"x": "\\ud800"}}',
        json.dumps({"custom_id": "a" * 513, "method": "POST", "url": COMPLETIONS, "body": {}}).encode(),
        b" " * 1001,
    ],
)
def test_a_bad_line_has_a_short_reason(text: bytes) -> None:
    with pytest.raises(BadLine) as error:
        check_line(text, [COMPLETIONS], max_bytes=max(1000, min(len(text), 200_000) if text[:1] == b"[" else 1000))
    assert len(error.value.message) < 500


def test_places_count_all_lines_and_read_long_ones_in_part() -> None:
    file = io.BytesIO(b"a\n\n  \nbbbbbbbbbb\nc")
    found = [(place.number, place.offset, place.size, text) for place, text in places(file, 4)]
    blank = [(1, 2, 1, b""), (2, 3, 3, b"")]
    assert found == [(0, 0, 2, b"a\n"), *blank, (3, 6, 11, b"bbbbb"), (4, 17, 1, b"c")]


def test_a_byte_order_mark_and_some_blank_lines_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl([line("a"), "", "\r", line("b")]))
    assert read_contents(path, [CHAT], max_bytes=1000, max_lines=2).problem is None
    assert [each["custom_id"] for each in run_all(path, tmp_path / "out.jsonl", Echo())] == ["a", "b"]
    path.write_bytes(b"\n" * 1000)
    problem = read_contents(path, [CHAT], max_bytes=1000, max_lines=2).problem
    assert problem == ("too_many_blank_lines", "The file has more than 2 blank lines.")
    path.write_bytes(b"\xef\xbb\xbf")
    assert (read_contents(path, [CHAT], max_bytes=1000).problem or "")[0] == "empty_file"


def test_a_long_line_is_an_error_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(jsonl([line("a"), line("b", body={"prompt": "x" * 100_000}), line("c")]))
    contents = read_contents(path, [CHAT], max_bytes=1000)
    assert [pending.number for pending in contents.pending] == [0, 2]
    assert b"line_too_long" in contents.bad[0].text
    assert contents.total == 3


# The order ------------------------------------------------------------------------------------------------------------


def pending(number: int, text: str) -> Pending:
    return Pending(number, 0, 1, beginnings({"prompt": text}))


def test_lines_with_a_common_beginning_follow_each_other() -> None:
    stems = ["".join(Random(i).choices("abcdef", k=300)) for i in range(5)]
    order = Order(pending(i, f"{stems[i % 5]} {i}") for i in range(50))
    taken: list[int] = []
    while (found := order.take()) is not None:
        taken.append(found.number % 5)
        order.computed(found)
    assert len(taken) == 50
    assert sum(a != b for a, b in pairwise(taken)) == 4
    assert not len(order)


def test_the_first_two_prompts_of_a_group_are_computed_one_after_the_other() -> None:
    order = Order(pending(i, "s" * 200 + str(i)) for i in range(10))
    for number in range(LEADERS):
        leader = order.take()
        assert leader is not None
        assert leader.number == number
        assert order.take() is None, "all others wait"
        order.computed(leader)
        order.computed(leader)  # the end of the line, after its first token
    assert len([order.take() for _ in range(8)]) == 8
    assert order.take() is None
    assert not len(order)


def test_a_group_within_a_group_has_leaders_of_its_own_and_others_do_not_wait_for_it() -> None:
    common = "s" * 100
    order = Order([pending(i, common + "abc"[i % 3] * 500 + str(i)) for i in range(12)])
    for _ in range(LEADERS):
        leader = order.take()
        assert leader is not None
        order.computed(leader)
    running = [found for _ in range(12) if (found := order.take()) is not None]
    groups = [found.number % 3 for found in running]
    assert sorted(groups.count(group) for group in range(3)) == [1, 1, 2], "one group has had its leaders already"


@pytest.mark.parametrize("seed", range(20))
def test_every_line_is_taken_once(seed: int) -> None:
    random = Random(seed)
    order = Order(pending(i, random.choice("ab") * random.choice((10, 100, 1000)) + str(i % 7)) for i in range(400))
    running, taken = list[Pending](), list[int]()
    while len(order) or running:
        if random.random() < 0.6 and (found := order.take()) is not None:
            taken.append(found.number)
            running.append(found)
        elif running:
            order.computed(running.pop(random.randrange(len(running))))
    assert sorted(taken) == list(range(400))


def test_prompts_are_compared_by_what_the_model_reads() -> None:
    chat = {"messages": [{"role": "user", "content": "a" * 64}]}
    parts = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 64}]}], "seed": 5}
    assert beginnings(chat | {"temperature": 0}) == beginnings(chat)
    assert len(beginnings(chat)) == len(beginnings(parts)) == 1
    assert beginnings({"prompt": list(range(100))})[0] == beginnings({"prompt": list(range(90))})[0]
    assert beginnings({"prompt": "short"}) == ()


# jamba run-batch ------------------------------------------------------------------------------------------------------

CONSOLE = Console(file=io.StringIO())
CONFIG = ServerConfig(served_model_name=("jamba",))


class Echo:
    """Replies with the body of the request. Stops the run after some replies."""

    def __init__(self, stop_after: float = float("inf")) -> None:
        self.bodies: list[bytes] = []
        self.stop_after, self.num_running, self.most = stop_after, 0, 0

    async def __call__(self, path: str, body: bytes, on_progress: OnProgress) -> Outcome:
        self.num_running += 1
        self.most = max(self.most, self.num_running)
        await asyncio.sleep(0)
        on_progress("first_token")
        await asyncio.sleep(0)
        self.num_running -= 1
        if len(self.bodies) >= self.stop_after:
            raise ConfigError("the server is gone")
        self.bodies.append(body)
        return Outcome(200, "r", body)


def run_all(source: Path, target: Path, caller: Any, limit: int = 4) -> list[Json]:
    with Output(target) as output:
        run = Run(source, read_input(source, CONFIG), output, CONSOLE)
        if run.prepare():
            asyncio.run(run.all(caller, limit))
    return [json.loads(text) for text in target.read_text().splitlines()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    lines = [line(f"c{i}", (CHAT, COMPLETIONS)[i % 2]) for i in range(20)]
    path.write_bytes(jsonl([*lines, line("c3"), "nonsense", "nonsense"]))
    return path


def test_an_interrupted_run_goes_on(source: Path, tmp_path: Path) -> None:
    target, first, second = tmp_path / "out.jsonl", Echo(stop_after=7), Echo()
    with pytest.raises(ConfigError):
        run_all(source, target, first)
    assert first.most == 4
    whole = target.read_bytes()
    target.write_bytes(whole + whole[:40])  # the run was killed while it wrote a line
    results = run_all(source, target, second)
    assert target.read_bytes().startswith(whole)
    assert len(first.bodies) + len(second.bodies) == 20
    assert sorted(each["custom_id"] for each in results if each["response"]) == sorted(f"c{i}" for i in range(20))
    assert [each["custom_id"] for each in results if each["error"]] == ["c3", None, None]
    again = Echo()
    assert run_all(source, target, again) == results
    assert not again.bodies


@pytest.mark.parametrize("content", [b"# notes\n", b"notes", jsonl([line("a")]), b'{"id": "x"}\n', b"{}"])
def test_a_file_that_has_other_lines_is_not_touched(source: Path, tmp_path: Path, content: bytes) -> None:
    target = tmp_path / "out.jsonl"
    target.write_bytes(content)
    with pytest.raises(ConfigError, match=r"line 1|the last line"):
        run_all(source, target, Echo())
    assert target.read_bytes() == content


def test_files_that_cannot_be_used_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_input(tmp_path / "none.jsonl", CONFIG)
    with pytest.raises(ConfigError, match="--output"):
        Output(tmp_path)
    with pytest.raises(ConfigError, match="no regular file"):
        Output(Path("/dev/null"))
    target = tmp_path / "out.jsonl"
    with Output(target), pytest.raises(ConfigError, match="another run"):
        Output(target)
    original = source.read_bytes()
    with pytest.raises(ConfigError, match="line 1"):
        Output(source)
    assert source.read_bytes() == original


async def test_it_runs_at_a_server(make_bench: MakeBench, source: Path, tmp_path: Path) -> None:
    bench: Bench = make_bench(api_key=("secret",))
    async with bench.served() as address:
        with Output(tmp_path / "out.jsonl") as output:
            run = Run(source, read_input(source, CONFIG), output, CONSOLE)
            await run_file(CONFIG, f"{address}/v1/", "secret", run)
    assert (output.num_completed, output.num_failed) == (20, 3)
    assert len(bench.engine.requests) == 20
    assert not any(request.is_background for request in bench.engine.requests)


async def test_a_wrong_key_or_url_stops_the_run(make_bench: MakeBench, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    async with make_bench(api_key=("secret",)).served() as address:
        for url, why in ((address, "--api-key"), (address.removeprefix("http://"), "--url is '127.*http://")):
            with Output(target) as output, pytest.raises(ConfigError, match=why):
                await run_file(CONFIG, url, "wrong", Run(source, read_input(source, CONFIG), output, CONSOLE))
            assert not output.replied  # a second run with the right key does all requests


async def test_a_server_that_is_gone_stops_the_run(
    make_bench: MakeBench, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callers, "RETRY_SECONDS", 0.01)
    async with make_bench().served() as address:
        pass
    with Output(tmp_path / "out.jsonl") as output, pytest.raises(ConfigError, match="cannot be reached"):
        await run_file(CONFIG, address, None, Run(source, read_input(source, CONFIG), output, CONSOLE))


def test_every_endpoint_of_batches_is_a_route() -> None:
    assert sorted(getattr(route, "path", "") for route in called_routes(ROUTERS)) == sorted(PATHS)


async def test_it_runs_with_the_endpoints_in_this_process(bench: Bench, source: Path, tmp_path: Path) -> None:
    caller = callers.LocalCaller(callers.lines_app(bench.app.state.services, ROUTERS))
    with Output(tmp_path / "out.jsonl") as output:
        run = Run(source, read_input(source, CONFIG), output, CONSOLE)
        assert run.prepare()
        await run.all(caller, 4)
    assert (output.num_completed, output.num_failed) == (20, 3)
    bodies = [json.loads(text)["response"] for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {body["body"]["object"] for body in bodies if body} == {"chat.completion", "text_completion"}
    assert BODIES[CHAT] == line("a")["body"]


async def test_options_of_a_server_do_not_disturb_it(source: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    config = ServerConfig(threads=1, max_num_seqs=4, data_dir=str(data), max_queue_requests=1, max_queue_tokens=1)
    with Output(tmp_path / "out.jsonl") as output:
        await run_file(config, None, None, Run(source, read_input(source, config), output, CONSOLE))
    assert (output.num_completed, output.num_failed) == (20, 3)
    assert not data.exists()
