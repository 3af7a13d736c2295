"""Runs the part `tune` of the GPU check: times the kernels that take most of a step's time, with tile sizes other than
the default tile sizes.

Unless the job says which calls to time, these are the products of decode steps, the products of prompts, and the
experts with int8 weights (FIRST): the kernels that take most of a step.

Each kernel is timed in a CUDA graph. The graph uses several copies of the arguments in turn, which together exceed the
L2 cache, so the arguments come from memory as in a real step. The result of each variant is compared with the result of
the unchanged kernel. Other processes compile the variants in advance.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from functools import partial
from itertools import cycle, islice, pairwise
from typing import Any

import msgspec
import torch

from benchmarks.gpu.cases import Case, flatten
from benchmarks.gpu.compile import Compiler
from benchmarks.gpu.predict import Ceilings, measure_ceilings
from benchmarks.gpu.record import Job, Record
from benchmarks.gpu.targets import Target, targets_of
from benchmarks.gpu.variants import applied
from jamba_server.kernels.ops import Kernels
from jamba_server.kernels.triton import interpreted

# Timed calls use several copies of the arguments in turn, so that the L2 cache does not hold the arguments of the next
# call. COLD_BYTES is the least total size of all copies in bytes. This total size is more than twice the size of the L2
# cache.
COLD_BYTES = 160 << 20
MOST_COPIES = 64
# The number of calls in a CUDA graph is chosen such that one run of the graph takes about GRAPH_SECONDS seconds. The
# number of timed runs is chosen such that all runs together take about TIMED_SECONDS seconds. For both choices, the
# kernel is assumed to be as fast as the GPU's limits allow.
GRAPH_SECONDS, TIMED_SECONDS = 4e-4, 6e-3
MOST_LAUNCHES = 128
LEAST_RUNS, MOST_RUNS = 3, 15
# largest allowed relative difference (a fraction) between the results of the unchanged kernel and the results of a
# variant that adds the terms of sums in another order
TOLERANCE = 1e-2
# The labels of the calls that are timed first: products in bfloat16 with few and with many rows, and int8 experts.
FIRST = re.compile(
    r"^(in_proj|out_proj|gate_up|down|qkv_proj|lm_head|x_proj), (1|8|64|2048|8192) rows$"
    r"|^experts, int8, |^(gate_up|down) int8, (1|64|8192) rows$|^gated gate_up, (1|64|8192) rows$"
)


def run(job: Job, record: Record) -> None:
    if job.device == "cpu" and not interpreted():
        raise SystemExit("The part tune needs a GPU, or triton's interpreter: TRITON_INTERPRET=1.")
    targets = targets_of(job.shape, job.device)
    labels = targets.labels()
    chosen = re.compile(job.cells) if job.cells else FIRST if job.shape in ("3b", "mini") else re.compile("")
    wanted = [bool(chosen.search(label)) and job.key(label) not in record.rows for label in labels]
    if not any(wanted):
        return
    capability = None
    if job.device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        capability = 10 * major + minor
    with Compiler(job.shape, capability) as compiler:
        compiler.submit(number for number, is_wanted in enumerate(wanted) if is_wanted)
        ceilings = measure_ceilings(job.device)
        record.start_run(job, before=msgspec.to_builtins(ceilings))
        number = 0
        for group in targets.groups():
            packed: list[Any] = []
            for target in group:
                if wanted[number]:
                    compiler.wait(number)
                    record.cell(job.key(target.label), partial(measure, target, packed, job.device, ceilings))
                number += 1
        record.note(**compiler.counts)
    record.note(after=msgspec.to_builtins(measure_ceilings(job.device)))


def measure(target: Target, packed: list[Any], device: str, ceilings: Ceilings) -> dict[str, Any]:
    """Times one kernel call with each variant, in microseconds. If a variant fails, the error message is recorded
    instead of a time.

    `packed` is a list of copies of the packed weights, which all calls of a group use. If the list is empty, this
    function fills it.
    """
    case, kernels = target.case, target.kernels()
    if not packed:
        packed += [case.packed(kernels) for _ in range(copies(case, device))]
    bench = Bench(case, kernels, packed, device)
    expected = bench.result()
    work = target.work()
    floor = work.seconds(ceilings)
    times: dict[str, Any] = {"as it is": 1e6 * bench.seconds(floor)}
    differ: dict[str, float] = {}
    for variant in target.variants:
        try:
            with applied(variant):
                error = difference(bench.result(), expected, same=variant.exact)
                times[variant.label] = 1e6 * bench.seconds(floor)
        except Exception as failure:  # noqa: BLE001 - a variant may need too many registers or too much shared memory
            times[variant.label] = f"{type(failure).__name__}: {failure}".splitlines()[0][:160]
            if device == "cuda":
                torch.cuda.synchronize()  # this call raises an error if the GPU has become unusable
            continue
        if not error <= (0 if variant.exact else TOLERANCE):
            differ[variant.label] = error
    row: dict[str, Any] = {"kind": "tune", "count": target.count, "floor_us": 1e6 * floor}
    return row | {"bound": work.bound(ceilings)} | best_of(target, times, differ)


def best_of(target: Target, times: dict[str, Any], differ: dict[str, float]) -> dict[str, Any]:
    """Chooses the fastest of all variants, and the fastest of the variants whose results are bitwise equal to the
    results of the unchanged kernel.

    `differ` has the variants whose results are wrong. These variants are not chosen.
    """
    right = {label: us for label, us in times.items() if not isinstance(us, str) and label not in differ}
    inexact = {variant.label for variant in target.variants if not variant.exact}
    exact = {label: us for label, us in right.items() if label not in inexact}
    best, best_exact = min(right, key=lambda label: right[label]), min(exact, key=lambda label: exact[label])
    found: dict[str, Any] = {"default_us": times["as it is"], "best_us": right[best], "best": best}
    found |= {"best_exact_us": exact[best_exact], "best_exact": best_exact}
    return found | {"variants": times, "differ": differ}


def difference(found: tuple[Any, ...], expected: tuple[Any, ...], *, same: bool) -> float:
    """Returns the largest relative difference between a tensor in `found` and the corresponding tensor in `expected`.

    If `same` is true, the difference is 0 only if all bits are equal.
    """
    pairs = list(zip(flatten(found), flatten(expected), strict=True))
    if all(torch.equal(a, b) for a, b in pairs):
        return 0.0
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs if a.is_floating_point()]
    worst = max(errors, key=lambda e: (e != e, e))
    return max(worst, 1e-300) if same else worst


def copies(case: Case, device: str) -> int:
    """Returns how many copies of the arguments to create. On a GPU, all copies together must exceed the L2 cache, but
    at most MOST_COPIES copies are created. On a CPU, one copy is enough."""
    moved = case.moved or case.bytes_moved(())
    return 1 if device == "cpu" else min(MOST_COPIES, math.ceil(COLD_BYTES / moved))


class Bench:
    """Times calls of an op. The calls use several copies of the arguments in turn. The op is allowed to write to its
    arguments."""

    def __init__(self, case: Case, kernels: Kernels, packed: list[Any], device: str) -> None:
        self._case, self._device = case, device
        self._op = case.called(kernels)
        self._packed = packed[0]
        count = min(copies(case, device), len(packed)) if case.weights else copies(case, device)
        weights = packed[:count] if case.weights else [None] * count
        self._calls = [case.arguments(one) for one in weights]

    def result(self) -> tuple[Any, ...]:
        """Calls the op with new copies of the arguments. Returns the op's result, and the copies after the call,
        because an op can write to its arguments."""
        args = self._case.arguments(self._packed)
        result = self._op(*args)
        return result, args if self._packed is None else (args[0], *args[2:])

    def seconds(self, floor: float) -> float:
        """Returns the seconds that one call of the op takes. The method `result` must have been called first, because
        that call compiles the kernel.

        `floor` is the shortest time in seconds that the device's limits allow. It sets how many calls a graph has.
        """
        if self._device == "cpu":
            start = time.perf_counter()
            self._op(*self._calls[0])
            return time.perf_counter() - start
        rounds = math.ceil(min(MOST_LAUNCHES, GRAPH_SECONDS / floor) / len(self._calls))
        launches = max(1, rounds) * len(self._calls)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for args in islice(cycle(self._calls), launches):
                self._op(*args)
        graph.replay()
        runs = max(LEAST_RUNS, min(MOST_RUNS, math.ceil(TIMED_SECONDS / (floor * launches))))
        events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
        for event in events[:-1]:
            event.record()
            graph.replay()
        events[-1].record()
        events[-1].synchronize()
        times = [first.elapsed_time(second) for first, second in pairwise(events)]
        return statistics.median(times) / 1e3 / launches
