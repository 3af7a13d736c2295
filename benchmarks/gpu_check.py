"""Everything that a machine with a GPU can tell about this tree, in one command and without a network.

    python -m benchmarks.gpu_check --name h200 [--skip tests,kernels,engine]

* tests: the kernel tests on the GPU, all dtypes, and the engine there against transformers (where installed);
* kernels: every Triton kernel in bfloat16 against the reference in float32, and its time beside what the copy bandwidth
  and the matrix rate measured in the same run allow;
* engine: dummy weights in the shape of the 3B models through engine.llm.LLM, decode and prefill.

Writes benchmarks/results/NAME.json and NAME.md after every part. Random data, nothing is timed on zeros.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import torch

from benchmarks.gpu_cases import JAMBA_3B, JAMBA_MINI, Case, Maker, Shape, all_cases, check
from engine.llm import LLM
from engine.model_config import load_model_config
from engine.types import SamplingParams
from kernels.table import Implementation, implementations
from server.bench.conditions import describe_machine, describe_versions, utc_now

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PARTS = ("tests", "kernels", "engine")
TESTS = ["tests/kernels", "tests/engine/test_triton.py", "-k", "triton"]
TOLERANCE = 1e-2  # relative, of a bfloat16 result
CONFIG_3B = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "vocab_size": 65536,
    "hidden_size": 2560,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 1,
    "attn_layer_period": 14,
    "attn_layer_offset": 7,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "mamba_dt_rank": 160,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SEQUENCES, PROMPTS, STEPS = (1, 8, 64, 256), (2048, 32768), 32


def median_seconds(work: Callable[[], object], milliseconds: int = 100) -> float:
    """Of many runs, each from a cold L2 cache. Launches from Python are part of it: short ops cost less in a graph."""
    from triton.testing import do_bench

    timing: Any = do_bench(work, warmup=milliseconds // 4, rep=milliseconds, return_mode="median")
    return timing / 1e3


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy (read and written both count), operations a second of a bfloat16 product."""
    data = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(data)
    bandwidth = 2 * data.nbytes / median_seconds(lambda: target.copy_(data))
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return {"bandwidth": bandwidth, "matmul": 2 * 8192**3 / median_seconds(lambda: a @ b)}


def run_tests() -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", *TESTS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", result.stdout)}
    return {"exit": result.returncode, "counts": counts, "output": result.stdout[-4000:] + result.stderr[-1000:]}


def loaded(op: str) -> tuple[Any, Any]:
    """The preferred implementation on a GPU, and the reference."""
    entries: tuple[Implementation, ...] = implementations(op, "cuda")
    return entries[0].load(), entries[-1].load()


def measure_kernels(shape: Shape, limits: dict[str, float]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(cases: Iterator[Case]) -> None:
        for case in cases:
            rows.append(measure_case(case, limits) | {"model": shape.name})
            print(kernel_line(rows[-1]), flush=True)
        torch.cuda.empty_cache()

    all_cases(Maker(shape, torch.device("cuda")), add)
    return rows


def measure_case(case: Case, limits: dict[str, float]) -> dict[str, Any]:
    ours, reference = loaded(case.op)
    error = check(case, ours, reference)
    args = case.prepare(ours)
    moved = case.bytes_moved(ours(*args))
    seconds = median_seconds(lambda: ours(*args))
    floor = max(moved / limits["bandwidth"], case.operations / limits["matmul"])
    row = {"op": case.op, "label": case.label, "error": error, "us": seconds * 1e6, "floor_us": floor * 1e6}
    if case.op == "linear":
        args = case.prepare(reference)
        row["torch_us"] = median_seconds(lambda: reference(*args)) * 1e6
    return row


def kernel_line(row: dict[str, Any]) -> str:
    share = row["floor_us"] / row["us"]
    note = f", torch {row['torch_us']:.0f} us" if "torch_us" in row else ""
    name = f"{row['model']} | {row['op']} | {row['label']}"
    return f"| {name} | {row['error']:.1e} | {row['us']:.1f} | {share:.0%}{note} |"


def measure_engine(limits: dict[str, float]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(CONFIG_3B))
        config = load_model_config(Path(name))
        llm = LLM(name, load_format="dummy", device="cuda", max_model_len=max(PROMPTS) + 64, max_num_seqs=SEQUENCES[-1])
    random = Random(0)

    def seconds(count: int, length: int, tokens: int) -> float:
        prompts: list[str | list[int]] = [[random.randrange(3, 65536) for _ in range(length)] for _ in range(count)]
        started = time.perf_counter()
        llm.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
        return time.perf_counter() - started

    # a step reads the weights, and reads and writes every sequence's state
    weights = 2 * config.num_parameters()
    channel = 4 * config.mamba_d_state + 2 * (config.mamba_d_conv - 1)
    state = 2 * len(config.mamba_layers) * config.d_inner * channel
    decode: dict[str, Any] = {}
    for count in SEQUENCES:
        seconds(count, 4, 4)  # compiles what this number of rows needs
        rate = count * STEPS / (seconds(count, 4, STEPS + 1) - seconds(count, 4, 1))
        decode[str(count)] = {"tok_s": rate, "limit": count * limits["bandwidth"] / (weights + count * state)}
    prefill: dict[str, Any] = {}
    for length in PROMPTS:
        seconds(1, length, 1)
        rate = length / min(seconds(1, length, 1) for _ in range(2))
        active = config.num_parameters() - config.vocab_size * config.hidden_size  # the head sees the last token only
        prefill[str(length)] = {"tok_s": rate, "limit": limits["matmul"] / (2 * active)}
    info = llm.core.info
    return {"decode": decode, "prefill": prefill, "kernels": info.kernels, "load_seconds": info.load_seconds}


def markdown(name: str, report: dict[str, Any]) -> str:
    limits = report["ceilings"]
    lines = [f"# {name}", "", f"{report['conditions']['gpu']}, {report['conditions']['date']}."]
    lines += [
        f"Copy {limits['bandwidth'] / 1e12:.2f} TB/s, bfloat16 product {limits['matmul'] / 1e12:.0f} TFLOP/s.",
        "",
    ]
    if tests := report.get("tests"):
        lines += [f"Tests: {tests['counts'] or tests['output']}.", ""]
    if engine := report.get("engine"):
        lines += ["| 3b, dummy weights | tok/s | share of the limit |", "| --- | ---: | ---: |"]
        for kind, unit in (("decode", "sequences"), ("prefill", "tokens")):
            for size, value in engine[kind].items():
                share = value["tok_s"] / value["limit"]
                lines.append(f"| {kind}, {size} {unit} | {value['tok_s']:,.0f} | {share:.0%} |")
        lines.append("")
    if kernels := report.get("kernels"):
        lines += ["| model | op | case | error | us | share of the limit |", "| --- | --- | --- | ---: | ---: | ---: |"]
        lines += map(kernel_line, kernels)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the result files")
    parser.add_argument("--skip", default="", help=f"some of {','.join(PARTS)}")
    arguments = parser.parse_args()
    skipped = set(filter(None, arguments.skip.split(",")))
    if unknown := skipped - set(PARTS):
        parser.error(f"--skip {','.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    if not torch.cuda.is_available():
        raise SystemExit(f"benchmarks.gpu_check needs an NVIDIA GPU, and torch {torch.__version__} sees none.")
    conditions: dict[str, Any] = {
        "date": utc_now(),
        "gpu": torch.cuda.get_device_name(),
        "machine": msgspec.to_builtins(describe_machine()),
        "versions": describe_versions(["torch", "triton"]),
        "cuda": torch.version.cuda,
    }
    report: dict[str, Any] = {"conditions": conditions, "ceilings": ceilings()}
    parts: dict[str, Callable[[], Any]] = {
        "tests": run_tests,
        "kernels": lambda: [
            row for shape in (JAMBA_3B, JAMBA_MINI) for row in measure_kernels(shape, report["ceilings"])
        ],
        "engine": lambda: measure_engine(report["ceilings"]),
    }
    for part, run in parts.items():
        if part in skipped:
            continue
        report[part] = run()
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / f"{arguments.name}.md").write_text(markdown(arguments.name, report))
    print(markdown(arguments.name, report))
    wrong = [kernel_line(row) for row in report.get("kernels", []) if not row["error"] <= TOLERANCE]
    if wrong or report.get("tests", {}).get("exit"):
        raise SystemExit("\n".join(["Tests failed, or these kernels are wrong:", *wrong]))


if __name__ == "__main__":
    main()
