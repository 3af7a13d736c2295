"""Sends signals to each process of a server in each phase of the server's life, and writes a table of what happens.

    python -m benchmarks.http.signals --name signals [--only idle]

The signals are SIGTERM, SIGINT, SIGKILL and SIGSTOP. The processes are the HTTP process and the engine process. The
phases are: the engine loads, the server is idle, streams run, and the server drains after a first SIGTERM. Each of the
32 cases has a server of its own with the demonstration checkpoint and short timeouts. After each case, no process of
the server may be left. The results are benchmarks/results/NAME.md and NAME.json.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import IO, Literal, get_args

import httpx
import msgspec

from benchmarks.http.record import Verdict, conditions, write_results
from benchmarks.http.serving import LOG_TAIL
from benchmarks.http.shapes import descendants

Phase = Literal["loading", "idle", "load", "drain"]
PHASES: tuple[Phase, ...] = get_args(Phase)
PROCESSES = ("http", "engine")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGSTOP)

# Values of the server's options --engine-timeout, --load-timeout and --shutdown-timeout, in seconds.
ENGINE_TIMEOUT, LOAD_TIMEOUT, SHUTDOWN_TIMEOUT = 3, 6, 30
TIMEOUTS = {"engine-timeout": ENGINE_TIMEOUT, "load-timeout": LOAD_TIMEOUT, "shutdown-timeout": SHUTDOWN_TIMEOUT}
FLAGS = ["serve", "--port", "0", *(word for name, value in TIMEOUTS.items() for word in (f"--{name}", str(value)))]
# Seconds for which the HTTP process is stopped by SIGSTOP; longer than the two timeouts of the engine.
STOPPED_SECONDS = 8.0
START_SECONDS = 120.0  # time limit for the start of a server, in seconds
END_SECONDS = 90.0  # time limit for the end of a server, in seconds
ORPHAN_SECONDS = 5.0  # time limit for the end of the engine process after the end of the HTTP process
SLACK_SECONDS = 8.0  # seconds that are added to every time limit, because the machine may be busy
LOG_BYTES = 1 << 20  # maximum number of bytes of the server's log that are read
STREAMS = 4
STREAM = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True, "temperature": 0, "stream": True}
IGNORED = 1 << (signal.SIGTERM - 1)


@dataclass(slots=True)
class Outcome:
    """The result of one test case: what should happen, what happened, and how many seconds that took."""

    phase: Phase
    process: str
    signal: str
    expected: str
    seen: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    orphans: list[int] = field(default_factory=list[int])

    @property
    def met(self) -> bool:
        return self.seen == self.expected and self.seconds <= self.limit and not self.orphans


class Server:
    """A running server with the demonstration checkpoint, and the streams that threads of this program read from it."""

    def __init__(self, log: IO[str]) -> None:
        self._log = log
        self.http = subprocess.Popen(
            [sys.executable, "-m", "jamba_server", *FLAGS], stdout=log, stderr=log, start_new_session=True
        )
        self.engines: set[int] = set()
        self.ends: list[str] = []  # for each stream that has ended, its last line or its error
        self._readers: list[threading.Thread] = []

    @property
    def log(self) -> str:
        # `pread` does not change the position in the file, which several threads and the server process share.
        return os.pread(self._log.fileno(), LOG_BYTES, 0).decode(errors="replace")

    def engine(self) -> int | None:
        """Returns the id of the present engine process."""
        with suppress(OSError):
            for pid in descendants(self.http.pid):
                if "jamba_server.engine.process" in Path(f"/proc/{pid}/cmdline").read_text():
                    self.engines.add(pid)
                    return pid
        return None

    def until(self, condition: Callable[[], object], seconds: float) -> bool:
        """Waits until the function `condition` returns true, for at most `seconds` seconds. Returns whether that
        happened."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.engine()
            if condition():
                return True
            time.sleep(0.01)
        return False

    @property
    def address(self) -> str | None:
        found = re.search(r"ready +listening on (http://\S+)/v1 ", self.log)
        return found[1] if found else None

    def is_ready(self) -> bool:
        try:
            return self.address is not None and httpx.get(f"{self.address}/ready", timeout=1).status_code == 200
        except httpx.TransportError:
            return False

    def open_streams(self) -> None:
        """Opens STREAMS streams and waits until each has had an event."""
        begun = [threading.Event() for _ in range(STREAMS)]
        self._readers = [threading.Thread(target=self._read, args=(event,), daemon=True) for event in begun]
        for reader in self._readers:
            reader.start()
        for event in begun:
            event.wait(START_SECONDS)

    def _read(self, begun: threading.Event) -> None:
        last, error = "nothing", ""
        try:
            with httpx.stream("POST", f"{self.address}/v1/completions", json=STREAM, timeout=END_SECONDS) as reply:
                for line in reply.iter_lines():
                    last = line or last
                    error = error or (line if '"error":' in line else "")
                    begun.set()
        except httpx.HTTPError as failure:
            error = type(failure).__name__
        begun.set()
        self.ends.append(error or last)

    def streams_are_whole(self) -> bool:
        for reader in self._readers:
            reader.join(END_SECONDS)
        return self.ends == ["data: [DONE]"] * STREAMS

    def ended(self, seconds: float) -> str:
        """Waits for the end of the HTTP process, and returns its exit status in words."""
        if not self.until(lambda: self.http.poll() is not None, seconds):
            return "does not end"
        return f"ends with {self.http.returncode}"

    def orphans(self) -> list[int]:
        """Waits until all engine processes have ended, but for a limited time. Returns the ids of those that are still
        running."""
        self.until(lambda: not any(map(runs, self.engines)), ORPHAN_SECONDS)
        return [pid for pid in self.engines if runs(pid)]

    def kill(self) -> None:
        self.http.kill()
        self.http.wait()
        for pid in self.engines:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def runs(pid: int) -> bool:
    """Returns whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def ignores_sigterm(pid: int) -> bool:
    """Returns whether a process ignores SIGTERM. An engine process ignores this signal from the moment at which it
    begins to load the model."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return bool(int(status.partition("SigIgn:")[2].split()[0], 16) & IGNORED)


def enter(server: Server, phase: Phase) -> int:
    """Waits until a server has reached the given phase of its life. Returns the id of the engine process."""
    if not server.until(lambda: (pid := server.engine()) is not None and ignores_sigterm(pid), START_SECONDS):
        sys.exit(f"{server.log[-LOG_TAIL:]}\nThe server has not started its engine.")
    if phase != "loading" and not server.until(server.is_ready, START_SECONDS):
        sys.exit(f"{server.log[-LOG_TAIL:]}\nThe server is not ready.")
    if phase in ("load", "drain"):
        server.open_streams()
    if phase == "drain":
        server.http.send_signal(signal.SIGTERM)
        server.until(lambda: "takes no new requests" in server.log, START_SECONDS)
    engine = server.engine()
    assert engine is not None
    return engine


def expectation(phase: Phase, process: str, number: signal.Signals) -> tuple[str, float]:
    """Returns a description of what should happen after a signal, and the time limit for it in seconds."""
    streams = "streams whole, " if phase in ("load", "drain") else ""
    finish = SHUTDOWN_TIMEOUT if streams else 0
    match process, number:
        case "http", signal.SIGKILL:
            return "ends with -9", SLACK_SECONDS
        case "http", signal.SIGSTOP:
            limit = STOPPED_SECONDS + finish + SLACK_SECONDS
            return f"goes on after SIGCONT, same engine, {streams}ends with 0", limit
        case "http", _ if phase == "drain":
            return f"ends with {128 + number}", SLACK_SECONDS
        case "http", _:
            return f"{streams}ends with 0", finish + SLACK_SECONDS
        case _, signal.SIGKILL | signal.SIGSTOP if phase == "loading":
            return "ends with 1", (LOAD_TIMEOUT if number == signal.SIGSTOP else 0) + SLACK_SECONDS
        case _, signal.SIGKILL | signal.SIGSTOP:
            hang = ENGINE_TIMEOUT if number == signal.SIGSTOP else 0
            return f"new engine, {streams}ends with 0", hang + finish + 2 * SLACK_SECONDS
        case _:
            return f"same engine, {streams}ends with 0", finish + 2 * SLACK_SECONDS


def observe(server: Server, phase: Phase, process: str, number: signal.Signals, engine: int) -> Iterator[str]:
    """Sends a signal and yields descriptions of what happens, in the same words as the function `expectation`."""
    os.kill(server.http.pid if process == "http" else engine, number)
    if process == "http" and number == signal.SIGSTOP:
        server.until(lambda: False, STOPPED_SECONDS)
        server.http.send_signal(signal.SIGCONT)
        yield "goes on after SIGCONT" if phase == "drain" or server.until(server.is_ready, START_SECONDS) else "hangs"
        yield "same engine" if server.engine() == engine else "another engine"
    elif process == "engine" and not (phase == "loading" and number in (signal.SIGKILL, signal.SIGSTOP)):
        yield from observe_engine(server, phase, number, engine)
    goes_on = process == "engine" or number == signal.SIGSTOP
    if goes_on and phase != "drain" and server.http.poll() is None and server.address is not None:
        server.http.send_signal(signal.SIGTERM)
    killed = process == "http" and (number == signal.SIGKILL or phase == "drain") and number != signal.SIGSTOP
    if phase in ("load", "drain") and not killed:
        yield "streams whole" if server.streams_are_whole() else f"streams broken ({server.ends})"
    yield server.ended(END_SECONDS)


def observe_engine(server: Server, phase: Phase, number: signal.Signals, engine: int) -> Iterator[str]:
    """Yields descriptions of what happens after a signal to the engine process: whether it was replaced by a new
    process."""
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        server.until(lambda: phase == "drain" or server.is_ready(), START_SECONDS)
        yield "same engine" if server.engine() == engine else "another engine"
        return
    if phase == "idle" and number == signal.SIGSTOP:  # that an idle engine hangs is noticed only when it gets work
        server.open_streams()
    replaced = server.until(lambda: server.engine() not in (None, engine), START_SECONDS)
    if phase == "idle":
        server.until(server.is_ready, START_SECONDS)
    yield "new engine" if replaced else "no new engine"


def run(phase: Phase, process: str, number: signal.Signals) -> Outcome:
    expected, limit = expectation(phase, process, number)
    outcome = Outcome(phase, process, number.name, expected, limit=limit)
    with tempfile.TemporaryFile("a+") as log:
        server = Server(log)
        try:
            engine = enter(server, phase)
            start = time.monotonic()
            outcome.seen = ", ".join(observe(server, phase, process, number, engine))
            outcome.seconds = round(time.monotonic() - start, 2)
            outcome.orphans = server.orphans()
        finally:
            server.kill()
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--only", default=",".join(PHASES), help="phases to measure, separated by commas")
    flags = parser.parse_args()
    outcomes: list[Outcome] = []
    names: list[str] = flags.only.split(",")
    phases: list[Phase] = [phase for phase in PHASES if phase in names]
    for phase, process, number in product(phases, PROCESSES, SIGNALS):
        outcomes.append(run(phase, process, number))
        sys.stderr.write(f"{outcomes[-1]}\n")
    title = (
        "What each signal to each process does in each phase. Where the signal itself does not end the server, SIGTERM "
        f"is sent to the HTTP process afterwards. A stopped HTTP process gets SIGCONT after {STOPPED_SECONDS:g} s. The "
        "seconds count from the signal to the end of the server. In the phases load and drain, "
        f"{STREAMS} streams of {STREAM['max_tokens']} tokens run. No case may leave a process behind."
    )
    verdicts = [
        Verdict(
            f"{o.phase}: {o.signal} to {o.process}: {o.expected}, within {o.limit:g} s",
            f"{'the same' if o.seen == o.expected else o.seen}, {o.seconds} s, {len(o.orphans)} orphans",
            o.met,
        )
        for o in outcomes
    ]
    content = {"outcomes": [msgspec.to_builtins(outcome) for outcome in outcomes]}
    write_results(flags.name, title, conditions([" ".join(FLAGS)], sys.argv[1:]), content, "", verdicts)


if __name__ == "__main__":
    main()
