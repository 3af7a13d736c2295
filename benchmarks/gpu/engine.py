"""Runs the parts `3b`, `mini` and `dependent` of the GPU check.

The parts `3b` and `mini` measure tokens per second of decode and tokens per second of prefill, and compare them with
the rates that the GPU's memory bandwidth and matmul rate allow. The part `dependent` measures decode alone, where a
kernel may be launched before the one before it has ended.

The weights are dummies. The limits follow from the bandwidth and the matmul rate that `predict` measures.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import msgspec
import torch

from benchmarks.gpu.predict import DTYPE_BYTES, Ceilings, Work, decode_work, measure_ceilings, prefill_work
from benchmarks.gpu.record import Job, Record
from benchmarks.shapes import Format, write_config
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.start import build
from jamba_server.engine.start.machine import format_bytes
from jamba_server.engine.types import SamplingParams
from jamba_server.engine.weight_sizes import weight_bytes
from jamba_server.llm import LLM

FIRST_PROMPT = 128  # number of tokens in the first request's prompt
DECODE_PROMPT = 4
# intended number of seconds of a timed decode run; the number of decode steps is chosen accordingly
DECODE_SECONDS = 1.0
STEPS = (8, 128)  # smallest and largest number of decode steps in one timed run
LONG_STEPS = 32
PROFILED_STEPS, PROFILED_KERNELS, PROFILED_PROMPT = 8, 15, 8192
DEPENDENT = "dependent"  # the part in which a kernel may be launched before the one before it has ended
SLOW = 20.0  # a prompt whose prefill takes at least this many seconds is timed only once


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The numbers of concurrent sequences for which decode is timed, and the prompt lengths for which prefill is timed.

    `sequences` are numbers of sequences that decode at the same time, `prompts` are lengths of prompts in tokens.
    `long` is the length of one long request in tokens, with its reply.
    """

    sequences: tuple[int, ...]
    prompts: tuple[int, ...]
    long: int | None = None


SIZES = {
    "3b": Sizes(sequences=(1, 8, 64, 256), prompts=(2048, 32768, 131072)),
    "mini": Sizes(sequences=(1, 16, 64, 256), prompts=(2048, 32768), long=262144),
    "tiny": Sizes(sequences=(1, 2), prompts=(32,), long=160),
}
OTHERS = Sizes(sequences=(1, 8, 64), prompts=(2048,))


@contextmanager
def times_of_loading() -> Generator[list[float]]:
    """Yields a list. While the code inside this context builds an engine, clock times in seconds are appended to the
    list.

    The first clock time is when the weights are loaded. The second clock time, only on a GPU, is when the kernels are
    compiled and the engine begins to measure steps.
    """
    times: list[float] = []
    load, measure_steps = build.load, build.measure_steps

    def timed_load(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    def timed_measure(*args: Any, **kwargs: Any) -> Any:
        times.append(time.perf_counter())
        return measure_steps(*args, **kwargs)

    with (
        mock.patch.object(build, "load", timed_load),
        mock.patch.object(build, "measure_steps", timed_measure),
    ):
        yield times


class Bench:
    """Builds an engine in this process and times its first reply, its prefill and its decode."""

    def __init__(self, job: Job, config: JambaConfig, folder: str, sizes: Sizes, ceilings: Ceilings) -> None:
        self.config, self.ceilings = config, ceilings
        self.stored = Format.parse(job.format)
        longest = max(*(tokens + 64 for tokens in sizes.prompts), sizes.long or 0)
        settings: dict[str, Any] = {
            "device": job.device,
            "load_format": "dummy",
            "max_num_seqs": max(sizes.sequences),
            "max_model_len": min(longest, config.max_position_embeddings),
        }
        start = time.perf_counter()
        with times_of_loading() as times:
            self.llm = LLM(folder, **settings | self.stored.settings | job.options)
        self.loaded_at, self.compiled_at, self.ready_at = times[0], times[-1], time.perf_counter()
        self.load_seconds = self.loaded_at - start
        self.random = Random(0)

    def prompt(self, length: int) -> list[int]:
        return self.random.choices(range(3, self.config.vocab_size), k=length)

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        """Returns the number of seconds that the engine takes to reply to all prompts in `prompts`. Each reply has
        exactly `tokens` tokens."""
        start = time.perf_counter()
        self.llm.generate([*prompts], SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True))
        return time.perf_counter() - start

    def first_reply(self) -> dict[str, Any]:
        """Measures the seconds from the end of loading the weights to the first token of the first request.

        This must be the first measurement with an engine, since later requests find all kernels compiled.
        """
        compiled = sum(1 for _ in Path(os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")).expanduser().glob("*"))
        reply = self.seconds([self.prompt(FIRST_PROMPT)], 1)
        return {
            "seconds": self.ready_at - self.loaded_at + reply,
            "of_them_until_ready": self.ready_at - self.loaded_at,
            "of_them_until_compiled": self.compiled_at - self.loaded_at,
            "of_them_reply": reply,
            "kernels_compiled_before": compiled,
        }

    def decode(self, count: int) -> dict[str, Any]:
        """Measures how many tokens per second the engine generates for `count` concurrent sequences.

        To leave out the time of the prompts, the time of a run with one output token is subtracted.
        """

        def fresh() -> list[list[int]]:
            return [self.prompt(DECODE_PROMPT) for _ in range(count)]

        self.seconds(fresh(), STEPS[0] + 1)  # compiles the kernels for `count` sequences before the timed run
        step = self.seconds(fresh(), STEPS[0] + 1) / (STEPS[0] + 1)
        steps = max(STEPS[0], min(STEPS[1], int(DECODE_SECONDS / step)))
        seconds = min(self.seconds(fresh(), steps + 1) for _ in range(2)) - min(
            self.seconds(fresh(), 1) for _ in range(2)
        )
        work = decode_work(self.config, self.stored.policy, sequences=count, context=DECODE_PROMPT + steps // 2)
        return self.row("decode", count, count * steps / seconds, count, work) | {"step_ms": 1e3 * seconds / steps}

    def prefill(self, length: int) -> dict[str, Any]:
        first = self.seconds([self.prompt(length)], 1)
        if first < SLOW:
            first = min(self.seconds([self.prompt(length)], 1) for _ in range(2))
        return self.row("prefill", length, length / first, length, self.prefill_work(length))

    def long(self, length: int) -> dict[str, Any]:
        """Measures one request that fills the context window: the tokens per second of its prefill, and the tokens per
        second of its decode.

        To time its decode, the same prompt is sent again, so that it comes from the prefix cache.
        """
        length = min(length, self.llm.core.info.max_model_len)
        prompt = self.prompt(length - LONG_STEPS - 1)
        first = self.seconds([prompt], 1)
        one = min(self.seconds([prompt], 1) for _ in range(2))
        many = self.seconds([prompt], LONG_STEPS + 1)
        row = self.row("one request", length, len(prompt) / first, len(prompt), self.prefill_work(len(prompt)))
        work = decode_work(self.config, self.stored.policy, sequences=1, context=length)
        return row | {
            "first_token_seconds": first,
            "decode_tok_s": LONG_STEPS / (many - one),
            "decode_predicted": 1 / work.seconds(self.ceilings),
        }

    def prefill_work(self, tokens: int) -> Work:
        chunk = self.llm.core.info.max_num_batched_tokens
        return prefill_work(self.config, self.stored.policy, tokens=tokens, chunk=chunk)

    def row(self, kind: str, size: int, rate: float, tokens: int, work: Work) -> dict[str, Any]:
        """Returns a measurement's result as a dictionary for the result file.

        `predicted` is the rate in tokens per second that the GPU's memory bandwidth and matmul rate allow.
        """
        predicted = tokens / work.seconds(self.ceilings)
        bound = work.bound(self.ceilings)
        return {"kind": kind, "size": size, "tok_s": rate, "predicted": predicted, "bound": bound}


def run(job: Job, record: Record) -> None:
    wanted = cells(job, SIZES.get(job.shape, OTHERS))
    if job.key("memory") in record.rows or all(key in record.rows for key in wanted):
        return
    ceilings = measure_ceilings(job.device)
    record.start_run(job, before=msgspec.to_builtins(ceilings))
    with tempfile.TemporaryDirectory() as folder:
        write_config(job.shape, Path(folder))
        config = load_model_config(Path(folder))
        if (reason := too_large(config, job)) is not None:
            record.cell(job.key("memory"), lambda: {"left_out": reason})
            return
        with mock.patch("jamba_server.kernels.triton.launch.DEPENDENT", job.part == DEPENDENT):
            measure(job, record, config, folder, ceilings)
    if job.device == "cuda":
        gc.collect()
        record.note(peak_memory_bytes=torch.cuda.max_memory_allocated())
        torch.cuda.empty_cache()
    record.note(after=msgspec.to_builtins(measure_ceilings(job.device)))


def measure(job: Job, record: Record, config: JambaConfig, folder: str, ceilings: Ceilings) -> None:
    """Builds an engine and runs all measurements with this engine. The engine's memory is freed when this function
    returns."""
    sizes = SIZES.get(job.shape, OTHERS)
    loaded: list[Bench] = []

    def load() -> dict[str, Any]:
        loaded.append(Bench(job, config, folder, sizes, ceilings))
        record.note(engine=msgspec.to_builtins(loaded[0].llm.core.info))
        return {"load_seconds": loaded[0].load_seconds}

    # an earlier process of this job failed to load the model, so this process would fail, too
    if "error" in record.rows.get(job.key("load"), {}):
        return
    record.rows.pop(job.key("load"), None)
    if record.cell(job.key("load"), load) is None:
        return
    for key, work in cells(job, sizes).items():
        known = key in record.rows
        if record.cell(key, partial(work, loaded[0])) is None and not known and "profile" not in key:
            raise SystemExit("The requests of the failed cell are still in the engine: a new process continues.")


def cells(job: Job, sizes: Sizes) -> dict[str, Callable[[Bench], dict[str, Any]]]:
    """Returns {key of a measurement: function that makes this measurement}, in the order in which the functions must
    run."""
    if job.cold:
        return {job.key("first reply", "nothing compiled before"): Bench.first_reply}
    if job.part == DEPENDENT:
        return {job.key("dependent launches, decode", n): partial(Bench.decode, count=n) for n in sizes.sequences}
    found: dict[str, Callable[[Bench], dict[str, Any]]] = {job.key("first reply"): Bench.first_reply}
    found |= {job.key("decode", n): partial(Bench.decode, count=n) for n in sizes.sequences}
    found |= {job.key("prefill", n): partial(Bench.prefill, length=n) for n in sizes.prompts}
    if sizes.long:
        found[job.key("one request", sizes.long)] = partial(Bench.long, length=sizes.long)
    ends = (sizes.sequences[0], sizes.sequences[-1])
    found |= {job.key("profile, decode", n): partial(profile_decode, count=n) for n in ends}
    longest = min(PROFILED_PROMPT, sizes.prompts[-1])
    return found | {job.key("profile, prefill", longest): partial(profile_prefill, length=longest)}


def too_large(config: JambaConfig, job: Job) -> str | None:
    """Returns a message if the model's weights do not fit in this GPU's free memory. Returns None if the weights
    fit."""
    if job.device == "cpu":
        return None
    torch.cuda.empty_cache()
    weights = weight_bytes(config, DTYPE_BYTES, policy=Format.parse(job.format).policy)
    free, total = torch.cuda.mem_get_info()
    if weights < free:
        return None
    return f"{format_bytes(weights)} of weights; this GPU has {format_bytes(free)} free of {format_bytes(total)}"


def profile_decode(bench: Bench, count: int) -> dict[str, Any]:
    """Profiles a few decode steps of `count` sequences."""
    return profile(bench, [bench.prompt(DECODE_PROMPT) for _ in range(count)], PROFILED_STEPS + 1)


def profile_prefill(bench: Bench, length: int) -> dict[str, Any]:
    """Profiles the prefill of one prompt of `length` tokens, whose kernels an earlier prompt has compiled."""
    bench.seconds([bench.prompt(length)], 1)
    return profile(bench, [bench.prompt(length)], 1)


def profile(bench: Bench, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Profiles replies of `tokens` tokens to `prompts`. Returns the kernels that take the largest fractions of the
    profiled time, each with the number of microseconds per launch, and the fraction of the time in which a kernel
    runs."""
    activity = torch.profiler.ProfilerActivity
    gpu = bench.llm.core.info.device != "cpu"
    with torch.profiler.profile(activities=[activity.CUDA] if gpu else [activity.CPU]) as profiler:
        seconds = bench.seconds(prompts, tokens)
    events: list[Any] = list(profiler.key_averages())
    kind = "device" if gpu else "cpu"
    times = {event.key: (getattr(event, f"self_{kind}_time_total"), event.count) for event in events}
    total = sum(microseconds for microseconds, _ in times.values())
    longest = sorted(times.items(), key=lambda item: -item[1][0])[:PROFILED_KERNELS]
    kernels = [{"name": name[:80], "share": us / total, "us": us / n, "count": n} for name, (us, n) in longest if us]
    busy = total / 1e6 / seconds
    return {"profile": len(prompts), "steps": tokens, "busy_us": total, "busy_share": busy, "longest": kernels}
