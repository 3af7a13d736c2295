"""Runs the part `sweep` of the GPU check: compares the results of every kernel with the float32 reference, and times
every kernel."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from benchmarks.gpu.cases import Case, Maker, Shape, check, groups
from benchmarks.gpu.predict import Ceilings, Work, measure_ceilings, median_seconds
from benchmarks.gpu.record import Job, Record
from benchmarks.shapes import write_config
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.kernels.ops import Kernels
from jamba_server.kernels.table import KernelError, implementations, select

GRAPH_MILLISECONDS = 20


class Candidates:
    """Creates kernel sets in which one op has a chosen implementation and every other op its default implementation."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._by_op: dict[str, dict[str, Kernels]] = {}
        self.preferred, self.reference = select(device, {}), select(device, {"all": "reference"})

    def of(self, op: str) -> dict[str, Kernels]:
        """Returns {name of an implementation: kernel set}, for all implementations of the op `op` that can be loaded on
        this device.

        The reference is in the result only if `op` has no other implementation.
        """
        if op not in self._by_op:
            names = [entry.name for entry in implementations(op, self._device) if entry.name != "reference"]
            loaded = {name: kernels for name in names if (kernels := self._select(op, name)) is not None}
            self._by_op[op] = loaded or {"reference": self.reference}
        return self._by_op[op]

    def _select(self, op: str, name: str) -> Kernels | None:
        try:
            return select(self._device, {op: name})
        except KernelError:
            return None


def config_of(shape: str) -> JambaConfig:
    with tempfile.TemporaryDirectory() as name:
        write_config(shape, Path(name))
        return load_model_config(Path(name))


def run(job: Job, record: Record) -> None:
    ceilings = measure_ceilings(job.device)
    candidates = Candidates(job.device)
    record.start_run(job, before=msgspec.to_builtins(ceilings), kernels=candidates.preferred.names)
    maker = Maker(Shape.of(job.shape, config_of(job.shape)), torch.device(job.device))
    for cases in groups(maker):
        for case in cases:
            for name, kernels in candidates.of(case.op).items():
                measured = partial(measure, case, job.device, kernels, candidates.reference, ceilings)
                record.cell(job.key(case.op, name, case.label), measured)
    record.note(after=msgspec.to_builtins(measure_ceilings(job.device)))


def measure(case: Case, device: str, ours: Kernels, reference: Kernels, ceilings: Ceilings) -> dict[str, Any]:
    """Compares the results of one implementation of an op with the results of the reference implementation. Also times
    the implementation in microseconds.

    `us` is the time of a call from Python. `graph_us` is the time in a CUDA graph, where the L2 cache stays warm.
    `floor_us` is the shortest time that the device's limits allow. `torch_us` is the time of torch's matrix product.
    """
    error = check(case, ours, reference)
    op: Any = getattr(ours, case.op)
    args = case.prepare(ours)
    work = Work(bytes=case.bytes_moved(op(*args)), operations=case.operations)
    row: dict[str, Any] = {
        "op": case.op,
        "implementation": ours.names[case.op],
        "label": case.label,
        "error_norm": error,
        "tolerance": case.tolerance,
    }
    row |= {"us": 1e6 * median_seconds(lambda: op(*args), device), "floor_us": 1e6 * work.seconds(ceilings)}
    row |= {"bound": work.bound(ceilings)}
    if device == "cuda":
        row |= in_graph(lambda: op(*args))
    if case.op == "linear" and case.quantization is None:
        x, weight = case.args[0], case.weights[0]
        row["torch_us"] = 1e6 * median_seconds(lambda: torch.nn.functional.linear(x, weight), device)
    return row


def in_graph(work: Callable[[], object]) -> dict[str, Any]:
    """Times the function `work` in a CUDA graph. If the function `work` waits for the GPU, `work` cannot be captured in
    a graph. The reason is then returned instead of a time.

    Whether `work` waits is tested before a graph is captured, because a failed capture leaves torch's allocator
    unusable.
    """
    from triton.testing import do_bench_cudagraph

    try:
        torch.cuda.set_sync_debug_mode("error")
        work()
    except RuntimeError as error:
        return {"not_in_graph": str(error).splitlines()[0]}
    finally:
        torch.cuda.set_sync_debug_mode("default")
    timing: Any = do_bench_cudagraph(work, rep=GRAPH_MILLISECONDS, return_mode="median")
    return {"graph_us": 1e3 * timing}


def wrong(row: dict[str, Any]) -> bool:
    """Returns True if the error that is recorded in a result exceeds the recorded tolerance, or if the error is NaN."""
    return not row["error_norm"] <= row["tolerance"]
