"""Templates in processes of their own: limits of time and memory, replacements, and what goes on meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from jamba_server.engine.errors import CheckpointError, ConfigError, Overloaded, RequestRejected
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.rendering import __main__ as worker
from jamba_server.server.text.rendering import process, wire
from jamba_server.server.text.rendering.local import LocalRenderer
from jamba_server.server.text.rendering.process import TemplateProcesses
from jamba_server.server.text.rendering.renderer import Compiled, RendererStopped, Rendering
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import MakeBench, chat

LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
ON_DEMAND = "{% if messages[0].content == 'loop' %}" + LOOP + "{% endif %}{{ messages[0].content }}"
PADDING = '{{ "%10000000000d" | format(1) }}'
HI = [{"role": "user", "content": "hello"}]
SLOW = [{"role": "user", "content": "loop"}]


@pytest.fixture
def processes() -> Generator[TemplateProcesses]:
    with TemplateProcesses(seconds=0.5) as processes:
        yield processes


def test_the_results_are_those_of_this_process(processes: TemplateProcesses) -> None:
    contexts = [{"a": 2**80, "b": "é\n\U0001f600"}, {"a": None, "b": [1.5, True]}, {"a": {}, "b": "\ufdd0"}]
    for source in ("{{ a }}{{ b }}", "{{ a + 1 }}", "{{ b.c.d }}", "{{ raise_exception('no') }}"):
        assert processes.compile(source) == LocalRenderer().compile(source)
        assert processes.render(source, contexts) == LocalRenderer().render(source, contexts)
    assert processes.compile("{{ ").error == "line 1: unexpected 'end of template'"
    assert processes.render("{{ a }}", []) == []


def test_a_template_that_loops(processes: TemplateProcesses, tokenizer: Tokenizer) -> None:
    template = ChatTemplate(ON_DEMAND, tokenizer, processes)
    before = processes.pids
    with pytest.raises(RequestRejected, match=r"^The chat template did not finish within 0\.5 s\.$") as caught:
        template.render(SLOW)
    assert caught.value.param == "messages"
    assert not set(before) & set(processes.pids), "the process was replaced"
    assert template.render(HI).text == "hello"


def test_a_template_that_takes_too_long_to_compile(processes: TemplateProcesses, tokenizer: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match=r"does not compile: it did not finish within 0\.5 s"):
        ChatTemplate("{{ a }}{% if b %}{% endif %}" * 35_000, tokenizer, processes)
    assert ChatTemplate("{{ messages[0].content }}", tokenizer, processes).render(HI).text == "hello"


def test_a_template_that_fills_the_memory(processes: TemplateProcesses, tokenizer: Tokenizer) -> None:
    template = ChatTemplate(PADDING, tokenizer, processes)
    with pytest.raises(RequestRejected, match=r"needs too much memory \(line 1 of the template\)"):
        template.render(HI)
    assert len(processes.pids) == 1


@pytest.mark.parametrize("source", ["{{ " + "(" * 3000 + ")" * 3000 + " }}", "{{ " + "[" * 90000 + " }}"])
def test_a_template_that_is_nested_too_deeply(processes: TemplateProcesses, tokenizer: Tokenizer, source: str) -> None:
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate(source, tokenizer, processes)


def test_texts_that_cannot_be_sent(processes: TemplateProcesses, tokenizer: Tokenizer) -> None:
    template = ChatTemplate("{{ messages[0].content }}", tokenizer, processes)
    nested: list[object] = []
    for _ in range(100_000):
        nested = [nested]
    pids = processes.pids
    with pytest.raises(RequestRejected, match="surrogate"):
        template.render([{"role": "user", "content": "\ud800"}])
    with pytest.raises(RequestRejected, match="nested too deeply"):
        template.render([{"role": "user", "content": nested}])
    assert template.render(HI).text == "hello"
    assert processes.pids == pids


def test_other_work_goes_on_while_a_template_loops(tokenizer: Tokenizer) -> None:
    with TemplateProcesses(seconds=60) as processes:
        template = ChatTemplate(ON_DEMAND, tokenizer, processes)
        errors: list[Exception] = []

        def loop() -> None:
            try:
                template.render(SLOW)
            except Overloaded as error:
                errors.append(error)

        thread = threading.Thread(target=loop)
        thread.start()
        for _ in range(20):
            assert template.render(HI).text == "hello"
        assert thread.is_alive()
        processes.close()
        thread.join(10)
        assert not thread.is_alive(), "closing ends work in progress"
    assert "shutting down" in str(errors[0])
    with pytest.raises(Overloaded, match="shutting down"):
        template.render(HI)


def test_a_process_that_someone_kills_is_replaced(processes: TemplateProcesses) -> None:
    assert processes.render("{{ a }}", [{"a": 1}]) == [Rendering("1")]
    [pid] = processes.pids
    os.kill(pid, signal.SIGKILL)
    assert processes.render("{{ a }}", [{"a": 2}]) == [Rendering("2")]
    assert pid not in processes.pids


def test_a_process_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ConfigError, match=r"can be started: .*No such file"):
        TemplateProcesses()
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with TemplateProcesses() as processes, pytest.raises(RendererStopped, match=r"twice: .* ended with status 0"):
        processes.compile("x")
    monkeypatch.setattr(sys, "executable", "/bin/cat")  # it ends at once, since it does not know the flags
    monkeypatch.setattr(process, "START_SECONDS", 0.0)
    with TemplateProcesses() as processes, pytest.raises(RendererStopped, match="did not start within 0 s"):
        processes.compile("x")


def test_the_process_has_no_secrets_and_little_memory(
    monkeypatch: pytest.MonkeyPatch, processes: TemplateProcesses
) -> None:
    monkeypatch.setenv("JAMBA_API_KEY", "secret")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    with TemplateProcesses() as others:
        assert others.compile("x") == Compiled()
        [pid] = others.pids
        names = {line.partition("=")[0] for line in Path(f"/proc/{pid}/environ").read_text().split("\0") if line}
        assert {"TZ", "PYTHONPATH"} <= names <= {"TZ", "PYTHONPATH", "LD_LIBRARY_PATH", "PYTHONHOME", "TZDIR"}
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert [line.split()[-3] for line in limits.splitlines() if "address space" in line] == [str(1 << 30)]


def test_the_process_imports_little() -> None:
    """It starts while the server starts, so it must not take the time for torch or pydantic."""
    code = "import sys, jamba_server.server.text.rendering.__main__; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "pydantic", "fastapi", "tokenizers", "asyncio"} & {n.partition(".")[0] for n in found}


def test_an_orphan_ends_itself() -> None:
    """The parent's time limit does not help if the parent was killed."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-P", "-m", worker.__package__ or "", str(theirs.fileno()), "0.1"]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as orphan:
            ours.sendall(wire.pack(wire.Work(LOOP, [{}])))
            assert orphan.wait(60) == -signal.SIGALRM


def test_the_end_of_the_stream_ends_the_process() -> None:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=worker.serve, args=(theirs, 60.0))
    with theirs:
        thread.start()
        with ours:
            assert wire.receive(ours, wire.Ready) == wire.Ready()
            ours.sendall(wire.pack(wire.Work("{{ a }}")))
            assert wire.receive(ours, wire.Done) == wire.Done(compiled=Compiled(frozenset({"a"})))
            ours.sendall(wire.pack(wire.Work("{{ a }}", [{"a": 1}])))
            assert wire.receive(ours, wire.Done) == wire.Done(renderings=[Rendering("1")])
        thread.join(10)
    assert not thread.is_alive()


def test_frames_that_cannot_be_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(ValueError, match="at most"):
            wire.receive(ours, wire.Ready)
        theirs.sendall(b"\x01\x00\x00\x00")
        with pytest.raises(TimeoutError):
            wire.receive(ours, wire.Ready, deadline=time.monotonic() + 0.01)
        theirs.sendall(b"\x05\x00\x00\x00{")
        theirs.close()
        assert wire.receive(ours, wire.Ready) is None


# Through the API ----------------------------------------------------------------------------------------------------


async def test_a_cancelled_request_does_not_wait_for_its_template(make_bench: MakeBench, tokenizer: Tokenizer) -> None:
    with TemplateProcesses(seconds=60) as processes:
        bench = make_bench(chat_template=ChatTemplate(ON_DEMAND, tokenizer, processes))
        async with bench.http() as http:
            body = chat() | {"messages": SLOW}
            request = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            while len(processes.pids) < 2:  # a second process starts for the second request, beside the looping one
                assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(request, 10)
            assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200


async def test_a_looping_template_is_a_400(make_bench: MakeBench, tokenizer: Tokenizer) -> None:
    with TemplateProcesses(seconds=0.3) as processes:
        bench = make_bench(chat_template=ChatTemplate(ON_DEMAND, tokenizer, processes))
        async with bench.http() as http:
            slow = [http.post("/v1/chat/completions", json=chat() | {"messages": SLOW}) for _ in range(3)]
            fast = [http.post("/v1/chat/completions", json=chat()) for _ in range(3)]
            replies = await asyncio.gather(*slow, *fast)
    assert [reply.status_code for reply in replies] == [400] * 3 + [200] * 3
    assert replies[0].json()["error"]["message"] == "The chat template did not finish within 0.3 s."
