"""Writes the report of the GPU check: tables with the predicted rate beside each measured rate, and a list of
failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.sweep import wrong

Parts = dict[str, dict[str, Any]]
"""The content of each part's result file, as `record.Record` writes it, by the name of the part."""

FIRST_REPLY_SECONDS = 10.0
COLUMNS = "| model | weights, engine | what | predicted tok/s | measured | share | target | transformers |"
ENGINE_PARTS = ("3b", "mini", "dependent")
SHOWN_TILES = 20
CEILINGS = (
    "Measured before and after each run: bytes a second of a copy (read and written), and the rate of a bfloat16",
    "product. `predicted` is what they allow: weights, states, keys and values that a step must read or write, over",
    "the one, or the operations of its products over the other, whichever takes longer. `share`: measured / predicted.",
    "",
    "| run | copy, TB/s | matmul, TFLOP/s |",
    "| --- | ---: | ---: |",
)


def read_parts(name: str, folders: list[Path]) -> Parts:
    """Reads the result file of each part of the GPU check. If several folders have a result file of the same part, the
    file in the folder that comes first in `folders` is read."""
    found: Parts = {}
    for folder in folders:
        for path in sorted((folder / f"{name}-parts").glob("*.json")):
            found.setdefault(path.stem, json.loads(path.read_text()))
    return found


def target(row: dict[str, Any]) -> float | None:
    """Returns the fraction of the predicted rate that the engine is expected to reach in a measurement, or None if the
    measurement has no target."""
    if row["kind"] == "decode":
        return {1: 0.8, 256: 0.7}.get(row["size"])
    return 0.5 if row["kind"] == "prefill" else None


def failures(parts: Parts) -> list[str]:
    """Returns one line for each failure: an error, a failed test or a wrong result. A low rate is not a failure."""
    found: list[str] = []
    for part, content in parts.items():
        for key, row in content["rows"].items():
            if "error" in row:
                found.append(f"{part}: {key}: {row['error'].strip().splitlines()[-1]}")
            elif row.get("passed") is False:
                what = row.get("failed") or {name: row[name] for name in row if name not in ("run", "output")}
                found.append(f"{part}: {key}: did not pass: {what}")
            elif part == "sweep" and wrong(row):
                found.append(f"{part}: {key}: error {row['error_norm']:.1e}, more than {row['tolerance']:g}")
            elif "level" in row and row["completed"] < row["planned"]:
                found.append(
                    f"{part}: {key}: {row['completed']} of {row['planned']} requests: {row['level']['errors']}"
                )
        found += [f"{part}: {run['ended']}" for run in content["runs"] if "ended" in run]
    return found


def markdown(name: str, parts: Parts, *, sweep: bool) -> str:
    """Returns the report as Markdown. If `sweep` is true, the report includes profiles of decode steps and times of
    single kernels."""
    lines = [f"# {name}", "", *conditions(parts), "", *ceilings(parts)]
    sections = [checks(parts), engine(parts), replies(parts), http(parts)]
    if sweep:
        sections.append(profiles(parts))
        sections.append(counters(parts))
        sections.append(kernels(parts))
    sections.append(tiles(parts, None if sweep else SHOWN_TILES))
    for section in sections:
        if section:
            lines += ["", *section]
    left_out = [
        f"- {part}: {key}: {row['left_out']}"
        for part, content in parts.items()
        for key, row in content["rows"].items()
        if "left_out" in row
    ]
    last_runs = [(part, content["runs"][-1]) for part, content in parts.items() if content["runs"]]
    left_out += [f"- {part}: {run['stopped']}" for part, run in last_runs if "stopped" in run]
    if left_out:
        lines += ["", "Left out:", "", *left_out]
    failed = [f"- {line}" for line in failures(parts)]
    lines += ["", "Failed:" if failed else "Nothing failed.", *(["", *failed] if failed else [])]
    return "\n".join(lines) + "\n"


def conditions(parts: Parts) -> list[str]:
    """Returns the conditions of the runs as text: one line for each combination of machine, date, commit and package
    versions."""
    lines: dict[str, None] = {}
    for content in parts.values():
        for run in content["runs"]:
            versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
            machine = run["gpu"] or f"{run['machine']['cpu']}, {run['machine']['cores']} cores"
            lines[f"{machine}; {run['date'][:10]}, commit {run['commit']}; {versions}."] = None
    return list(lines)


def ceilings(parts: Parts) -> list[str]:
    lines: list[str] = []
    for part, content in parts.items():
        for run in content["runs"]:
            if "before" not in run:
                continue
            both = [run["before"], run.get("after")]
            copies = ", ".join("-" if c is None else f"{c['bandwidth'] / 1e12:.3g}" for c in both)
            rates = ", ".join("-" if c is None else f"{c['matmul'] / 1e12:.3g}" for c in both)
            job = run["job"]
            name = " ".join(filter(None, [part, job["shape"] if job["shape"] != part else "", job["format"]]))
            lines.append(f"| {name} | {copies} | {rates} |")
    return [*CEILINGS, *lines] if lines else []


def checks(parts: Parts) -> list[str]:
    lines: list[str] = []
    for part in ("probe", "parity", "kernels", "sanitizer"):
        for key, row in parts.get(part, {"rows": {}})["rows"].items():
            if "passed" not in row:
                continue
            if part == "probe":
                said = ", ".join(f"{name} {row[name]}" for name in ("products", "different") if name in row)
                lines.append(f"| probe, {key} | {said} | {_passed(row)} |")
            elif part in ("kernels", "sanitizer"):
                counts = ", ".join(f"{number} {word}" for word, number in row["counts"].items())
                lines.append(f"| {part}, {key} | {counts or 'none'} | {_passed(row)} |")
            elif "worst" in row:
                differ = f"{row['different']} of {row['replies']} replies differ"
                said = f"log-probabilities within {row['worst']:.1e}, {differ}"
                lines.append(f"| transformers, {key} | {said} | {_passed(row)} |")
            else:
                said = f"rms error {row['error_rms']:.2g}; transformers' own {row['transformers_rms']:.2g}"
                lines.append(f"| transformers, {key} | {said} | {_passed(row)} |")
    return ["| check | result | |", "| --- | --- | --- |", *lines] if lines else []


def _passed(row: dict[str, Any]) -> str:
    return "passed" if row["passed"] else "FAILED"


def split(key: str, row: dict[str, Any], run: dict[str, Any]) -> tuple[str, str, str]:
    """Returns three texts about a measurement: the model shape, the weight format with the engine options, and the kind
    of the measurement with its size."""
    job = run["job"]
    options = " ".join(f"{name}={value}" for name, value in job.get("options", {}).items())
    return job["shape"], " ".join(filter(None, [job["format"], options])), f"{row['kind']}, {row['size']:,}"


def engine(parts: Parts) -> list[str]:
    peers: dict[tuple[str, str], str] = {}
    for key, row, run in _measured(parts, "transformers"):
        shape, _, what = split(key, row, run)
        peers[shape, what] = _rate(row["tok_s"])
    lines: list[str] = []
    for part in ENGINE_PARTS:
        for key, row, run in _measured(parts, part):
            shape, stored, what = split(key, row, run)
            what += ", dependent launches" if part == "dependent" else ""
            cells = [shape, stored, what, _rate(row["predicted"]), _rate(row["tok_s"]), _share(row)]
            wanted = target(row)
            cells += ["" if wanted is None else f"{wanted:.0%}", peers.get((shape, what), "")]
            lines.append(f"| {' | '.join(cells)} |")
            if "decode_tok_s" in row:
                both = [_rate(row[name]) for name in ("decode_predicted", "decode_tok_s")]
                share = row["decode_tok_s"] / row["decode_predicted"]
                cells = [shape, stored, "its decode", *both, f"{share:.0%}", "", ""]
                lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return []
    runs = parts.get("transformers", {}).get("runs", [])
    found = runs[-1].get("kernels", {}) if runs else {}
    note = ", ".join(f"{name} {'installed' if there else 'not installed'}" for name, there in found.items())
    notes = ["", f"transformers: `generate`, {note}."] if note else []
    return [COLUMNS, "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |", *lines, *notes]


def replies(parts: Parts) -> list[str]:
    """Returns the table of the seconds from the end of loading the weights to the first token of the first reply."""
    lines: list[str] = []
    for part in ENGINE_PARTS:
        for key, row in parts.get(part, {"rows": {}})["rows"].items():
            if "of_them_reply" in row:
                compiled, ready = row["of_them_until_compiled"], row["of_them_until_ready"]
                split = (
                    f"{compiled:.2f} until compiled, {ready:.2f} until ready, {row['of_them_reply']:.2f} for the reply"
                )
                lines.append(f"| {key} | {row['seconds']:.2f} ({split}) |")
    for key, row in parts.get("http", {"rows": {}})["rows"].items():
        if "until_ready" in row:
            lines.append(f"| HTTP, {key}, weights not counted | {row['seconds']:.2f} |")
    head = [f"| seconds from the weights being loaded to the first token (target {FIRST_REPLY_SECONDS:.0f}) | |"]
    return [*head, "| --- | --- |", *lines] if lines else []


def http(parts: Parts) -> list[str]:
    lines: list[str] = []
    for key, row, run in _measured(parts, "http"):
        shape, stored, _ = split(key, row, run)
        cells = [shape, stored, str(row["size"]), _rate(row["predicted"]), _rate(row["tok_s"]), _share(row)]
        cells += [f"{row[name]:,.1f}" if name in row else "-" for name in ("ttft_p50_ms", "tpot_p50_ms")]
        lines.append(f"| {' | '.join(cells)} |")
    head = "| HTTP | weights, engine | clients | predicted tok/s | measured | share | TTFT p50, ms | TPOT p50, ms |"
    return [head, "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |", *lines] if lines else []


def profiles(parts: Parts) -> list[str]:
    """Returns the table of the kernels that take the largest shares of the GPU's time in decode steps."""
    lines: list[str] = []
    for part in ENGINE_PARTS:
        for key, row in parts.get(part, {"rows": {}})["rows"].items():
            for kernel in row.get("longest", ()):
                cells = [key, kernel["name"].replace("|", " "), f"{kernel['share']:.0%}", f"{kernel['us']:.1f}"]
                lines.append(f"| {' | '.join(cells)} | {kernel['count']} |")
    return ["| profile | kernel | share | us | runs |", "| --- | --- | ---: | ---: | ---: |", *lines] if lines else []


def counters(parts: Parts) -> list[str]:
    """Returns the table of hardware counters, one line for each kernel, as Nsight Compute names them."""
    lines: list[str] = []
    for key, row in parts.get("counters", {"rows": {}})["rows"].items():
        for kernel in row.get("kernels", ()):
            said = "; ".join(f"{name} {value}" for name, value in kernel.items() if name != "kernel")
            lines.append(f"| {key} | {kernel['kernel'][:60].replace('|', ' ')} | {said} |")
    return ["| counted | kernel | counters |", "| --- | --- | --- |", *lines] if lines else []


def kernels(parts: Parts) -> list[str]:
    lines: list[str] = []
    for key, row in parts.get("sweep", {"rows": {}})["rows"].items():
        if "error" in row:
            continue
        best = min(row["us"], row.get("graph_us", row["us"]))
        graph = f"{row['graph_us']:.1f}" if "graph_us" in row else "-"
        cells = [key.split(", ")[0], row["op"], row["implementation"], row["label"], f"{row['error_norm']:.1e}"]
        cells += [f"{row['us']:.1f}", graph]
        cells += [f"{row['floor_us']:.1f}", f"{row['floor_us'] / best:.0%}"]
        cells += [f"{row['torch_us']:.1f}" if "torch_us" in row else ""]
        lines.append(f"| {' | '.join(cells)} |")
    head = "| model | op | implementation | case | error | us | in a graph | floor | share | torch |"
    return [head, "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |", *lines] if lines else []


def tiles(parts: Parts, most: int | None) -> list[str]:
    """Returns a table of the microseconds that the fastest tile sizes would save in one step of the engine. The largest
    savings come first.

    After the table comes a list of the variants (tile sizes) whose results are wrong.
    """
    rows = [(key, row) for key, row in parts.get("tune", {"rows": {}})["rows"].items() if "variants" in row]
    rows.sort(key=lambda item: item[1]["count"] * (item[1]["best_us"] - item[1]["default_us"]))
    lines: list[str] = []
    for key, row in rows[:most]:
        gain = row["count"] * (row["default_us"] - row["best_us"])
        numbers = [f"{row[name]:.1f}" for name in ("floor_us", "default_us", "best_us", "best_exact_us")]
        exact = "the same" if row["best_exact"] == row["best"] else row["best_exact"]
        lines.append(f"| {key} | {row['count']} | {' | '.join(numbers)} | {row['best']} | {exact} | {gain:.0f} |")
    head = (
        "| tuned | in a step | floor, us | as it is | best | best of the same bits | best tile | tile of the same bits "
    )
    table = [head + "| gain in a step, us |", "| --- |" + " ---: |" * 5 + " --- | --- | ---: |", *lines]
    differ = [
        f"- {key}: {label}: differs by {error:.1e}" for key, row in rows for label, error in row["differ"].items()
    ]
    if differ:
        table += ["", f"Variants with results other than they must be ({len(differ)}):", "", *differ[:most]]
    return table if lines else []


def _measured(parts: Parts, part: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yields (key, result, conditions of the run) for each result of the part `part` of the GPU check that has a rate
    in tokens per second."""
    content = parts.get(part)
    for key, row in content["rows"].items() if content else ():
        if "tok_s" in row:
            yield key, row, content["runs"][row["run"]] if content else {}


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _share(row: dict[str, Any]) -> str:
    return f"{row['tok_s'] / row['predicted']:.0%}"
