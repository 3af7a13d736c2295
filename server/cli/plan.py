"""Implements `jamba plan`, which shows how many sequences of which length fit into memory. It reads no weights."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jamba_server.engine.config import Device, EngineConfig, Quantization
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.parallel.costs import Exchanges, exchanges
from jamba_server.engine.start.contents import StoredModel, conversions, read_plan
from jamba_server.engine.start.machine import available_memory, format_bytes
from jamba_server.engine.start.memory_plan import (
    DEFAULT_BATCHED_TOKENS,
    MemoryPlan,
    activation_bytes,
    usable_bytes,
)
from jamba_server.engine.start.rank_options import num_ranks
from jamba_server.engine.weight_sizes import policy_of
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.cli.decode_limit import (
    DTYPE_BYTES,
    Decode,
    decode_limits,
    describe_decode,
    find_bandwidth,
    read_bench,
)
from jamba_server.server.cli.plan_stages import (
    StageReport,
    describe_stages,
    plans_or_refusal,
    shares,
    stage_reports,
)
from jamba_server.server.cli.settings import Model, with_options
from jamba_server.server.cli.terminal import describe_weights
from jamba_server.server.config import ServerConfig
from jamba_server.server.options import parse_size

SIZES = (
    "revision",
    "device",
    "dtype",
    "quantization",
    "quantize_mamba",
    "threads",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_dtype",
    "kv_cache_memory_bytes",
    "gpu_memory_utilization",
    "enforce_eager",
    "state_cache_memory_bytes",
    "state_cache_dtype",
    "block_size",
    "enable_prefix_caching",
    "tensor_parallel_size",
    "tensor_parallel_exact",
    "pipeline_parallel_size",
    "device_map",
)
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Memory of the device, or of each of several GPUs, such as 80GiB  [default: what is free on this machine]",
        show_default=False,
    ),
]
Bandwidth = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help="Memory bandwidth per second, such as 3.35TB  [default: measured if the device is this CPU]",
        show_default=False,
    ),
]
Bench = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Report of `jamba bench --output` to show beside the decode limit  [default: none]",
        show_default=False,
    ),
]
CONTEXTS = (4096, 32768, 131072, 262144)
SEQUENCES = (1, 8, 32, 64, 128)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """The memory needed if `sequences` sequences of `context` tokens each run at the same time. The field `bytes` is
    the size, including the weights and the activations. The field `fits` is true if the server is allowed to use that
    much memory."""

    context: int
    sequences: int
    bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The memory that a model needs on a device. The server is allowed to use `memory_bytes` of the device's memory.

    If several ranks run the model, the sizes are those of the rank that needs most of them, on a device of its own.
    `stages` has the sizes of each stage, and `exchanges` counts what the ranks of a stage exchange in a decode step,
    for the stage that sends most.

    The field `plan` says how the server would divide that memory. If the server would not start, `plan` is None and
    `refusal` gives the reason.
    `bandwidth` is the device's memory bandwidth in bytes per second, or None if it is not known.
    """

    model: str
    architecture: str
    parameters: int
    ranks: int
    stages: tuple[StageReport, ...]
    exchanges: Exchanges
    dtype: str
    quantization: Quantization | None
    quantize_mamba: bool
    device: str
    memory_bytes: int
    weight_bytes: int
    bandwidth: float | None
    decode: tuple[Decode, ...]
    kv_bytes_per_token: int
    state_bytes_per_sequence: int
    bytes_per_saved_state: int
    table: tuple[Cell, ...]
    plan: MemoryPlan | None
    refusal: str | None
    warnings: tuple[str, ...]


@with_options(SIZES)
def plan(
    config: ServerConfig,
    model: Model = None,
    memory: Memory = None,
    bandwidth: Bandwidth = None,
    bench: Bench = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Show what fits into memory, by context length and number of sequences, and the limit of the decoding speed."""
    checkpoint = find_checkpoint(config, config_only=True)
    folder = checkpoint.folder
    measured = {} if bench is None else read_bench(bench)
    engine = config.engine(folder)
    report = make_report(
        config.model or checkpoint.name, read_plan(folder), engine, memory, bandwidth=bandwidth, measured=measured
    )
    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2))
        return
    console = Console()
    for line in describe(report):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(table(report))


def make_report(
    name: str,
    stored: StoredModel,
    engine: EngineConfig,
    memory: str | None,
    *,
    bandwidth: str | None,
    measured: Mapping[int, float],
) -> Report:
    """Returns the report on the memory that the model `stored` needs. The report calls the model `name`. The texts
    `memory` and `bandwidth` give the size of the device's memory and its bytes per second. If `memory` is None, the
    memory that is free on this machine is used; if `bandwidth` is None, the bandwidth of a CPU is measured. `measured`
    maps a number of running sequences to measured tokens per second. Raises ConfigError for a text that is not a size.
    """
    model, ranks = stored.config, num_ranks(engine)
    device, available = find_memory(engine.device, memory, engine.gpu_memory_utilization, ranks)
    dtype = model.dtype if engine.dtype == "auto" else engine.dtype
    policy = policy_of(engine, model)
    owned = shares(model, engine, policy, DTYPE_BYTES[dtype])
    parts = [own.parts for own in owned]
    speed = find_bandwidth(device, bandwidth, engine.threads)
    plans, refusal = plans_or_refusal(model, engine, owned, available, device)
    result = None if plans is None else max(plans, key=lambda plan: plan.total_bytes)
    wanted = engine.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS[device]
    batched = wanted if result is None else result.max_num_batched_tokens

    def cell(context: int, sequences: int) -> Cell:
        activations = activation_bytes(model, max_num_batched_tokens=batched, max_num_seqs=sequences)
        fixed = result.graph_bytes + result.table_bytes if result else 0
        most = max(own.weight_bytes + sequences * own.spec.sequence_bytes(context) for own in owned)
        total = most + activations + fixed
        return Cell(context=context, sequences=sequences, bytes=total, fits=total <= available)

    longest = min(engine.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    contexts = [context for context in CONTEXTS if context < longest] + [longest]
    return Report(
        model=name,
        architecture=model.architecture,
        parameters=model.num_parameters(),
        ranks=ranks,
        stages=stage_reports(model, owned, plans, DTYPE_BYTES[dtype]),
        exchanges=max((exchanges(model, own, DTYPE_BYTES[dtype]) for own in parts), key=lambda sent: sent.bytes_alone),
        dtype=dtype,
        quantization=policy.quantization,
        quantize_mamba=policy.mamba,
        device=device,
        memory_bytes=available,
        weight_bytes=max(own.weight_bytes for own in owned),
        bandwidth=speed,
        decode=decode_limits(model, dtype, policy, bandwidth=speed, measured=measured, parts=parts),
        kv_bytes_per_token=max(own.spec.kv_bytes_per_token for own in owned),
        state_bytes_per_sequence=max(own.spec.bytes_per_slot for own in owned),
        bytes_per_saved_state=max(own.spec.bytes_per_saved_state for own in owned),
        table=tuple(cell(context, sequences) for context in contexts for sequences in SEQUENCES),
        plan=result,
        refusal=refusal,
        warnings=stored.warnings + conversions(model, policy, dtype),
    )


def find_memory(device: Device, memory: str | None, utilization: float, ranks: int = 1) -> tuple[str, int]:
    """Returns the device's name, and the size in bytes of the memory that a rank of the server is allowed to use on the
    device. Each rank has a GPU of its own, and the `ranks` on a CPU share its memory.

    `memory` is the size of the device's memory as text. If it is None, the free memory of the first GPU or of this
    machine is used.
    """
    on_gpu = gpu_memory() if device != "cpu" and (memory is None or device == "auto") else None
    name = ("cpu" if on_gpu is None else "cuda") if device == "auto" else device
    if memory is not None:
        try:
            size = parse_size(memory)
        except ValueError:
            raise ConfigError(f"--memory is {memory!r}; it must be a size such as 80GiB.") from None
        return name, usable_bytes(size, size, utilization) if name == "cuda" else size // ranks
    if name == "cuda" and on_gpu is None:
        raise ConfigError(
            "--device is cuda, but nvidia-smi finds no GPU here: say how much memory it has with --memory."
        )
    return name, available_memory() // ranks if on_gpu is None else usable_bytes(*on_gpu, utilization)


def gpu_memory() -> tuple[int, int] | None:
    """Returns two sizes in bytes: the free memory and the total memory of the first NVIDIA GPU. Returns None if there
    is no such GPU. The program nvidia-smi gives the sizes, because importing torch would take seconds."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return None
    query = [tool, "--query-gpu=memory.free,memory.total", "--format=csv,noheader,nounits", "--id=0"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    match [field.strip() for field in answer.stdout.split(",")] if answer.returncode == 0 else []:
        case [free, total] if free.isdecimal() and total.isdecimal():
            return int(free) * 1024**2, int(total) * 1024**2
        case _:
            return None


def describe(report: Report) -> list[str]:
    """Returns the lines to print above the table: the model's size, its memory needs and its decoding speed."""
    state, saved_state = report.state_bytes_per_sequence, report.bytes_per_saved_state
    compressed = state != saved_state
    lines = [
        f"{report.model}: {report.architecture}, {report.parameters:,} parameters in "
        + describe_weights(report.dtype, report.quantization, report.quantize_mamba),
        *describe_ranks(report),
        f"weights                 {format_bytes(report.weight_bytes)}",
        f"KV cache                {report.kv_bytes_per_token:,} bytes per token",
        f"state                   {format_bytes(state)} per sequence"
        + (f", {format_bytes(saved_state)} per saved state (int8)" if compressed else " or saved state"),
        f"memory ({report.device})".ljust(24) + f"{format_bytes(report.memory_bytes)} that the server may use",
        *(describe_decode(decode, report.bandwidth) for decode in report.decode),
        *(f"warning                 {warning}" for warning in report.warnings),
    ]
    if report.plan is None:
        return [*lines, f"jamba serve would not start: {report.refusal}"]
    plan = report.plan
    return [
        *lines,
        f"jamba serve would use   {format_bytes(plan.total_bytes)}: weights {format_bytes(plan.weight_bytes)}, "
        f"activations {format_bytes(plan.activation_bytes)}, "
        + (f"CUDA graphs {format_bytes(plan.graph_bytes)}, " if plan.graph_bytes else "")
        + (f"page tables {format_bytes(plan.table_bytes)}, " if plan.table_bytes else "")
        + f"KV pages {format_bytes(plan.kv_bytes)}, states {format_bytes(plan.state_bytes)} "
        f"({plan.max_num_seqs} running, {plan.num_saved} saved)",
        f"and allow               {plan.max_model_len:,} tokens per sequence, {plan.max_num_seqs} sequences, "
        f"{plan.max_num_batched_tokens} prompt tokens per step",
        *(f"warning                 {warning}" for warning in plan.warnings),
    ]


def describe_ranks(report: Report) -> list[str]:
    """Returns the lines about several ranks, or no lines if there is one."""
    if report.ranks == 1:
        return []
    return [
        f"ranks                   {report.ranks}; all sizes below are those of one rank and its device"
        + (", and without a stage the largest" if len(report.stages) > 1 else ""),
        *describe_stages(report.stages),
        *describe_exchanges(report),
    ]


def describe_exchanges(report: Report) -> list[str]:
    """Returns the lines about what ranks send to each other."""
    sent, onward = report.exchanges, report.stages[0].bytes_to_next_stage
    lines: list[str] = []
    if sent.count:
        lines.append(
            f"exchanges               {sent.count} in a step; a rank sends {sent.bytes_alone:,} bytes for one sequence "
            f"and {sent.bytes_among_many:,} for each of many"
        )
    if onward:
        lines.append(
            f"between stages          a rank sends {onward:,} bytes to the next stage for each token of a step"
        )
    return lines


def table(report: Report) -> Table:
    """Returns a table of the memory needed, by context length and number of sequences. The table leaves out the memory
    for cached prefixes of sequences that have ended."""
    result = Table(
        title="Memory by context and number of sequences (brackets: does not fit)",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    result.add_column("context", justify="right")
    for sequences in SEQUENCES:
        result.add_column(f"{sequences}", justify="right")
    for start in range(0, len(report.table), len(SEQUENCES)):
        row = report.table[start : start + len(SEQUENCES)]
        cells = [format_bytes(cell.bytes) if cell.fits else f"({format_bytes(cell.bytes)})" for cell in row]
        result.add_row(f"{row[0].context:,}", *cells)
    return result
