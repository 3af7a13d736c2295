from __future__ import annotations

import subprocess
import sys
import tempfile

import pytest

from benchmarks.http.serving import announcement, flag, parse_arguments, wait_until_ready


def test_what_follows_the_dashes_goes_to_the_server() -> None:
    flags, serve_arguments = parse_arguments(["--name", "x", "--num-prompts", "3", "--", "MODEL", "--dtype", "float32"])
    assert (flags.name, flags.num_prompts, flags.concurrency) == ("x", 3, "1,8,32")
    assert serve_arguments == ["MODEL", "--dtype", "float32"]
    assert parse_arguments(["--name", "x"])[1] == []


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--dtype", "float32"], "float32"),
        (["MODEL", "--dtype=float16"], "float16"),
        (["--dtypes", "float32"], "auto"),
        ([], "auto"),
    ],
)
def test_the_peer_takes_the_servers_flags(arguments: list[str], value: str) -> None:
    assert flag(arguments, "--dtype", "auto") == value


def test_a_server_that_ends_at_once_is_reported_with_its_log() -> None:
    with tempfile.TemporaryFile("a+") as log:
        command = [sys.executable, "-c", "print('no such checkpoint'); raise SystemExit(3)"]
        process = subprocess.Popen(command, stdout=log)
        process.wait()
        with pytest.raises(SystemExit, match=r"no such checkpoint\n+The server ended with status 3"):
            wait_until_ready(process, "http://127.0.0.1:1", log, 10)


def test_the_announcement_is_found_in_the_log() -> None:
    with tempfile.TemporaryFile("a+") as log:
        lines = ("x: model loading", "y: model     Jamba", "y: kernels   reference", "y: ready     http")
        log.write("".join(f"2026-01-01 00:00:00,000 INFO {line}\n" for line in lines))
        assert announcement(log) == ["model     Jamba", "kernels   reference"]
