"""Predicts how much of a GPU the programs of matrix products can use, from the launches that the kernels would make.

Each kernel is called with tensors that have no data, and its launches are recorded: the grid, the sizes of the tile and
the number of stages. From these follow five times, and a kernel takes at least the longest of them:

* memory: the weight and the rows of x that are not in the L2 cache, at the rate that the bytes under way allow;
* L2: every program reads its rows of x and its part of the weight through the L2 cache;
* products: the tensor cores, with the empty rows and columns of tiles, and with what computing the weight's numbers
  takes beside them, on the multiprocessors that have a program;
* steps: a program cannot finish a step of its loop faster than the step's own latency;
* and what each launch takes by itself.

Nothing is measured. The constants below are assumptions about an H100 or H200, which have 132 multiprocessors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

import jamba_server.kernels.triton.launch
from benchmarks.gpu.predict import Ceilings
from benchmarks.gpu.targets import Target

MULTIPROCESSORS: Final = 132
CLOCK: Final = 1.755e9  # the clock rate in hertz
SHARED_BYTES: Final = 227 << 10  # bytes of shared memory that the programs of a multiprocessor may use
REGISTERS: Final = 65536  # registers of a multiprocessor
L2_BYTES: Final = 40e6  # bytes of the L2 cache that the rows of x may occupy; the whole cache has 50 MB
L2_RATE: Final = 5.5e12  # bytes per second that all multiprocessors together read through the L2 cache
L2_RATE_EACH: Final = 64 * CLOCK  # bytes per second that one multiprocessor reads through the L2 cache
LATENCY: Final = 0.75e-6  # seconds from a request to memory under load until its bytes arrive
STEP: Final = 0.14e-6  # latency of one step of a program's loop in seconds, about 250 cycles
LAUNCH: Final = 1.3e-6  # seconds between two kernels of a graph
TENSOR_OPERATIONS: Final = 4096  # operations in bfloat16 that the tensor cores of a multiprocessor do in a cycle
# The share of the tensor cores' rate that a loop reaches: a tile of 64 rows or columns, of 128 x 128, and of 128 x 256.
SHARES: Final = {64: 0.55, 128: 0.65, 256: 0.8}
# Cycles in which a multiprocessor computes 128 x 128 numbers of a quantised weight.
NUMBERS_CYCLES: Final = 416


@dataclass(frozen=True, slots=True)
class Launched:
    """A launch of a kernel: its name, its grid, and its arguments by name."""

    kernel: str
    grid: tuple[int, ...]
    values: dict[str, Any]

    @property
    def programs(self) -> int:
        count = 1
        for size in self.grid:
            count *= size
        return count


def launches(call: Callable[[], object]) -> list[Launched]:
    """Returns the launches that `call` would make on a GPU of compute capability 9.0."""
    found: list[Launched] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        found.append(Launched(kernel.fn.__name__, tuple(grid), values))

    forget = jamba_server.kernels.triton.launch.capability.cache_clear
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch("jamba_server.kernels.table.ensure_available"),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
    ):
        forget()
        try:
            call()
        finally:
            forget()
    return found


@dataclass(frozen=True, slots=True)
class Product:
    """What one launch of a matrix product does: `rows` rows of x times a weight with `columns` columns of which every
    program computes a tile over `inputs` inputs. `experts` weights are multiplied, each by a part of the rows."""

    launched: Launched
    rows: int
    columns: int
    inputs: int
    experts: int
    weight_bytes: float  # of one number

    @property
    def tile(self) -> tuple[int, int, int, int, int]:
        names = ("ROWS", "COLUMNS", "INNER", "num_warps", "num_stages")
        rows, columns, inner, warps, stages = (self.launched.values[name] for name in names)
        return rows, columns, inner, warps, stages

    @property
    def slots(self) -> int:
        """The number of programs that a multiprocessor has room for, given its shared memory and an estimate of the
        registers of a program."""
        rows, columns, inner, warps, stages = self.tile
        shared = stages * inner * (2 * rows + self.weight_bytes * columns)
        quantized = self.weight_bytes < 2
        registers = 48 + rows * columns / (32 * warps) + (columns * inner / (64 * warps) if quantized else 0)
        return max(1, min(int(SHARED_BYTES // shared), int(REGISTERS // (32 * warps * registers))))

    @property
    def used_rows(self) -> float:
        """How many rows of a tile have numbers."""
        return min(self.tile[0], self.rows / self.experts)

    def memory(self, bandwidth: float) -> float:
        _, columns, inner, _, stages = self.tile
        resident = min(self.launched.programs, MULTIPROCESSORS * self.slots)
        under_way = resident * (stages - 1) * inner * columns * self.weight_bytes
        weights = self.experts * self.columns * self.inputs_of_all * self.weight_bytes
        return (weights + self._x_bytes()) / min(bandwidth, under_way / LATENCY)

    def _x_bytes(self) -> float:
        """Bytes of x that come from memory. If x does not fit into the L2 cache, the programs that run at the same time
        read all their rows again, unless tiles are numbered in groups, whose rows stay in the cache."""
        whole = 2.0 * self.rows * self.inputs_of_all
        if whole <= L2_BYTES or "GROUP" in self.launched.values:
            return whole
        rows, columns, *_ = self.tile
        row_tiles = -(-self.rows // rows)
        at_once = MULTIPROCESSORS * self.slots
        return whole * max(1.0, self.experts * self.columns / columns * row_tiles / self.experts / at_once)

    @property
    def inputs_of_all(self) -> int:
        return self.launched.values.get("inputs", self.inputs)

    def l2(self) -> float:
        _, columns, *_ = self.tile
        each = self.inputs * (2 * self.used_rows + self.weight_bytes * columns)
        busy = min(self._working, MULTIPROCESSORS)
        return self._working * each / min(L2_RATE, busy * L2_RATE_EACH)

    @property
    def _working(self) -> float:
        """Programs that have a tile. Those of experts have a few more, which end at once."""
        rows, *_ = self.tile
        tiles = self.experts * -(-self.rows / self.experts // rows)
        given = self.launched.values.get("row_tiles", self.launched.grid[0] if self.experts > 1 else None)
        return self.launched.programs * (min(1.0, tiles / given) if given else 1.0)

    def products(self) -> float:
        rows, columns, *_ = self.tile
        least = min(rows, columns)
        share = SHARES[64 if least < 128 and self.weight_bytes == 2 else 256 if columns == 256 else 128]
        cycles = 2 * rows * columns * self.inputs / TENSOR_OPERATIONS / share
        if self.weight_bytes < 2:
            cycles += NUMBERS_CYCLES * columns * self.inputs / 128**2
        turns = max(1.0, self._working / MULTIPROCESSORS)
        return turns * cycles / CLOCK

    def steps(self) -> float:
        turns = max(1.0, self._working / (MULTIPROCESSORS * self.slots))
        return turns * self.inputs / self.tile[2] * STEP

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.memory(ceilings.bandwidth), self.l2(), self.products(), self.steps()) + LAUNCH


def product_of(launched: Launched, case_rows: int, weight_bytes: float) -> Product | None:
    """Returns what a launch multiplies, or None if it is no matrix product. `case_rows` is the number of rows of x."""
    values = launched.values
    if launched.kernel in ("gate_up_kernel", "down_kernel"):
        hidden, inner, experts = values["hidden"], values["intermediate"], values["EXPERTS"]
        choices = case_rows * values["TOP_K"]
        # the average number of experts that at least one token chooses
        used = max(1, round(experts * (1 - (1 - values["TOP_K"] / experts) ** case_rows)))
        columns, inputs = (2 * inner, hidden) if launched.kernel == "gate_up_kernel" else (hidden, inner)
        return Product(launched, choices, columns, inputs, used, weight_bytes)
    if "ROWS" not in values or "COLUMNS" not in values:
        return None
    columns = 2 * values["size"] if launched.kernel == "gated_kernel" else values["outputs"]
    inputs = values["SECTION"] if launched.kernel == "section_kernel" else values["inputs"]
    return Product(launched, values["rows"], columns, min(inputs, values["inputs"]), 1, weight_bytes)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The programs of a call's largest product, how many of them a multiprocessor gets, and the predicted seconds."""

    programs: int
    seconds: float
    launches: int

    @property
    def each(self) -> float:
        return self.programs / MULTIPROCESSORS


# The number of bytes that one number of a weight takes in memory, by the format. The scales are included.
WEIGHT_BYTES: Final = {None: 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.53, "int4-g32": 0.5625}


def predict(target: Target, ceilings: Ceilings) -> Prediction | None:
    """Returns the prediction for a call of `linear` or `run_experts`, and None for other calls."""
    case = target.case
    if case.op not in ("linear", "run_experts"):
        return None
    with mock.patch("jamba_server.kernels.table.ensure_available"):
        kernels = target.kernels()
    args = case.prepare(kernels)
    found = launches(lambda: case.called(kernels)(*args))
    seconds, programs = 0.0, 0
    for launched in found:
        product = product_of(launched, len(args[0]), WEIGHT_BYTES[case.quantization])
        if product is not None:
            programs = max(programs, launched.programs)
            seconds += product.seconds(ceilings)
        else:  # a kernel that adds sections or experts, or lists rows: all that it reads and writes is in the L2 cache
            moved = sum(t.nbytes for t in launched.values.values() if isinstance(t, torch.Tensor))
            seconds += LAUNCH + moved / L2_RATE
    return Prediction(programs, seconds, len(found))
