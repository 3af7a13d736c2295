"""Measures how much time constrained decoding takes on this CPU, within a step of the engine, and compares llguidance,
the library that the engine uses, with xgrammar.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.cpu.grammar --name grammar --tokenizer tokenizer.json \
        --functions bfcl.jsonl [--shape 3b] [--peer-python PYTHON]

The schemas are those of the functions in files of the Berkeley Function Calling Leaderboard, which have one JSON object
per line. The first table has the times of a decode step with 16 sequences of a model with random weights. In one kind
of run the sequences are unconstrained; in the other kind each reply must be an array of arguments of a function. Runs
of both kinds alternate. The second table has the times to compile each schema and to process the tokens of one valid
instance of it, in one thread, with llguidance and with xgrammar. The program xgrammar runs in the Python interpreter
PYTHON of another environment, in which it is installed. The results are written to benchmarks/results/NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from benchmarks.cpu.engine import RESULTS
from benchmarks.shapes import SHAPES
from jamba_server.engine.scheduler import SchedulerOutput
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.llm import LLM
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now

SEQUENCES, ROUNDS, STEPS, WARM_UP = 16, 4, 40, 12
VOCAB, EOS = 65536, (2, 519)
# Maps type names that the leaderboard's functions use to those of JSON Schema. None means that every value is allowed.
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": None}
APPLYING, TAKING = "waiting for the masks, and applying them", "scheduler: taking the tokens"
PEER = Path(__file__).parent / "grammar_peer.py"


@dataclass(frozen=True, slots=True)
class Example:
    """The JSON schema of a function's arguments, and valid arguments as compact JSON text."""

    schema: dict[str, Any]
    text: str


def json_schema(value: Any) -> Any:
    """Translates a schema of the leaderboard to JSON Schema. Descriptions and default values are left out."""
    if not isinstance(value, dict):
        return value
    kept: dict[str, Any] = {}
    for key in ("type", "enum", "required"):
        if key in value:
            kept[key] = value[key]
    if (kind := kept.pop("type", None)) is not None and TYPES.get(kind, kind) is not None:
        kept["type"] = TYPES.get(kind, kind)
    if "items" in value:
        kept["items"] = json_schema(value["items"])
    if "properties" in value:
        kept["properties"] = {name: json_schema(part) for name, part in value["properties"].items()}
        kept["additionalProperties"] = False
    return kept


def examples(files: Sequence[Path], tokenizer: LLTokenizer) -> Iterator[Example]:
    """Yields an example for each line of the files: the function's schema, and the arguments that the leaderboard
    expects. Lines whose arguments do not follow the schema are skipped."""
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            function, expected = entry["function"][0], entry["ground_truth"][0]
            schema = json_schema(function["parameters"])
            given: dict[str, Any] = next(iter(expected.values()))
            arguments = {name: given[name][0] for name in schema["properties"] if given.get(name, [""])[0] != ""}
            text = json.dumps(arguments, separators=(",", ":"), ensure_ascii=False)
            matcher = LLMatcher(tokenizer, grammar_of(schema), log_level=0)
            if matcher.consume_tokens(tokenizer.tokenize_str(text)) and matcher.is_accepting():
                yield Example(schema, text)


def grammar_of(schema: Any) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


# The step ------------------------------------------------------------------------------------------------------------


class Clock:
    """Sums, for each function that is timed, the time of its calls in one step of the engine, in seconds."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def watch(self, owner: object, name: str, label: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments, **named)
            self.spent[label] = self.spent.get(label, 0.0) + time.perf_counter() - start
            return result

        setattr(owner, name, run)


def decode_steps(llm: LLM, clock: Clock, prefix: str, params: Sequence[SamplingParams]) -> list[dict[str, float]]:
    """Runs one sequence for each item of `params` for STEPS steps. Returns the times of the steps in which every
    sequence computed exactly one token."""
    requests = [Request(id=f"{prefix}-{i}", prompt=[5 + i, 7, 11, 13], params=p) for i, p in enumerate(params)]
    llm.core.inbox.submit(requests)
    while len(llm.core.scheduler.running) < len(params):
        llm.core.step()
    steps: list[dict[str, float]] = []
    schedule, planned = llm.core.scheduler.schedule, list[SchedulerOutput]()

    def recorded(*, now: float) -> SchedulerOutput:
        planned.append(schedule(now=now))
        return planned[-1]

    llm.core.scheduler.schedule = recorded
    for step in range(WARM_UP + STEPS):
        clock.spent = {}
        start = time.perf_counter()
        llm.core.step()
        clock.spent["the step"] = time.perf_counter() - start
        if step >= WARM_UP and all(chunk.is_decode for chunk in planned[-1].chunks):
            steps.append(clock.spent)
    llm.core.scheduler.schedule = schedule
    assert len(llm.core.scheduler.running) == len(params), "a sequence has ended"
    llm.core.inbox.abort([request.id for request in requests])
    llm.core.step()
    return steps


def measure_steps(folder: Path, schemas: Sequence[Any]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Returns the times of the steps of unconstrained sequences, and those of constrained sequences."""
    llm = LLM(folder, load_format="dummy", max_model_len=1024, max_num_seqs=SEQUENCES)
    clock = Clock()
    runner = llm.core.model_runner
    clock.watch(runner.masks, "_fill", "masks, beside the forward pass")
    clock.watch(runner.sampler, "_adjust", APPLYING)
    clock.watch(runner.sampler, "launch", "the sampler, with the masks")
    clock.watch(llm.core.scheduler, "update", TAKING)
    free = [SamplingParams(max_tokens=200, seed=i, ignore_eos=True) for i in range(SEQUENCES)]
    arrays = [{"type": "array", "items": schemas[i % len(schemas)], "minItems": 60} for i in range(SEQUENCES)]
    bound = [SamplingParams(max_tokens=900, seed=i, grammar=grammar_of(arrays[i])) for i in range(SEQUENCES)]
    found: tuple[list[dict[str, float]], list[dict[str, float]]] = [], []
    for number in range(ROUNDS):
        for steps, params in zip(found, (free, bound), strict=True):
            steps += decode_steps(llm, clock, f"{number}-{len(found[0])}-{len(found[1])}", params)
    return found


def median_us(steps: Sequence[dict[str, float]], label: str) -> float:
    return statistics.median(step.get(label, 0.0) for step in steps) * 1e6


# Beside xgrammar -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Times:
    """Times in microseconds: the time to compile a schema, and the time per token to compute the mask of allowed tokens
    and to process the token."""

    compile: list[float]
    token: list[float]

    def cells(self) -> str:
        kinds = (self.compile, self.token)
        return " | ".join(f"{np.mean(k):,.0f} | {np.median(k):,.0f} | {np.percentile(k, 99):,.0f}" for k in kinds)


def follow_with_llguidance(tokenizer: LLTokenizer, work: Sequence[tuple[Any, list[int]]]) -> Times:
    mask, executor = np.zeros((1, VOCAB // 32), dtype=np.int32), LLExecutor(1)
    times = Times([], [])
    for schema, tokens in work:
        start = time.perf_counter()
        matcher = LLMatcher(tokenizer, grammar_of(schema), log_level=0)
        executor.unsafe_compute_mask_ptr([(matcher, 0)], mask.ctypes.data, mask.nbytes, 1)
        times.compile.append((time.perf_counter() - start) * 1e6)
        for token in tokens:
            start = time.perf_counter()
            executor.unsafe_compute_mask_ptr([(matcher, 0)], mask.ctypes.data, mask.nbytes, 1)
            matcher.consume_token(token)
            times.token.append((time.perf_counter() - start) * 1e6)
        assert matcher.is_accepting()
    return times


def follow_with_xgrammar(python: str, tokenizer: Path, work: Sequence[tuple[Any, list[int]]]) -> tuple[str, Times]:
    """Measures xgrammar in another Python interpreter. Returns the version of xgrammar and its times."""
    given = {"tokenizer": str(tokenizer), "vocab_size": VOCAB, "eos": EOS, "work": work}
    done = subprocess.run([python, str(PEER)], input=json.dumps(given), capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["version"], Times(answer["compile"], answer["token"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result file, without extension")
    parser.add_argument("--tokenizer", required=True, type=Path, help="tokenizer.json of a model with 65,536 tokens")
    parser.add_argument("--functions", required=True, type=Path, nargs="+", help="files of the leaderboard")
    parser.add_argument("--shape", default="3b", choices=SHAPES, help="model shape; its vocabulary is set to 65,536")
    parser.add_argument("--peer-python", help="interpreter of an environment that has xgrammar")
    arguments = parser.parse_args()
    tokenizer = LLTokenizer(arguments.tokenizer.read_text(encoding="utf-8"), n_vocab=VOCAB, eos_token=list(EOS))
    found = list(examples(arguments.functions, tokenizer))
    encoder = Tokenizer.from_file(str(arguments.tokenizer))
    work = [(example.schema, encoder.encode(example.text, add_special_tokens=False).ids) for example in found]
    with tempfile.TemporaryDirectory() as name:
        config = SHAPES[arguments.shape] | {"torch_dtype": "bfloat16", "vocab_size": VOCAB, "eos_token_id": list(EOS)}
        (Path(name) / "config.json").write_text(json.dumps(config))
        shutil.copyfile(arguments.tokenizer, Path(name) / "tokenizer.json")
        free, bound = measure_steps(Path(name), [example.schema for example in found])
    peers = {f"llguidance {describe_versions(['llguidance'])['llguidance']}": follow_with_llguidance(tokenizer, work)}
    if arguments.peer_python:
        version, times = follow_with_xgrammar(arguments.peer_python, arguments.tokenizer, work)
        peers[f"xgrammar {version}"] = times
    text = report(arguments, free, bound, peers, len(work))
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.md").write_text(text)


def report(
    arguments: argparse.Namespace,
    free: Sequence[dict[str, float]],
    bound: Sequence[dict[str, float]],
    peers: dict[str, Times],
    schemas: int,
) -> str:
    machine, versions = describe_machine(), describe_versions(("torch", "llguidance", "tokenizers"))
    lines = [
        f"# {arguments.name}",
        "",
        f"{SEQUENCES} sequences, shape {arguments.shape} with {VOCAB:,} tokens in bfloat16, dummy weights, "
        f"{torch.get_num_threads()} threads of {machine.cores}, {machine.cpu}, {utc_now()}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        f"Medians of {len(free)} free and {len(bound)} constrained steps in which each sequence computes one token, in "
        "microseconds. Constrained replies are arrays of arguments of the functions.",
        "",
        "| us a step | free | constrained | difference |",
        "| --- | ---: | ---: | ---: |",
    ]
    for label in sorted({label for step in bound for label in step}):
        before, after = median_us(free, label), median_us(bound, label)
        lines.append(f"| {label} | {before:,.0f} | {after:,.0f} | {after - before:,.0f} |")
    added = sum(median_us(bound, label) - median_us(free, label) for label in (APPLYING, TAKING))
    lines += [
        "",
        f"The engine's own thread spends {added:,.0f} us more on a constrained step: the rows of waiting and applying, "
        "and of taking the tokens. Whole steps say less: the two kinds of sequences have different tokens and so "
        "different experts, and other programs may use the machine. "
        f"The load average was {os.getloadavg()[0]:.1f} at the end.",
        "",
        f"{schemas} schemas, one instance of each ({len(next(iter(peers.values())).token):,} tokens), one thread, in "
        "microseconds. The time to compile includes the first mask. Nothing is cached between schemas.",
        "",
        "| | compile: mean | median | 99 % | token: mean | median | 99 % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(f"| {name} | {times.cells()} |" for name, times in peers.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
