"""`jamba serve` as an operator sees it: a process with signals, exit statuses and sentences."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager

import httpx

COMMAND = (sys.executable, "-m", "jamba_server", "serve")
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
        (("--quantization", "gptq"), "--quantization is 'gptq'; it must be one of int8, int4, fp8."),
        (("--tensor-parallel-size", "2"), "2 is not supported yet"),
        (("--kernels", "linear=magic"), "magic"),
    ):
        done = subprocess.run((*COMMAND, "--port", "0", *flags), capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        [sentence] = [line for line in done.stderr.splitlines() if line.startswith("jamba: ")]
        assert message in sentence
        assert "Traceback" not in done.stderr
