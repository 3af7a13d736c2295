"""Measures how much saving Mamba states in int8 changes log-probabilities, and how much memory int8 saves.

    python -m benchmarks.cpu.saved_state_error --name saved-state-error [--texts 32]

The demonstration model writes the texts. Each text is computed up to a cut. Then its state is saved in int8 and
restored by the engine, or rounded to bfloat16 for comparison, and the rest of the text is forced. The log-probabilities
of the tokens after the cut are compared with those of a run without a restore. The program writes
benchmarks/results/NAME.md and NAME.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from array import array
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Many
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.cpu.engine import RESULTS
from benchmarks.http.serving import describe_commit
from benchmarks.shapes import median_seconds, write_config
from jamba_server.engine.cache.manager import CacheCopies
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.model_runner import ModelRunner
from jamba_server.engine.scheduler import Chunk, SchedulerOutput
from jamba_server.engine.sequence import Sequence
from jamba_server.engine.types import Request, SamplingParams, TokenLogprob
from jamba_server.kernels.ops import CompressedStates
from jamba_server.kernels.table import select
from jamba_server.llm import LLM
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now
from jamba_server.server.demo import demo_folder

# LENGTH is the number of tokens in each text. In some experiments, the Mamba state is restored once while the model
# reads a text, at one of the token positions CUTS. In another experiment, the state is restored every TURN tokens.
LENGTH, CUTS, TURN = (
    400,
    (64, 136, 208),
    32,
)
# Tokens are grouped by distance: the number of tokens since the first restore of the state. Each pair is the smallest
# and the largest distance of a group.
DISTANCES = ((1, 1), (2, 4), (5, 16), (17, 64), (65, LENGTH))
BLOCK_SIZE = 16
SCORED = SamplingParams(max_tokens=1, prompt_logprobs=1)
SLOT, SAVED = 1, 1

Restore = Callable[[ModelRunner], CacheCopies]


def as_it_is(runner: ModelRunner) -> CacheCopies:
    return CacheCopies()


def through_int8(runner: ModelRunner) -> CacheCopies:
    return CacheCopies(saves=[(SLOT, SAVED)], states=[(SAVED, SLOT)])


def through_bfloat16(runner: ModelRunner) -> CacheCopies:
    state = runner.storage.ssm[SLOT]
    state.copy_(state.bfloat16())
    return CacheCopies()


def load(dtype: str) -> LLM:
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": LENGTH, "max_model_len": 2 * LENGTH}
    return LLM(demo_folder(), dtype=dtype, state_cache_dtype="int8", device="cpu", block_size=BLOCK_SIZE, **settings)


def some_texts(llm: LLM, count: int) -> list[list[int]]:
    """Returns `count` texts of LENGTH tokens, as token ids. The model generates each text. If the model ends a text
    early, the model generates another text, which is appended."""
    first, ends = 1, llm.core.info.eos_token_ids
    texts: list[list[int]] = []
    for number in range(count):
        tokens = [first]
        while (left := LENGTH - len(tokens)) > 0:
            seed = number * LENGTH + left
            params = SamplingParams(max_tokens=left, temperature=1.0, top_p=0.95, seed=seed)
            tokens += llm.generate([tokens], params)[0].token_ids
            if tokens[-1] in ends:
                tokens.append(first)
        texts.append(tokens[:LENGTH])
    return texts


def forced(runner: ModelRunner, tokens: list[int], cuts: Many[int], restore: Restore) -> list[TokenLogprob]:
    """Returns the log-probabilities of the tokens of a text that follow position cuts[0].

    The text is the prompt of a request. `restore` is called at each of the positions `cuts`.
    """
    seq = Sequence.of(Request(id="", prompt=tokens, params=SCORED), arrival=0, now=0.0)
    seq.block_ids, seq.state_id = array("i", range(1, 1 - (-len(tokens) // BLOCK_SIZE))), SLOT
    found: list[TokenLogprob] = []
    for start, end in zip((0, *cuts), (*cuts, len(tokens)), strict=True):
        copies = restore(runner) if start else CacheCopies()
        [result] = runner.launch(SchedulerOutput((Chunk(seq, start, end, num_sampled=0),), copies, ())).results()
        found += [entry for entry in result.prompt_logprobs if entry is not None] if start else []
    return found


Deltas = dict[tuple[int, int], list[tuple[float, bool]]]


def compare(pairs: Iterable[tuple[int, TokenLogprob, TokenLogprob]]) -> Deltas:
    """Compares the log-probabilities of each token in two runs. Groups the differences by the token's distance from the
    position at which a saved state was restored.

    The distance is the number of tokens since the first restore of a state. Each entry of `pairs` is (distance, first
    log-probability, second log-probability).
    Each result is (absolute difference of the log-probabilities, whether both have the same most likely token).
    """
    deltas: Deltas = {span: [] for span in DISTANCES}
    for distance, one, other in pairs:
        [span] = [(first, last) for first, last in DISTANCES if first <= distance <= last]
        deltas[span].append((abs(one.logprob - other.logprob), one.top[0][0] == other.top[0][0]))
    return deltas


def measure(runner: ModelRunner, texts: list[list[int]]) -> dict[str, Deltas]:
    turns = range(CUTS[0], LENGTH, TURN)
    kinds: dict[str, tuple[Restore, list[Many[int]]]] = {
        "int8": (through_int8, [(cut,) for cut in CUTS]),
        "bfloat16, for comparison": (through_bfloat16, [(cut,) for cut in CUTS]),
        f"int8, again every {TURN} tokens": (through_int8, [turns]),
    }
    result: dict[str, Deltas] = {}
    for name, (restore, places) in kinds.items():
        pairs: list[tuple[int, TokenLogprob, TokenLogprob]] = []
        for text in texts:
            for cuts in places:
                without, restored = (forced(runner, text, cuts, kind) for kind in (as_it_is, restore))
                pairs += zip(range(1, len(without) + 1), without, restored, strict=True)
        result[name] = compare(pairs)
    return result


def against(one: ModelRunner, other: ModelRunner, texts: list[list[int]]) -> Deltas:
    """Compares the log-probabilities that two engines compute for the same texts, without restoring a state."""
    pairs: list[tuple[int, TokenLogprob, TokenLogprob]] = []
    for text in texts:
        for cut in CUTS:
            says = [forced(runner, text, (cut,), as_it_is) for runner in (one, other)]
            pairs += zip(range(1, len(says[0]) + 1), *says, strict=True)
    return compare(pairs)


def summary(deltas: Deltas) -> list[dict[str, float]]:
    """Returns statistics of the differences for each range of distances in DISTANCES.

    The statistics are the mean and the largest difference of log-probabilities, and the fraction of tokens for which
    the most likely token is the same.
    """
    return [
        {
            "mean": statistics.fmean(delta for delta, _ in found),
            "max": max(delta for delta, _ in found),
            "agreement": statistics.fmean(same for _, same in found),
            "tokens": len(found),
        }
        for found in deltas.values()
    ]


def error_table(results: Mapping[str, list[dict[str, float]]]) -> str:
    spans = [str(first) if first == last else f"{first}-{last}" for first, last in DISTANCES]
    lines = [f"| tokens since the restore | {' | '.join(spans)} |", f"| --- |{' ---: |' * len(spans)}"]
    for name, rows in results.items():
        cells = [f"{row['mean']:.4f}, {row['max']:.3f}, {row['agreement']:.2%}" for row in rows]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cost(shape: str) -> dict[str, float]:
    """Returns a saved state's size in bytes in each format, and the microseconds to copy, compress and restore it."""
    with TemporaryDirectory() as name:
        write_config(shape, Path(name))
        config = load_model_config(Path(name))
    layouts = [
        cache_layout(config, block_size=BLOCK_SIZE, dtype="bfloat16", state_cache_dtype=kind)
        for kind in ("auto", "int8")
    ]
    plain, narrow = (layout.num_bytes("saved") for layout in layouts)
    kernels, unit = select("cpu", {}), (len(config.mamba_layers), config.d_inner)
    # Eight states are larger than the CPU's caches, so the kernels read the states from memory.
    states = torch.randn(8, *unit, config.mamba_d_state)
    compressed = CompressedStates(torch.zeros(states.shape, dtype=torch.int8), torch.zeros(8, *unit))
    slots = torch.arange(8)
    times = (
        median_seconds(lambda: kernels.copy_slots((states,), slots[:4], slots[4:]), 0.5) / 4,
        median_seconds(lambda: kernels.compress_states(states, compressed, slots, slots), 0.5) / 8,
        median_seconds(lambda: kernels.restore_states(compressed, states, slots, slots), 0.5) / 8,
    )
    named = dict(zip(("copy_us", "compress_us", "restore_us"), (time * 1e6 for time in times), strict=True))
    return {"auto": plain, "int8": narrow, **named}


def cost_table(costs: Mapping[str, Mapping[str, float]]) -> str:
    lines = [
        "| a saved state | auto (bytes) | int8 (bytes) | | SSM state: copy (ms) | compress (ms) | restore (ms) |",
        "| --- |" + " ---: |" * 6,
    ]
    for shape, row in costs.items():
        times = " | ".join(f"{row[name] / 1e3:.2f}" for name in ("copy_us", "compress_us", "restore_us"))
        lines.append(f"| {shape} | {row['auto']:,} | {row['int8']:,} | {row['int8'] / row['auto']:.0%} | {times} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--texts", type=int, default=32, help="number of texts")
    arguments = parser.parse_args()
    engines = {dtype: load(dtype).core.model_runner for dtype in ("float32", "bfloat16")}
    texts = some_texts(load("bfloat16"), arguments.texts)
    errors = {
        dtype: {name: summary(deltas) for name, deltas in measure(runner, texts).items()}
        for dtype, runner in engines.items()
    }
    dtypes = summary(against(engines["float32"], engines["bfloat16"], texts))
    errors["bfloat16"]["no restore: the model in float32"] = dtypes
    costs = {shape: cost(shape) for shape in ("3b", "mini")}
    machine, versions = describe_machine(), describe_versions(["torch"])
    conditions = {
        "date": utc_now(),
        "commit": describe_commit(),
        "cpu": machine.cpu,
        "threads": torch.get_num_threads(),
    }
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    text = (
        f"# {arguments.name}\n\n{len(texts)} texts of {LENGTH} tokens by the demonstration checkpoint (temperature 1, "
        f"top_p 0.95), each restored after {', '.join(map(str, CUTS))} tokens. Change of the log-probability of the "
        "next token, mean and largest; how often the most likely token stays the same. "
        f"{conditions['threads']} threads, {conditions['cpu']}, {names}, {conditions['date']}, "
        f"commit {conditions['commit']}.\n"
    )
    for dtype, results in errors.items():
        text += f"\nModel in {dtype}:\n\n{error_table(results)}\n"
    text += f"\n{cost_table(costs)}\n\nIn bfloat16. Times of one state of many in memory.\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{arguments.name}.md").write_text(text)
    report = {"conditions": conditions | {"versions": versions, "cuts": CUTS}, "errors": errors, "costs": costs}
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
