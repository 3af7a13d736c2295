"""`jamba serve` as an operator sees it: a process with signals, exit statuses and sentences."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

COMMAND = (sys.executable, "-m", "jamba_server", "serve")
LINE = re.compile(r"\d{4}-\d\d-\d\d [\d:,]{12} (INFO|WARNING) ([a-z_.]+): (.+)\n")
STREAM = {"prompt": [5, 6, 7], "max_tokens": 600, "ignore_eos": True, "stream": True}


@contextmanager
def server(*flags: str) -> Generator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, once it is ready."""
    command = (*COMMAND, "--port", "0", "--threads", "1", *flags)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            log: list[str] = []
            for line in process.stderr:
                log.append(line)
                if found := re.search(r": ready +listening on (http://\S+)/v1 ", line):
                    yield process, found[1]
                    return
            raise AssertionError("".join(log))
        finally:
            process.kill()


def test_the_lines_of_a_start() -> None:
    """All have one format, whoever says them. The last one names the addresses of the API and the chat page, with a
    command that works."""
    command = (*COMMAND, "--port", "0", "--threads", "1", "--max-model-len", "1000000")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            log = [process.stderr.readline()]
            while log[-1] and "curl" not in log[-1]:
                log.append(process.stderr.readline())
            words = shlex.split(log[-1].partition("; try: ")[2])
            assert (words[0], words[2], words[4]) == ("curl", "-H", "-d")
            header = dict([words[3].split(": ")])
            assert httpx.post(words[1], headers=header, content=words[5], timeout=60).status_code == 200
            page = log[-1].partition("; chat page at ")[2].partition("; ")[0]
            assert "main.js" in httpx.get(page, headers={"Accept": "text/html"}, timeout=60).text
            process.send_signal(signal.SIGTERM)
            rest = process.stderr.readlines()
        finally:
            process.kill()
    assert [line for line in log + rest if not LINE.fullmatch(line)] == []
    said = [(found[2], found[3]) for line in log if (found := LINE.fullmatch(line))]
    assert said[0][1].startswith("jamba-server ")
    assert "kernels.cpu.library" in {name for name, _ in said}, "a line of the engine's process"
    warnings = [line for line in log if " WARNING " in line]
    assert len(warnings) == 1
    assert "max_model_len 1000000 is reduced to 4096" in warnings[0]


def test_sigterm_ends_a_server_whose_template_loops(tmp_path: Path) -> None:
    """The request is cut off after the time for running requests, and no process is left."""
    template = tmp_path / "loop.jinja"
    template.write_text("{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3)
    flags = ("--chat-template", str(template), "--shutdown-timeout", "0.1")
    with server(*flags) as (process, address), httpx.Client(base_url=address, timeout=60) as http:
        children = children_of(process.pid)
        [renderer] = [child for child in children if "rendering" in Path(f"/proc/{child}/cmdline").read_text()]

        def ask() -> None:
            with suppress(httpx.HTTPError):
                http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})

        thread = threading.Thread(target=ask)
        before = cpu_ticks(renderer)
        thread.start()
        while cpu_ticks(renderer) < before + 10:  # the template loops
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        thread.join(60)
        assert len(children) == 2, "the engine and the process that renders templates"
        assert not any(Path(f"/proc/{child}").exists() for child in children)


def cpu_ticks(pid: int) -> int:
    """The time that a process has spent in its own code, in hundredths of a second."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sigterm_lets_running_requests_finish() -> None:
    with server() as (process, address), httpx.Client(base_url=address, timeout=60) as http:
        assert http.get("/ready").status_code == 200
        with http.stream("POST", "/v1/completions", json=STREAM) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            with httpx.Client(base_url=address) as other:
                while (ready := other.get("/ready")).status_code == 200:
                    pass
                assert ready.status_code == 503
                refused = other.post("/v1/completions", json=STREAM)
                assert refused.status_code == 503
                assert int(refused.headers["Retry-After"]) > 0
                assert refused.json()["error"]["code"] == "overloaded"
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(timeout=30) == 0


def test_sigterm_without_work_ends_at_once() -> None:
    with server() as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


def test_sigterm_while_loading_ends_at_once() -> None:
    command = (*COMMAND, "--port", "0", "--threads", "1")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "loading weights" in line:
                break
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(timeout=60) == 0


def test_a_choice_that_cannot_be_met_is_one_sentence() -> None:
    for flags, message in (
        (("/no/such/folder",), "no folder /no/such/folder"),
        (("--quantization", "gptq"), "--quantization is 'gptq'; it must be one of int8, int4, int4-g32, fp8."),
        (("--tensor-parallel-size", "3"), "tensor_parallel_size"),
        (("--kernels", "linear=magic"), "magic"),
    ):
        done = subprocess.run((*COMMAND, "--port", "0", *flags), capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        [sentence] = [line for line in done.stderr.splitlines() if line.startswith("jamba: ")]
        assert message in sentence
        assert "Traceback" not in done.stderr
