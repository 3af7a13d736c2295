"""Kills the engine process of a server again and again while streams of different kinds run. Compares every reply with
the reply to the same request without a kill.

    python -m benchmarks.http.kills --name engine-kills [--kills 100] [--gap 2,20] [-- MODEL --dtype float32]

Each of 32 clients has one request, which it sends again and again as a stream: greedy or sampled, with several choices,
log-probabilities, penalties, stop strings, short and long prompts. First, each request runs once without a kill. Then
the engine process gets SIGKILL at random intervals. An engine may be killed while it loads, or before it has finished
a step, but not twice in a row, because the server ends on purpose after three such deaths in a row.

The restart time of a kill is the time until /ready answers 200 again. The silence of a stream at a kill is the longest
time without an event of the stream that overlaps the restart time. The silence includes the time in which the restarted
engine computes the tokens of all streams again. The results are written to benchmarks/results/NAME.json and NAME.md.
The program ends after --max-seconds seconds at the latest. Its exit status is 1 if a requirement is not met.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import httpx
import msgspec

from benchmarks.http.processes import processes
from benchmarks.http.record import Verdict, conditions, table, write_results
from benchmarks.http.serving import LOG_TAIL, announcement, running_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "Once upon a time there was a dog who had a red ball. One day the ball rolled into a river. "
READY_SECONDS = 0.02  # seconds between two requests to /ready after a kill
REQUEST_TIMEOUT = 600.0  # seconds without a byte after which a stream counts as broken


def mixed_requests(number: int, longest: int) -> list[tuple[str, dict[str, Any]]]:
    """Returns paths and bodies of `number` different requests with fixed seeds. Replies have up to `longest` tokens."""
    draw = random.Random(7)
    requests: list[tuple[str, dict[str, Any]]] = []
    for index in range(number):
        body: dict[str, Any] = {
            "max_tokens": draw.randint(longest // 4, longest),
            "seed": index,
            "temperature": 0.0 if index % 3 == 0 else 0.9,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        kinds: tuple[dict[str, Any], ...] = (
            {},
            {"n": 2, "max_tokens": longest // 4},
            {"frequency_penalty": 0.5, "presence_penalty": 0.2},
            {"repetition_penalty": 1.2, "min_tokens": 8},
            {"top_p": 0.9, "stop": ["zebra and the"]},
            {"top_k": 20},
        )
        body |= kinds[index % len(kinds)]
        text = TEXT * (1 + 5 * (index % 5 == 4)) + str(index)
        if index % 2:
            logprobs = {"logprobs": True, "top_logprobs": 2} if index % 4 == 1 else {}
            requests.append((CHAT, body | logprobs | {"messages": [{"role": "user", "content": text}]}))
        else:
            requests.append((COMPLETIONS, body | ({"logprobs": 1} if index % 4 == 0 else {}) | {"prompt": text}))
    return requests


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill of the engine process at the time `at`. `ready` is the time at which /ready answered 200 again. `early`
    says whether the engine was killed before it had sent an event, because it was loading or had just become ready."""

    at: float
    ready: float
    early: bool


@dataclass(slots=True)
class Reply:
    """One streamed reply. `choices` has the text, the log-probabilities and the finish reason of each choice,
    `arrivals` has the times at which its events arrived, and `broken` says what went wrong."""

    start: float
    choices: dict[int, dict[str, Any]] = field(default_factory=dict[int, dict[str, Any]])
    tokens: int = 0
    arrivals: list[float] = field(default_factory=list[float])
    end: float | None = None
    broken: str = ""

    @property
    def content(self) -> object:
        return sorted(self.choices.items()), self.tokens

    def take(self, event: dict[str, Any]) -> None:
        if error := event.get("error"):
            self.broken = str(error.get("message"))
        if usage := event.get("usage"):
            self.tokens = usage["completion_tokens"]
        for choice in event.get("choices", ()):
            found = self.choices.setdefault(choice["index"], {"text": "", "logprobs": [], "finish": []})
            found["text"] += choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if logprobs := choice.get("logprobs"):
                found["logprobs"] += logprobs.get("content") or logprobs.get("token_logprobs") or ()
            if choice.get("finish_reason"):
                found["finish"].append(choice["finish_reason"])

    def silence_at(self, kill: Kill) -> float | None:
        """Returns the longest time in seconds between two successive events that overlaps the restart time of a kill.
        Returns None if the stream was not open at the kill or had its last event before the engine was ready again."""
        if kill.at < self.start or not self.arrivals or self.arrivals[-1] < kill.ready:
            return None
        times = [self.start, *self.arrivals]
        return max(after - before for before, after in pairwise(times) if after > kill.at and before < kill.ready)


async def stream(http: httpx.AsyncClient, path: str, body: dict[str, Any], reply: Reply) -> None:
    """Sends a request and reads the events of its reply into `reply`."""
    done = False
    try:
        async with http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                reply.broken = f"status {response.status_code}"
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    reply.arrivals.append(time.monotonic())
                    reply.take(msgspec.json.decode(line.removeprefix("data: ")))
    except httpx.HTTPError as error:
        reply.broken = repr(error)
    if not done and not reply.broken:
        reply.broken = "the stream ended without [DONE]"
    reply.end = time.monotonic()


class Killer:
    """Kills the engine process `number` times. The time between two kills is random, in the range `gap`, in seconds.

    `replies` has the list of replies of each client. The last reply of each client may be unfinished.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        replies: list[list[Reply]],
        number: int,
        gap: tuple[float, float],
        deadline: float,
    ) -> None:
        self._http, self._replies, self._number, self._gap, self._deadline = http, replies, number, gap, deadline
        self._draw = random.Random(11)
        self._open: list[tuple[float, bool]] = []  # the kills since which the engine has not become ready again
        self._ready_since = 0.0
        self.kills: list[Kill] = []

    async def run(self) -> None:
        was_early = False
        next_kill = time.monotonic() + self._draw.uniform(*self._gap)
        while (len(self.kills) + len(self._open) < self._number or self._open) and time.monotonic() < self._deadline:
            await asyncio.sleep(READY_SECONDS)
            is_ready = (await self._http.get("/ready")).status_code == 200
            now = time.monotonic()
            if is_ready and self._open:
                self.kills += [Kill(at, now, early) for at, early in self._open]
                self._open, self._ready_since = [], now
            due = now >= next_kill and len(self.kills) + len(self._open) < self._number
            is_early = not is_ready or not self._event_since(self._ready_since)
            if due and not (is_early and was_early) and (pid := processes().get("engine.process")) is not None:
                os.kill(pid, signal.SIGKILL)
                was_early = is_early
                self._open.append((time.monotonic(), is_early))
                next_kill = time.monotonic() + self._draw.uniform(*self._gap)
                # The loop asks until the server has noticed the death of the engine, or has started another one.
                while is_ready and processes().get("engine.process") in (pid, None):
                    is_ready = (await self._http.get("/ready")).status_code == 200

    def _event_since(self, moment: float) -> bool:
        """Returns whether an event of some stream has arrived after the time `moment`."""
        current = [several[-1] for several in self._replies if several]
        return any(reply.arrivals and reply.arrivals[-1] > moment for reply in current)


async def measure(url: str, flags: argparse.Namespace) -> dict[str, Any]:
    requests = mixed_requests(flags.streams, flags.longest)
    limits = httpx.Limits(max_connections=None)
    deadline = time.monotonic() + flags.max_seconds
    async with httpx.AsyncClient(base_url=url, timeout=REQUEST_TIMEOUT, limits=limits) as http:
        undisturbed = [Reply(time.monotonic()) for _ in requests]
        await asyncio.gather(*(stream(http, *r, reply) for r, reply in zip(requests, undisturbed, strict=True)))
        replies: list[list[Reply]] = [[] for _ in requests]
        killer = Killer(http, replies, flags.kills, flags.gap, deadline)
        killing = asyncio.create_task(killer.run())

        async def repeat(index: int) -> None:
            while not killing.done():
                replies[index].append(Reply(time.monotonic()))
                await stream(http, *requests[index], replies[index][-1])

        await asyncio.gather(killing, *map(repeat, range(len(requests))))
        metrics = (await http.get("/metrics")).text
    return evaluate(undisturbed, replies, killer.kills) | {"metrics": metrics_of(metrics)}


def evaluate(undisturbed: Sequence[Reply], replies: Sequence[Sequence[Reply]], kills: Sequence[Kill]) -> dict[str, Any]:
    everything = [reply for several in replies for reply in several]
    silences: list[float] = []
    beyond: list[float] = []
    for kill in kills:
        found = [s for reply in everything if (s := reply.silence_at(kill)) is not None]
        silences += found
        beyond += [silence - (kill.ready - kill.at) for silence in found]
    different = [
        (index, reply.content, undisturbed[index].content)
        for index, several in enumerate(replies)
        for reply in several
        if not reply.broken and reply.content != undisturbed[index].content
    ]
    return {
        "kills": len(kills),
        "early_kills": sum(kill.early for kill in kills),
        "streams": len(everything),
        "tokens": sum(reply.tokens for reply in everything),
        "broken": [reply.broken for reply in (*undisturbed, *everything) if reply.broken][:10],
        "num_broken": sum(bool(reply.broken) for reply in (*undisturbed, *everything)),
        "num_different": len(different),
        "different": [str(entry)[:2000] for entry in different[:3]],
        "restart_seconds": percentiles([kill.ready - kill.at for kill in kills]),
        "silence_seconds": percentiles(silences),
        "silence_beyond_restart_seconds": percentiles(beyond),
        "num_silences": len(silences),
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values) or [float("nan")]
    return {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }


def metrics_of(text: str) -> dict[str, float]:
    """Returns the values of the server's metrics for restarts of the engine and for requests that were sent to it
    again."""
    names = ("jamba_engine_restarts_total", "jamba_replayed_requests_total", "jamba_aborted_requests_total")
    lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith(names)]
    return {name: float(value) for name, _, value in lines if float(value)}


def body_of(found: dict[str, Any]) -> str:
    """Returns the Markdown of the measurements."""
    rows = (
        ("restart: kill to /ready", "restart_seconds"),
        ("silence of a stream at a kill", "silence_seconds"),
        ("silence beyond the kill's restart", "silence_beyond_restart_seconds"),
    )
    seconds = table(("seconds", "p50", "p99", "max"), [(row, *found[key].values()) for row, key in rows])
    metrics = "\n".join(f"{metric} {value:g}" for metric, value in found["metrics"].items())
    return f"{seconds}\n```\n{metrics}\n```\n"


def verdicts_of(found: dict[str, Any], num_kills: int) -> list[Verdict]:
    beyond = found["silence_beyond_restart_seconds"]["p99"]
    early = f"{found['kills']}, {found['early_kills']} of them before the engine had sent an event"
    return [
        Verdict(f"{num_kills} kills", early, found["kills"] == num_kills),
        Verdict("no broken stream", f"{found['num_broken']} of {found['streams']}", found["num_broken"] == 0),
        Verdict(
            "each reply equal to the undisturbed one, so no token lost or doubled",
            f"{found['num_different']} different, {found['tokens']} tokens",
            found["num_different"] == 0,
        ),
        Verdict("p99 of the silence within the restart time + 1 s", f"{beyond} s beyond the restart", beyond <= 1),
    ]


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--kills", type=int, default=100, help="number of kills")
    parser.add_argument("--gap", default="2,20", help="shortest and longest time between two kills, in seconds")
    parser.add_argument("--streams", type=int, default=32, help="number of streams at the same time")
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest reply")
    parser.add_argument("--max-seconds", type=float, default=2400.0, help="time limit of the whole measurement")
    flags = parser.parse_args(arguments[:split])
    shortest, longest = map(float, flags.gap.split(","))
    flags.gap = (shortest, longest)
    with running_server(arguments[split + 1 :], 600.0) as (url, log):
        try:
            found = asyncio.run(measure(url, flags))
        except httpx.TransportError as error:
            log.seek(0)
            sys.exit(f"{log.read()[-LOG_TAIL:]}\nThe server is gone ({error!r}); the end of its log is above.")
        server = announcement(log)
    title = f"The engine killed again and again under {flags.streams} mixed streams."
    verdicts = verdicts_of(found, flags.kills)
    write_results(flags.name, title, conditions(server, arguments), found, body_of(found), verdicts)


if __name__ == "__main__":
    main()
