"""Writes the results of `benchmarks.cache.traces` as a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jamba_server.server.cli.bench.trees import ChatTrees

RESULTS = Path(__file__).parents[1] / "results"
TRACES = {"conv": "chats", "code": "code completions"}


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
    return f"{100 * row['hit_rate']:.1f} | {row['p50']:.2f} | {row['p95']:.1f}"


def grid(rows: list[Mapping[str, Any]]) -> list[str]:
    """Returns a table with a row for each trace and policy, and three columns for each size of the cache."""
    sizes = list(dict.fromkeys(row["mib"] for row in rows))
    header = " | ".join(f"{mib} MiB: hit % | TTFT p50 s | p95 s" for mib in sizes)
    lines = [f"| trace | policy | {header} |", "| --- | --- |" + " ---: |" * (3 * len(sizes))]
    by_place = {(row["trace"], row["policy"], row["mib"]): row for row in rows}
    for trace, policy in dict.fromkeys((row["trace"], row["policy"]) for row in rows):
        cells = " | ".join(cell(by_place[trace, policy, mib]) for mib in sizes)
        lines.append(f"| {TRACES[trace]} | {policy} | {cells} |")
    return lines


def table(found: Mapping[str, Any]) -> list[str]:
    model = ChatTrees()
    return [
        "## Policies on two traces",
        "",
        f"The first {found['requests']} requests of the Azure LLM inference traces of 2023 (Microsoft Azure, CC BY 4.0): arrivals",
        "(stretched, for two cores are slower than what they were recorded on) and lengths. The traces have no text. Which",
        "requests share a prefix is drawn by the model `ChatTrees` in `server/cli/bench/trees.py` with seed 0:",
        f"{100 * model.continued:.0f} % of the requests continue one of the {model.open_chats} chats used last if one is shorter than the prompt,",
        f"{100 * model.rewound:.0f} % of these replace an earlier turn, and chats begin with one of {model.systems} system prompts of {model.system_least} to {model.system_most} tokens.",
        "The hit rates are those of this model and not of the users who were recorded.",
        "",
        "The scheduler and the cache are the real ones. The model is simulated: a step takes the time that was measured for",
        "the shape `small` (see below). A state of this shape takes as much memory as the keys and values of 980 tokens, as in",
        "Jamba Mini. A quarter of the cache is for saved states. vLLM's block rule is simulated, too: pages of 144 tokens,",
        "states at the last page border of a prompt and where two requests were seen to part; of three shares of memory for",
        "states, the best one counts. The hit rate is the share of prompt tokens that were read from the cache.",
        "",
        *grid(found["rows"]),
    ]


def parts(found: Mapping[str, Any]) -> list[str]:
    return [
        "## What each part of the policy does",
        "",
        f"The same with {found['requests']} requests of each trace, leaving out one part of the policy at a time.",
        "",
        *grid(found["rows"]),
    ]


def real(found: Mapping[str, Any]) -> list[str]:
    costs = found["costs"]
    return [
        "## Does the simulation agree with a real engine?",
        "",
        f"The first {found['requests']} chat requests on a real engine with random weights of the shape `small` in bfloat16, with a",
        f"cache of {found['mib']} MiB ({found['pages']} pages, {found['saved_states']} saved states). The clock of the replay is the sum of the times of its {found['steps']}",
        f"steps ({found['seconds']:.0f} s). Least squares over these steps give {costs['step']:.1f} ms for a step, {costs['prompt_token']:.2f} ms for a prompt token and",
        f"{costs['decode']:.1f} ms for a sequence that decodes, which is what the simulation uses.",
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
        f"`jamba bench --workload multi-turn` with the same GGUF file (F16) of the shape `small`, {found['slots']} sequences at a time,",
        f"over HTTP, one server after the other. llama.cpp {found['llama.cpp version']}, with its defaults for checkpoints and its cache in RAM.",
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
