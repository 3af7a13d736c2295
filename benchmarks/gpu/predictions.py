"""Computes how many tokens per second this engine could reach on an H100 and on an H200. Nothing is measured.

    python -m benchmarks.gpu.predictions [--save FILE]

The program writes results/gpu-predictions.md. For every cell of the GPU check's parts `3b` and `mini` it lists the
tokens per second that the bytes and operations of `predict` allow. For every kernel that the part `tune` times, it
lists the shortest possible time. For matrix products it also lists how many programs each multiprocessor has, and the
share of the limit that `occupancy` predicts, beside what it predicted for the kernels of an earlier commit. `--save`
writes this prediction to a file instead; the earlier one is results/gpu-occupancy-before.json.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.compile import shapes_alone
from benchmarks.gpu.engine import SIZES
from benchmarks.gpu.occupancy import LAUNCH, predict
from benchmarks.gpu.predict import Ceilings, Work, decode_work, prefill_work
from benchmarks.gpu.sweep import config_of
from benchmarks.shapes import Format

RESULTS = Path(__file__).parents[1] / "results"
# Assumed limits of each GPU, which are not measured. The field `bandwidth` is the rate of a large copy in bytes per
# second. The field `matmul` is the rate of the matrix products of prefill in operations per second.
GPUS = {"H100": Ceilings(bandwidth=3.0e12, matmul=650e12), "H200": Ceilings(bandwidth=4.3e12, matmul=650e12)}
MODELS = (("3b", ("bf16",)), ("mini", ("int8", "bf16")))
BEFORE = RESULTS / "gpu-occupancy-before.json"
NOTES = Path(__file__).with_name("predictions_notes.md")
SHOWN = re.compile(r"(?:proj|gate_up|down|lm_head|experts)(?:,? int8)?, (?:1|64|256|8192) rows$")
# The steps whose products are added up: model, name of the step, rows, weight format.
STEPS = (
    ("3b", "decode", (1, 64, 256), ""),
    ("mini", "decode", (1, 64, 256), "int8"),
    ("3b", "prefill", (8192,), ""),
    ("mini", "prefill", (8192,), "int8"),
)
CONTEXT = 128  # number of tokens that each sequence has before the decode step
CHUNK = 8192  # largest number of prompt tokens that the engine computes in a step, if there is enough memory
HEAD = """# Predictions for GPUs: nothing here has been measured

Every number is computed, by `python -m benchmarks.gpu.predictions`, from the bytes that must be moved and the
operations that must be done. Assumed are, of an H100 and an H200, 3.0 and 4.3 TB/s (the data sheets say 3.35 and 4.8)
and of both 650 TFLOP/s in bfloat16 (a single large product reaches about 800). No launch, no imperfect overlap and no
kernel's own loss is in them: they are limits, and a measurement is a share of them. The targets are 80% of them at one
sequence, 70% at 256, and 50% for prompts. Mini's weights in bfloat16 (96 GiB) do not fit on an H100 of 80 GB.
"""


def cells() -> Iterator[tuple[str, str, str, int, Work]]:
    """Yields one prediction for each decode and prefill measurement that the parts `3b` and `mini` of the GPU check
    make.

    A prediction is (model, weight format, name, number of tokens, numbers of bytes and operations).
    """
    for shape, formats in MODELS:
        config, sizes = config_of(shape), SIZES[shape]
        for name in formats:
            policy = Format.parse(name).policy
            for count in sizes.sequences:
                work = decode_work(config, policy, sequences=count, context=CONTEXT)
                yield shape, name, f"decode, {count}", count, work
            for length in sizes.prompts:
                chunk = min(length, CHUNK)
                yield (
                    shape,
                    name,
                    f"prefill, {length:,}",
                    length,
                    prefill_work(config, policy, tokens=length, chunk=chunk),
                )


def rate(tokens: int, work: Work, ceilings: Ceilings) -> str:
    limit = "memory" if work.bound(ceilings) == "bandwidth" else "products"
    return f"{tokens / work.seconds(ceilings):,.0f} | {1e3 * work.seconds(ceilings):,.2f} | {limit}"


def engine_table() -> list[str]:
    each = [f"{gpu}, tok/s | ms | limit" for gpu in GPUS]
    lines = [
        f"| model | weights | what | {' | '.join(each)} |",
        f"| --- | --- | --- |{' ---: | ---: | --- |' * len(GPUS)}",
    ]
    for shape, name, what, tokens, work in cells():
        rates = [rate(tokens, work, ceilings) for ceilings in GPUS.values()]
        lines.append(f"| {shape} | {name} | {what} | {' | '.join(rates)} |")
    return lines


def kernel_table() -> list[str]:
    lines = [f"| model | tuned | in a step | {' | '.join(f'{gpu}, us' for gpu in GPUS)} |"]
    lines.append(f"| --- | --- | ---: |{' ---: |' * len(GPUS)}")
    for shape, _ in MODELS:
        for target in shapes_alone(shape):
            floors = [f"{1e6 * target.work().seconds(ceilings):.1f}" for ceilings in GPUS.values()]
            lines.append(f"| {shape} | {target.label} | {target.count} | {' | '.join(floors)} |")
    return lines


def occupancy() -> dict[str, dict[str, Any]]:
    """Returns {model and label: prediction} of all matrix products that the part `tune` times."""
    found: dict[str, dict[str, Any]] = {}
    for shape, _ in MODELS:
        for target in shapes_alone(shape):
            predictions = {gpu: predict(target, ceilings) for gpu, ceilings in GPUS.items()}
            if (one := predictions["H200"]) is None:
                continue
            found[f"{shape}, {target.label}"] = {
                "programs": one.programs,
                "count": target.count,
                "launches": one.launches,
                "us": {gpu: 1e6 * p.seconds for gpu, p in predictions.items() if p is not None},
                "floor_us": {gpu: 1e6 * target.work().seconds(ceilings) for gpu, ceilings in GPUS.items()},
            }
    return found


def share(row: Mapping[str, Any], gpu: str) -> str:
    return f"{100 * row['floor_us'][gpu] / row['us'][gpu]:.0f}%"


def occupancy_table(now: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = [f"| product | programs a multiprocessor | {' | '.join(f'share on {gpu}' for gpu in GPUS)} |"]
    lines.append(f"| --- | ---: |{' ---: |' * len(GPUS)}")
    for label, row in now.items():
        if SHOWN.search(label) and label in before:
            old = before[label]
            each = f"{old['programs'] / 132:.2f} → {row['programs'] / 132:.2f}"
            shares = [f"{share(old, gpu)} → {share(row, gpu)}" for gpu in GPUS]
            lines.append(f"| {label} | {each} | {' | '.join(shares)} |")
    return lines


def step_table(now: Mapping[str, Mapping[str, Any]], before: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Adds up the products of whole steps. Experts and dense layers have weights of the format, other products have
    bfloat16."""
    lines = [
        "| products of a step | limit on H200, ms | before, ms | now, ms | share |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for shape, kind, sizes, format in STEPS:
        for rows in sizes:
            quantized = rf"(?:gate_up|down) {format}|experts, {format}" if format else "gate_up|down"
            name = re.compile(rf"^{shape}, (?:in_proj|out_proj|qkv_proj|lm_head|x_proj|{quantized}), {rows} rows$")
            labels = [label for label in now if name.search(label)]

            def total(found: Mapping[str, Mapping[str, Any]], key: str, labels: list[str] = labels) -> float:
                return sum(found[label]["count"] * found[label][key]["H200"] for label in labels) / 1e3

            limit, old, new = total(now, "floor_us"), total(before, "us"), total(now, "us")
            what = f"{shape}, {format or 'bf16'}, {kind}, {rows:,} rows"
            lines.append(f"| {what} | {limit:.2f} | {old:.2f} | {new:.2f} | {limit / old:.0%} → {limit / new:.0%} |")
    return lines


def markdown(now: Mapping[str, Mapping[str, Any]]) -> str:
    before = json.loads(BEFORE.read_text())
    told = "How long each kernel takes at least, a call, that the part `tune` times:"
    both = (step_table(now, before["products"]), occupancy_table(now, before["products"]))
    notes = NOTES.read_text().format(commit=before["commit"], launch=1e6 * LAUNCH).split("<!-- products -->")
    middle = [notes[0], *both[0], notes[1], *both[1], notes[2]]
    return "\n".join([HEAD, *engine_table(), "", *middle, "", told, "", *kernel_table()]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, help="write the predictions for products to this file, and nothing else")
    parser.add_argument("--commit", default="", help="the commit that --save records")
    arguments = parser.parse_args()
    found = occupancy()
    if arguments.save:
        arguments.save.write_text(json.dumps({"commit": arguments.commit, "products": found}) + "\n")
        return
    (RESULTS / "gpu-predictions.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
