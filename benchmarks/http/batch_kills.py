"""Kills the server with SIGKILL again and again while it runs a batch, and starts it again each time. Compares the
results with those of the same batch without a kill.

    python -m benchmarks.http.batch_kills --name batch-kills [--kills 10] [--lines 500] [-- MODEL --dtype float32]

The batch has chat requests, greedy ones and ones with a seed. One line in fifty is invalid: no JSON, a custom_id that
was there before, another url, `stream: true`, or a temperature out of range. OpenAI's client uploads the file and makes
the batch. A kill comes when a random number of further lines have finished. The requirements are: each custom_id has
exactly one result; the results equal those without a kill; and no finished line is lost at a kill. The results are
written to benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from openai import OpenAI
from openai.types import Batch

from benchmarks.http.processes import processes
from benchmarks.http.record import Verdict, conditions, table, write_results
from benchmarks.http.serving import announcement, running_server

CHAT = "/v1/chat/completions"
ENDS = ("completed", "failed", "expired", "cancelled")
SYSTEM = "You are a helpful assistant who tells short stories for children. Each story has a happy end. "
START_TIMEOUT = 600.0
POLL_SECONDS = 0.05


def batch_lines(number: int, longest: int) -> list[str]:
    """Returns the lines of an input file. Replies have up to `longest` tokens."""
    draw = random.Random(11)
    lines: list[str] = []
    for index in range(number):
        body: dict[str, Any] = {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"Tell me story number {index} of {draw.choice('abcdef')}."},
            ],
            "max_tokens": draw.randint(longest // 4, longest),
            "temperature": 0.0 if index % 2 else 0.9,
            "seed": index,
        }
        line = {"custom_id": f"request-{index}", "method": "POST", "url": CHAT, "body": body}
        lines.append(json.dumps(line) if index % 50 != 49 else invalid_line(line, index // 50))
    return lines


def invalid_line(line: dict[str, Any], kind: int) -> str:
    """Returns one of five kinds of invalid lines."""
    changed: tuple[str, ...] = (
        json.dumps(line)[:-5],
        json.dumps(line | {"custom_id": "request-0"}),
        json.dumps(line | {"url": "/v1/completions"}),
        json.dumps(line | {"body": line["body"] | {"stream": True}}),
        json.dumps(line | {"body": line["body"] | {"temperature": 9}}),
    )
    return changed[kind % len(changed)]


@dataclass
class Run:
    """What came out of a batch. `replies` has the reply of each line without its ids and times, by custom_id, and
    `ids` has the custom_id of each line of the output file. `errors` has the ids and codes of the error file."""

    status: str = ""
    counts: tuple[int, int, int] = (0, 0, 0)
    seconds: float = 0.0
    replies: dict[str, Any] = field(default_factory=dict[str, Any])
    ids: list[str] = field(default_factory=list[str])
    errors: list[tuple[str | None, Any]] = field(default_factory=list[tuple[str | None, Any]])
    kills: list[dict[str, int]] = field(default_factory=list[dict[str, int]])


def read_results(client: OpenAI, batch: Batch, run: Run) -> None:
    assert batch.request_counts is not None
    run.status = batch.status
    run.counts = (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed)
    for file_id in (batch.output_file_id, batch.error_file_id):
        for text in client.files.content(file_id).text.splitlines() if file_id else ():
            line = json.loads(text)
            if file_id == batch.output_file_id:
                body = line["response"]["body"]
                run.ids.append(line["custom_id"])
                run.replies[line["custom_id"]] = {"choices": body["choices"], "tokens": body["usage"]["total_tokens"]}
            else:
                error = line["error"] or line["response"]["body"]["error"]
                run.errors.append((line["custom_id"], error["code"]))
    run.errors.sort(key=str)


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none")


def finished(batch: Batch) -> int:
    return 0 if batch.request_counts is None else batch.request_counts.completed + batch.request_counts.failed


def wait_for(client: OpenAI, batch_id: str, lines: int, deadline: float) -> Batch:
    """Returns the batch when it has ended or `lines` of its lines have finished."""
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ENDS or finished(batch) >= lines:
            return batch
        time.sleep(POLL_SECONDS)
    sys.exit(f"The batch has not ended in time: {client.batches.retrieve(batch_id)}")


def start(client: OpenAI, lines: list[str]) -> str:
    content = "".join(f"{line}\n" for line in lines).encode()
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id


def run_batch(flags: argparse.Namespace, arguments: list[str], kills: int) -> tuple[Run, list[str]]:
    """Runs the batch, in which the server is killed `kills` times. Returns the results of the batch, and the lines that
    the server logged at its start."""
    run, draw, lines = Run(), random.Random(flags.seed), batch_lines(flags.lines, flags.longest)
    begin, batch_id, server = time.monotonic(), "", list[str]()
    deadline = begin + flags.max_seconds
    # The batch is killed after about these numbers of finished lines.
    targets = sorted(draw.randrange(flags.lines // 20, flags.lines * 19 // 20) for _ in range(kills))
    with tempfile.TemporaryDirectory() as folder:
        for target in [*targets, flags.lines + 1]:
            with running_server([*arguments, "--data-dir", folder], START_TIMEOUT) as (url, log):
                client = client_of(url)
                batch_id = batch_id or start(client, lines)
                resumed = finished(client.batches.retrieve(batch_id))
                if run.kills:
                    run.kills[-1]["after"] = resumed
                if target <= flags.lines:
                    batch = wait_for(client, batch_id, max(target, resumed + 1), deadline)
                    os.kill(processes()["http"], signal.SIGKILL)
                    run.kills.append({"at": finished(batch)})
                    continue
                read_results(client, wait_for(client, batch_id, target, deadline), run)
                server = announcement(log)
    run.seconds = time.monotonic() - begin
    return run, server


def verdicts_of(whole: Run, killed: Run, flags: argparse.Namespace) -> list[Verdict]:
    counts = Counter(killed.ids)
    repeated = [id_ for id_, number in counts.items() if number > 1]
    missing = whole.replies.keys() - killed.replies.keys()
    different = [id_ for id_, reply in killed.replies.items() if whole.replies.get(id_) != reply]
    lost = [kill for kill in killed.kills if kill["after"] < kill["at"]]
    return [
        Verdict(f"{flags.kills} kills", str(len(killed.kills)), len(killed.kills) == flags.kills),
        Verdict("both batches completed", f"{whole.status}, {killed.status}", whole.status == killed.status == ENDS[0]),
        Verdict(
            "each valid custom_id has one result",
            f"{len(killed.ids)} results, {len(repeated)} repeated, {len(missing)} missing",
            not repeated and not missing,
        ),
        Verdict("each result equals that without a kill", f"{len(different)} different", not different),
        Verdict(
            "the same errors of invalid lines",
            f"{len(killed.errors)} errors of {flags.lines // 50} invalid lines",
            killed.errors == whole.errors and len(killed.errors) == flags.lines // 50,
        ),
        Verdict("no finished line is lost at a kill", f"{len(lost)} kills with a loss", not lost),
        Verdict("the same counts", f"{whole.counts}, {killed.counts}", whole.counts == killed.counts),
    ]


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--kills", type=int, default=10, help="number of kills")
    parser.add_argument("--lines", type=int, default=500, help="lines of the batch")
    parser.add_argument("--longest", type=int, default=64, help="tokens of the longest reply")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
    parser.add_argument("--max-seconds", type=float, default=1200.0, help="time limit of each of the two batches")
    flags = parser.parse_args(arguments[:split])
    whole, server = run_batch(flags, arguments[split + 1 :], 0)
    killed, _ = run_batch(flags, arguments[split + 1 :], flags.kills)
    rows = [(number, kill["at"], kill["after"]) for number, kill in enumerate(killed.kills, start=1)]
    body = table(("kill", "lines finished before", "lines finished at the next start"), rows)
    body += f"\nThe batch took {whole.seconds:.0f} s without kills and {killed.seconds:.0f} s with kills and starts.\n"
    codes = Counter(str(code) for _, code in killed.errors)
    body += f"Errors of invalid lines: {', '.join(f'{code} ({number})' for code, number in sorted(codes.items()))}.\n"
    found = {"whole": vars(whole) | {"replies": len(whole.replies)}, "killed": vars(killed) | {"replies": None}}
    title = f"A batch of {flags.lines} lines while the server gets SIGKILL {flags.kills} times."
    verdicts = verdicts_of(whole, killed, flags)
    write_results(flags.name, title, conditions(server, arguments), found, body, verdicts)


if __name__ == "__main__":
    main()
