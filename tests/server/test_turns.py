"""Clients take turns at the processes that check grammars and render templates."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable

import anyio
import pytest

from jamba_server.engine.errors import Overloaded
from jamba_server.server.http.grammar_queue import QUICK_SECONDS, GrammarQueue
from jamba_server.server.http.limits.turns import Turns, client_of
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.grammars.builder import GrammarBuilder
from jamba_server.server.text.grammars.compile_check import Allowance, CompileCheck, Outcome, OverAllowance
from jamba_server.server.text.grammars.types import OutputFormat
from tests.server.asgi import Exchange
from tests.server.conftest import Bench, MakeBench, chat

LONG = 60.0  # seconds; no test waits that long


class Work:
    """Work that lasts until the test ends it."""

    def __init__(self) -> None:
        self.began, self.may_end = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.began.set()
        assert self.may_end.wait(10)
        return "done"


async def begun(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 10)


async def settle() -> None:
    """Lets all tasks run until they wait."""
    for _ in range(10):
        await asyncio.sleep(0)


def noting(order: list[str], name: str) -> Callable[[], None]:
    return lambda: order.append(name)


async def test_a_client_with_many_requests_does_not_hold_up_another() -> None:
    turns, first, order = Turns(1, seconds=LONG, what="a test"), Work(), list[str]()
    running = asyncio.create_task(turns.run("flood", first))
    await begun(first.began)
    flood = [asyncio.create_task(turns.run("flood", noting(order, f"flood {n}"))) for n in range(100)]
    await settle()
    honest = [asyncio.create_task(turns.run("honest", noting(order, f"honest {n}"))) for n in range(2)]
    await settle()
    first.may_end.set()
    assert await running == "done"
    await asyncio.gather(*flood, *honest)
    assert order[:4] == ["flood 0", "honest 0", "flood 1", "honest 1"]
    assert order[4:] == [f"flood {n}" for n in range(2, 100)]


async def test_a_request_that_waits_too_long_is_refused() -> None:
    turns, first = Turns(1, seconds=0.01, what="a test"), Work()
    running = asyncio.create_task(turns.run("a", first))
    await begun(first.began)
    with pytest.raises(Overloaded, match=r"waited 0.01 s for a test") as caught:
        await turns.run("b", first)
    assert caught.value.retry_after >= 1
    first.may_end.set()
    assert await running == "done"
    assert await turns.run("b", first) == "done"


async def test_a_cancelled_request_is_dropped() -> None:
    turns, first, order = Turns(1, seconds=LONG, what="a test"), Work(), list[str]()
    running = asyncio.create_task(turns.run("a", first))
    await begun(first.began)
    waiting = asyncio.create_task(turns.run("a", noting(order, "dropped")))
    await settle()
    waiting.cancel()
    running.cancel()  # its thread still runs, so its turn lasts
    ended = await asyncio.gather(waiting, running, return_exceptions=True)
    assert [type(error) for error in ended] == [asyncio.CancelledError] * 2
    last = asyncio.create_task(turns.run("b", noting(order, "last")))
    await settle()
    assert order == []
    first.may_end.set()
    await last
    assert order == ["last"]


async def test_a_turn_that_comes_as_its_request_is_cancelled_goes_to_the_next() -> None:
    turns, order = Turns(1, seconds=LONG, what="a test"), list[str]()
    first = Work()
    running = asyncio.create_task(turns.run("a", first))
    await begun(first.began)
    waiting = asyncio.create_task(turns.run("a", noting(order, "dropped")))
    last = asyncio.create_task(turns.run("a", noting(order, "last")))
    await settle()
    turns._release()  # pyright: ignore[reportPrivateUsage]  # the turn comes, and its request has not run yet
    waiting.cancel()
    first.may_end.set()
    await asyncio.gather(running, last)
    assert order == ["last"]


async def test_an_exception_ends_the_turn() -> None:
    turns = Turns(1, seconds=LONG, what="a test")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await turns.run("a", lambda: 1 // 0)


def test_a_client_is_its_key_or_its_address() -> None:
    assert client_of({"state": {"tenant": "team"}, "client": ("10.0.0.1", 5)}) == "team"
    assert client_of({"state": {}, "client": ("10.0.0.1", 5)}) == "10.0.0.1"
    assert client_of({"state": {}, "client": None}) == ""
    line = {"state": {"tenant": "team", "background": True}, "client": ("batches", 0)}
    assert client_of(line) != "team", "other requests of the team do not wait for lines of its batches"


class Check:
    """Stands for the check of grammars. Grammars with "slow" need more than the quick allowance. A check with a lock in
    `held` waits for it."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.held: dict[bool, Work] = {}
        self.asked: list[tuple[str, bool]] = []

    def outcome(self, grammar: str, allowance: Allowance | None = None) -> Outcome:
        assert allowance is not None
        if grammar in self.known:
            return Outcome()
        if not allowance.seconds:
            raise OverAllowance
        self.asked.append((grammar, allowance.final))
        if "slow" in grammar and not allowance.final:
            assert allowance.seconds == QUICK_SECONDS
            raise OverAllowance
        if (work := self.held.get(allowance.final)) is not None:
            work()
        self.known.add(grammar)
        return Outcome()

    def close(self) -> None:
        pass


def lark(name: str) -> OutputFormat:
    return OutputFormat(kind="lark", value=f'start: "{name}"')


async def test_slow_grammars_hold_up_neither_quick_nor_known_ones() -> None:
    check = Check()
    queue, threads = GrammarQueue(GrammarBuilder(check, {})), anyio.CapacityLimiter(1)

    async def build(client: str, name: str) -> str:
        return (await queue.build(client, threads, lark(name), None, None, leading_space=False)).text

    await build("a", "known")
    check.held[True] = Work()
    slow = [asyncio.create_task(build("a", f"slow {n}")) for n in range(20)]
    await begun(check.held[True].began)
    assert await build("a", "quick") == 'start: "quick"'
    check.held[False] = Work()
    quick = asyncio.create_task(build("a", "quick 2"))
    await begun(check.held[False].began)
    assert await build("a", "known") == 'start: "known"'
    assert await build("a", "quick") == 'start: "quick"'
    for work in check.held.values():
        work.may_end.set()
    await asyncio.gather(quick, *slow)
    assert check.asked.count(('start: "slow 3"', False)) == check.asked.count(('start: "slow 3"', True)) == 1


async def test_a_grammar_is_not_checked_for_a_client_that_left(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check()
    check.held[False] = Work()
    monkeypatch.setattr(CompileCheck, "outcome", lambda _, grammar, allowance: check.outcome(grammar, allowance))

    def request(name: str, **fields: float) -> Exchange:
        body = chat(structured_outputs={"grammar": f'start: "{name}"'}, max_tokens=1, **fields)
        return Exchange(bench.app, "/v1/chat/completions", body)

    async with request("first") as first:
        await begun(check.held[False].began)
        async with request("second") as second:
            await settle()
            second.disconnect()
            assert await second.status() == 499
        async with request("third", timeout=0.05) as third:
            assert await third.status() == 504
        check.held[False].may_end.set()
        assert await first.status() == 200
    assert len(check.asked) == 1


async def test_slow_templates_of_requests_do_not_hold_up_the_models_own(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Work()

    def with_source(template: ChatTemplate, source: str) -> ChatTemplate:
        slow()
        return template

    monkeypatch.setattr(ChatTemplate, "with_source", with_source)
    app = make_bench(allow_request_templates=True).app
    async with contextlib.AsyncExitStack() as stack:
        body = chat(max_tokens=1, chat_template="{{ messages }}")
        sent = [await stack.enter_async_context(Exchange(app, "/v1/chat/completions", body)) for _ in range(5)]
        await begun(slow.began)
        async with Exchange(app, "/v1/chat/completions", chat(max_tokens=1)) as own:
            assert await own.status() == 200
        assert all(request.silent for request in sent)
        slow.may_end.set()
        assert [await request.status() for request in sent] == [200] * 5
