"""Counts, without a GPU, what a step makes the host do: launches, and microseconds, with and without graphs.

    python -m benchmarks.gpu.launches [--shapes 3b,mini] [--target 90]

A step runs on torch's device "meta", where each kernel is compiled and a launch ends before it would call the driver.
So every launch is counted, and the time of Triton's Python code before the driver is measured. With a graph, the host
builds the inputs of the step, sends them, and launches the graph, the choice of rows and the sampling; there, the time
of the inputs is measured. Writes benchmarks/results/gpu-launches.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from benchmarks.gpu.compile import compiling_only
from benchmarks.shapes import Format, write_config
from jamba_server.engine.cache.graph_sizes import GraphSizes
from jamba_server.engine.cache.layout import CacheLayout
from jamba_server.engine.cache.manager import CacheCopies
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.device_tables import DeviceTables
from jamba_server.engine.grammar.masks import MaskFiller
from jamba_server.engine.graphs import StepGraphs
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.model_runner import ModelRunner
from jamba_server.engine.models import build_model
from jamba_server.engine.sampling.sampler import Sampler
from jamba_server.engine.scheduler import Chunk, SchedulerOutput
from jamba_server.engine.sequence import Sequence as Text
from jamba_server.engine.types import Request, SamplingParams
from jamba_server.kernels.table import select
from jamba_server.server.cli.bench.conditions import describe_machine, utc_now

RESULT: Final = Path(__file__).parents[1] / "results" / "gpu-launches.md"
FORMATS: Final = {"3b": "bf16", "mini": "int8"}
BLOCK_SIZE, LONGEST, ROUNDS = 16, 262_144, 7
# torch's operations that start no kernel: they make views, or memory without contents
NO_LAUNCH: Final = frozenset(
    (
        *("view", "_unsafe_view", "slice", "select", "split", "split_with_sizes", "chunk", "t", "transpose", "permute"),
        *("expand", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "empty", "empty_like", "empty_strided"),
        *("new_empty", "unbind", "reshape", "_reshape_alias", "lift_fresh", "resize_"),
    )
)


class Step(NamedTuple):
    """A step of `replies` sequences that decode at the end of `context` tokens, and of one prompt of `prompt`
    tokens."""

    replies: int
    context: int
    prompt: int = 0

    def __str__(self) -> str:
        beside = f", {self.prompt} prompt tokens" if self.prompt else ""
        return f"{self.replies} replies after {self.context:,} tokens{beside}"


STEPS: Final = (Step(1, 2048), Step(64, 2048), Step(64, 2048, 128), Step(256, 2048, 128), Step(256, LONGEST))


class Launches(TorchDispatchMode):
    """Counts the operations of torch that start a kernel, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names[name] += name not in NO_LAUNCH
        return func(*args, **(kwargs or {}))


def chunks_of(step: Step, *, owned: bool) -> list[Chunk]:
    """Returns the chunks of a step. If they are `owned`, sequences have pages and slots of their own."""
    chunks: list[Chunk] = []
    for number in range(step.replies + bool(step.prompt)):
        is_reply = number < step.replies
        length = step.context if is_reply else step.prompt
        request = Request(id=str(number), prompt=[1] * length, params=SamplingParams(max_tokens=1, top_p=0.9))
        seq = Text.of(request, arrival=number, now=0.0)
        seq.block_ids = array("i", [owned] * -(-length // BLOCK_SIZE))
        seq.state_id = 1 + number if owned else 0
        chunks.append(Chunk(seq, length - 1 if is_reply else 0, length, 1))
    return chunks


def runner_on_meta(config: JambaConfig, stored: Format, layout: CacheLayout) -> ModelRunner:
    """Returns a model runner whose tensors have no memory."""
    kernels, meta = select("cuda", {"all": "triton"}), torch.device("meta")
    model = build_model(config, kernels, dtype=torch.bfloat16, device=meta, policy=stored.policy)
    for unit in model.tensor_map().units:
        unit.pack()
    storage = CacheStorage(layout, num_pages=1, num_slots=1, num_compressed=0, device=meta)
    sampler = Sampler(kernels, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
    masks = MaskFiller(config.vocab_size, config.eos_token_ids, num_threads=1)
    return ModelRunner(model, storage, sampler, kernels, masks)


class Counted(NamedTuple):
    """The launches of a step: how many kernels of Triton and how many of torch, and the microseconds in Triton's."""

    triton: int
    torch: int
    microseconds: float


def counted(run: Callable[[], object]) -> Counted:
    """Counts the launches of `run`. The time is the shortest of several calls."""
    inner: Any = JITFunction.run
    triton: list[float] = []

    def count(kernel: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        found = inner(kernel, *args, **options)
        triton.append(time.perf_counter() - start)
        return found

    with mock.patch.object(JITFunction, "run", count):
        with Launches() as torchs:
            run()
        launches, times = len(triton), list[float]()
        for _ in range(ROUNDS):
            triton.clear()
            run()
            times.append(1e6 * sum(triton))
    return Counted(launches, torchs.names.total(), min(times))


def median_microseconds(run: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def eager(runner: ModelRunner, step: Step) -> Counted:
    """Returns the launches of a step without a graph."""
    output = SchedulerOutput(tuple(chunks_of(step, owned=False)), CacheCopies(), ())
    launch = torch.inference_mode()(lambda: runner.launch(output))
    launch()  # compiles the kernels
    return counted(launch)


def sampling(runner: ModelRunner, rows: int) -> Counted:
    """Returns the launches of what follows a graph: logits and sampling of `rows` rows."""
    hidden = torch.empty(rows, runner.model.config.hidden_size, dtype=torch.bfloat16, device="meta")
    [chunk] = chunks_of(Step(1, 8), owned=False)
    output = [(row, chunk.sequence) for row in _rows(chunk, rows)]
    launch = torch.inference_mode()(lambda: runner._sample(hidden, output, None))  # pyright: ignore[reportPrivateUsage]
    launch()
    return counted(launch)


def _rows(chunk: Chunk, rows: int) -> list[Any]:
    from jamba_server.engine.sampling.sampler import SamplingRow

    seq = chunk.sequence
    return [SamplingRow(seq.params, seq.tokens, seq.num_prompt, 0, 0)] * rows


def inputs(step: Step, model: Any, layout: CacheLayout, *, on_device: bool) -> float:
    """Returns the microseconds of building and packing the inputs of a step's graph, with page tables that stay on the
    device or with tables that are sent."""
    cpu = torch.device("cpu")
    storage: Any = mock.Mock(block_size=BLOCK_SIZE, kv=torch.empty(0))
    chunks = chunks_of(step, owned=True)
    tables = DeviceTables(step.replies + 1, LONGEST // BLOCK_SIZE, cpu) if on_device else None
    sizes = GraphSizes(step.replies, LONGEST, "cuda")
    graphs = StepGraphs(model, storage, sizes=sizes, new_graph=mock.Mock(), tables=tables)
    key = graphs.key(chunks)
    assert key is not None, "the step has no graph"

    def build() -> None:
        changes = [] if tables is None else [*tables.update(chunks)]
        graphs._send([*graphs._arrays(key, chunks, None)], changes)  # pyright: ignore[reportPrivateUsage]

    build()  # sends whole tables, once for each sequence
    return median_microseconds(build)


def table(shape: str, target: int, folder: Path) -> list[str]:
    write_config(shape, folder)
    config, stored = load_model_config(folder), Format.parse(FORMATS[shape])
    layout = cache_layout(config, block_size=BLOCK_SIZE, dtype="bfloat16")
    lines: list[str] = []
    with compiling_only(target):
        runner = runner_on_meta(config, stored, layout)
        for step in STEPS:
            before, sampled = eager(runner, step), sampling(runner, step.replies + bool(step.prompt))
            sent, kept = (inputs(step, runner.model, layout, on_device=kind) for kind in (False, True))
            # also the copy of the inputs, the graph, and the choice of rows
            after = sampled.triton + sampled.torch + (3 if step.prompt else 2)
            cells = [f"{shape}, {stored.name}", str(step), f"{before.triton} + {before.torch}", str(after)]
            times = (before.microseconds, sampled.microseconds, sent, kept)
            cells += [f"{microseconds:,.0f}" for microseconds in times]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    return lines


HEAD: Final = """# gpu-launches

What a step makes the host do, counted and measured without a GPU by `python -m benchmarks.gpu.launches`: {machine},
{date}, code for sm_{target}. A launch ends here before it would call the driver, so the driver's time is missing in
every column, and so is torch's own time. Without a graph, all launches of a step are made one after the other. With
one, the host builds the inputs, sends them, and launches the graph, the choice of rows and the sampling. "Tables sent"
builds whole page tables, as before they stayed on the device. A step with new pages makes one launch more. Another
program used the machine at times, so single times are upper bounds.

| model | step | launches without a graph (triton + torch) | launches with one | us in triton without a graph | \
with one | us of inputs, tables sent | us of inputs, tables stay |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="3b,mini")
    parser.add_argument("--target", type=int, default=90)
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in parsed.shapes.split(","):
            lines += table(shape, parsed.target, Path(folder))
    machine = describe_machine()
    head = HEAD.format(machine=f"{machine.cpu}, {machine.cores} cores", date=utc_now()[:10], target=parsed.target)
    RESULT.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
