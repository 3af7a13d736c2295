"""Writes the results of `benchmarks.cache.traces` as a page."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from jamba_server.server.cli.bench.trees import ChatTrees

RESULTS = Path(__file__).parents[1] / "results"
TRACES = {"conv": "chats", "code": "code completions"}
TABLE = """
Requests: the first {requests} of each of the Azure LLM inference traces of 2023 (Microsoft Azure, CC BY 4.0). Arrivals
and lengths are those of the trace; arrivals are stretched, because two cores are slower than what the trace was
recorded on. The traces have no text. **Which requests share a prefix is drawn by a model**, `ChatTrees` in
`server/cli/bench/trees.py`, with seed 0: {continued:.0%} of the requests continue one of the {open_chats} chats used
last, if one is shorter than the prompt; {rewound:.0%} of these replace an earlier turn; chats begin with one of
{systems} system prompts of {system_least} to {system_most} tokens. The hit rates are those of this model, not of the
users who were recorded.

Engine: the real scheduler and the real cache with a simulated model. A step takes {step} ms and besides
{prompt_token} ms for a prompt token and {decode} ms for a sequence that decodes, as measured with the shape `small` on
two cores ([cpu-small-moe](cpu-small-moe.md)). A state of this shape has the size of the keys and values of 980 tokens,
as in Jamba Mini. A quarter of the cache is for saved states. vLLM's block rule is simulated, too: pages of 144 tokens,
states at the last page border of a prompt and where two requests were seen to part. Of three shares of the memory for
states, the best one counts for it. The hit rate is the share of prompt tokens that were read from the cache. A dash
stands for what was not measured.
"""
PARTS = """
The same with the first {requests} requests of each trace, without one part of the policy at a time. "Tokens only"
counts neither how often kinds are hit nor which states were hit before.
"""
REAL = """
A real engine of the shape `small` (random weights, bfloat16) answers the first {requests} requests of the chats with a
cache of {mib} MiB: {pages} pages and {saved_states} saved states. The clock of the replay is the sum of the times of
its {steps} steps, {seconds:.0f} s. Least squares over these steps give {step:.1f} ms for a step, {prompt_token:.2f} ms
for a prompt token and {decode:.1f} ms for a sequence that decodes. The simulation beside it uses these times.
"""
CHATS = """
`jamba bench --workload multi-turn` over HTTP, one server after the other, with the same GGUF file (F16), which `jamba
convert` has made of the demonstration checkpoint, and {slots} sequences at a time. 8 chats of 8 turns with 60 words and
60 reply tokens, of which 4 go on at the same time. llama.cpp {version}, with its default checkpoints and its default
cache in RAM.
"""


def to_markdown(name: str, report: Mapping[str, Any]) -> str:
    lines = [f"# {name}", ""]
    for part, write in (("table", table), ("parts", parts), ("real", real), ("chats", chats)):
        if part in report:
            lines += [*write(report[part]), "", conditions(report[part]), ""]
    return "\n".join(lines).rstrip() + "\n"


def conditions(found: Mapping[str, Any]) -> str:
    machine, versions = found["machine"], found["versions"]
    packages = ", ".join(f"{package} {number}" for package, number in versions.items())
    return f"{machine['cpu']}, {machine['cores']} cores; {packages}; commit {found['commit']}; {found['date']}."


def cell(row: Mapping[str, Any]) -> str:
    return f"{100 * row['hit_rate']:.1f} | {row['p50']:.2f} | {row['p95']:.2f}"


def grid(rows: list[Mapping[str, Any]]) -> list[str]:
    """Returns a table with a row for each trace and policy, and three columns for each size of the cache."""
    sizes = list(dict.fromkeys(row["mib"] for row in rows))
    header = " | ".join(f"{mib} MiB: hit % | TTFT p50 s | p95 s" for mib in sizes)
    lines = [f"| trace | policy | {header} |", "| --- | --- |" + " ---: |" * (3 * len(sizes))]
    by_place = {(row["trace"], row["policy"], row["mib"]): row for row in rows}
    for trace, policy in dict.fromkeys((row["trace"], row["policy"]) for row in rows):
        found = [by_place.get((trace, policy, mib)) for mib in sizes]
        cells = " | ".join("- | - | -" if row is None else cell(row) for row in found)
        lines.append(f"| {TRACES[trace]} | {policy} | {cells} |")
    return lines


def paragraphs(text: str, **values: Any) -> list[str]:
    """Returns `text` with `values` in it, in lines of at most 120 characters."""
    parts = text.format(**values).strip().split("\n\n")
    return [line for part in parts for line in ("", *textwrap.wrap(part, 120, break_on_hyphens=False))][1:]


def table(found: Mapping[str, Any]) -> list[str]:
    model = msgspec.structs.asdict(ChatTrees())
    text = paragraphs(TABLE, requests=found["requests"], **found["costs"], **model)
    return ["## Policies on two traces", "", *text, "", *grid(found["rows"])]


def parts(found: Mapping[str, Any]) -> list[str]:
    text = paragraphs(PARTS, requests=found["requests"])
    return ["## What each part of the policy does", "", *text, "", *grid(found["rows"])]


def real(found: Mapping[str, Any]) -> list[str]:
    return [
        "## Does the simulation agree with a real engine?",
        "",
        *paragraphs(REAL, **found, **found["costs"]),
        "",
        "| engine | hit % | TTFT p50 s | p95 s |",
        "| --- | ---: | ---: | ---: |",
        f"| real | {cell(found['real'])} |",
        f"| simulated | {cell(found['simulated'])} |",
    ]


def chats(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Beside llama.cpp",
        "",
        *paragraphs(CHATS, slots=found["slots"], version=found["llama.cpp version"]),
        "",
        "| server | clients | requests | prompt tokens | hit % | TTFT p50 s | p95 s | output tok/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for server in ("this server", "llama.cpp"):
        for level in found[server]["levels"]:
            ttft, share = level["ttft_ms"], level["cached_share"]
            lines.append(
                f"| {server} | {level['load']['concurrency']} | {level['completed']} | {level['prompt_tokens']} | "
                f"{100 * (share or 0):.1f} | {ttft['p50'] / 1000:.2f} | {ttft['p95'] / 1000:.2f} | "
                f"{level['output_throughput']:.0f} |"
            )
    return lines
