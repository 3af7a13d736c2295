"""Implements `jamba doctor`, which shows versions, devices and the kernels that a server on this machine would run, or
what a checkpoint is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import jamba_server
from jamba_server.engine.checkpoint import TOKENIZER_FILE, open_checkpoint
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import JambaError
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.start.contents import conversions, read_model
from jamba_server.engine.start.machine import available_cpus, available_memory, format_bytes
from jamba_server.engine.weight_sizes import policy_of, weight_bytes
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.cli.decode_limit import DTYPE_BYTES
from jamba_server.server.config import ServerConfig
from jamba_server.server.version import package_version

DOCUMENTS = ("generation_config.json", TOKENIZER_FILE, "tokenizer_config.json", "chat_template.jinja")
DISTRIBUTIONS = ("fastapi", "uvicorn", "tokenizers", "safetensors", "huggingface_hub", "llguidance")
# Time limit in seconds for the process that lists the kernels. The process's first start after an installation is slow,
# since Python compiles torch's files.
TIMEOUT_SECONDS = 120.0


class KernelRow(msgspec.Struct, frozen=True):
    """One kernel that implements an operation. An operation can have several such kernels.

    `status` is "selected", "available" or the reason why the implementation cannot run. If it is not
    `batch_invariant`, the last bits of its results may depend on the batch.
    """

    op: str
    implementation: str
    status: str
    batch_invariant: bool = True

    @property
    def name(self) -> str:
        """The implementation's name, with a note if a sequence's results depend on the other sequences in the batch."""
        return self.implementation if self.batch_invariant else f"{self.implementation} (depends on the batch)"


class CudaDevice(msgspec.Struct, frozen=True):
    name: str
    memory_bytes: int
    capability: str


class Machine(msgspec.Struct, frozen=True):
    """The report that `python -m jamba_server.kernels` prints as JSON."""

    python: str
    torch: str
    platform: str
    cpu_flags: dict[str, bool] | None
    cpu_level: str | None
    cpu_levels: list[str]
    cpu_units: str | None
    cpu_amx: str | None
    threads: int
    cuda_devices: list[CudaDevice] | None
    kernels: dict[str, list[KernelRow]]


def doctor(
    checkpoint: Annotated[
        str | None,
        typer.Argument(help="Folder, GGUF file or hub id to describe  [default: this machine]", show_default=False),
    ] = None,
) -> None:
    """Show versions, devices and the kernels that run here, or what a checkpoint is and how its weights are stored. The
    exit status is 1 if an operation has no kernel."""
    console = Console()
    if checkpoint is not None:
        for name, value in describe_checkpoint(checkpoint):
            console.print(f"{name:<16} {value}", markup=False, highlight=False, soft_wrap=True)
        return
    machine = ask_kernels()
    for name, value in facts(machine):
        console.print(f"{name:<16} {value}", markup=False, highlight=False, soft_wrap=True)
    for device, rows in machine.kernels.items():
        console.print(kernel_table(device, rows))
    if missing := [f"{op} on {device}" for device, rows in machine.kernels.items() for op in without_kernel(rows)]:
        console.print(f"There is no kernel that runs here for {', '.join(missing)}.", markup=False)
        raise typer.Exit(1)


def describe_checkpoint(name: str) -> list[tuple[str, str]]:
    """Returns the lines to print on a checkpoint, each a pair (name, value). Raises CheckpointError if this server
    cannot run the checkpoint."""
    folder = find_checkpoint(ServerConfig(model=name)).folder
    stored = read_model(folder)
    config = stored.config
    policy = policy_of(EngineConfig(model=str(folder), quantization="int8" if config.made_at_load else None), config)
    kept = Counter(entry.kind for name, entry in config.stored.items() if name in policy.blocks)
    documents = [document for document in DOCUMENTS if open_checkpoint(folder).has(document)]
    texts = [*stored.warnings, *conversions(config, policy, config.dtype)]
    return [
        ("checkpoint", f"{folder}, a {'GGUF file' if folder.is_file() else 'folder in Hugging Face format'}"),
        ("model", f"{config.architecture}, {config.num_parameters():,} parameters, {config.dtype}"),
        ("quantised", _quantized(config)),
        *(
            [("as stored", ", ".join(f"{count} of type {kind}" for kind, count in sorted(kept.items())))]
            if kept
            else []
        ),
        (
            "weights",
            f"{format_bytes(weight_bytes(config, DTYPE_BYTES[config.dtype], policy=policy))} of memory on a CPU",
        ),
        ("converting", _loss(config)),
        ("documents", ", ".join(documents) or "none"),
        *(("note", text) for text in texts),
    ]


def _quantized(config: JambaConfig) -> str:
    """Returns in words which weights are quantised in the files, and how."""
    if config.quantized_roles:
        return f"{', '.join(sorted(config.quantized_roles))} in {config.stored_format}"
    kinds = Counter(entry.kind for entry in config.stored.values())
    words = (
        f"{count} {'matrix' if count == 1 else 'matrices'} of type {kind}" for kind, count in sorted(kinds.items())
    )
    return ", ".join(words) or "nothing"


def _loss(config: JambaConfig) -> str:
    """Returns in words what `jamba convert` and `--quantization` would lose."""
    if config.quantized_roles:
        return "is refused, because the weights are quantised; convert the original checkpoint"
    if config.stored:
        return (
            f"rounds {len(config.stored)} quantised matrices twice, first to {config.dtype} and then to the new "
            "format; convert the original checkpoint if you have it"
        )
    return "to a smaller format rounds each weight once"


def ask_kernels() -> Machine:
    """Returns the report on the kernels. A separate process writes the report, since only that process loads torch.
    Raises JambaError."""
    root = str(Path(jamba_server.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-P", "-m", "jamba_server.kernels"]
    try:
        result = subprocess.run(command, env=environment, capture_output=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise JambaError(f"`python -m jamba_server.kernels` has not answered within {TIMEOUT_SECONDS:.0f} s.") from None
    if result.returncode:
        raise JambaError(f"`python -m jamba_server.kernels` failed:\n{result.stderr.decode(errors='replace').strip()}")
    return msgspec.json.decode(result.stdout, type=Machine)


def facts(machine: Machine) -> list[tuple[str, str]]:
    """Returns the lines to print on versions and devices. Each line is a pair (name, value)."""
    flags = machine.cpu_flags
    gpus = [f"{gpu.name}, {format_bytes(gpu.memory_bytes)}, sm {gpu.capability}" for gpu in machine.cuda_devices or []]
    return [
        ("jamba-server", package_version()),
        ("python", machine.python),
        ("torch", machine.torch),
        *((name, metadata.version(name)) for name in DISTRIBUTIONS),
        ("platform", machine.platform),
        (
            "CPU",
            "unknown features" if flags is None else ", ".join(name for name, has in flags.items() if has) or "plain",
        ),
        ("CPU kernels", cpu_kernels(machine)),
        ("cores", f"{available_cpus()} usable"),
        ("memory", f"{format_bytes(available_memory())} available"),
        ("GPU", "; ".join(gpus) or "none that torch can use"),
    ]


def cpu_kernels(machine: Machine) -> str:
    """Returns words on the CPU kernels: the instruction sets of the kernels that would run, the faster instruction sets
    for which kernels are compiled but which cannot run, with the reason, and the slower ones."""
    level = machine.cpu_level
    if level is None:
        return "not compiled, so the slower reference kernels run"
    place = machine.cpu_levels.index(level)
    slower, faster = machine.cpu_levels[:place], machine.cpu_levels[place + 1 :]
    reasons = [f"{name} ({machine.cpu_amx if name == 'amx' else 'this processor lacks it'})" for name in faster]
    return (
        f"{level}, products with 8-bit activations {machine.cpu_units}; compiled and faster, but not usable: "
        f"{', '.join(reasons) or 'none'}; compiled and slower: {', '.join(slower) or 'none'}"
    )


def kernel_table(device: str, rows: list[KernelRow]) -> Table:
    """Returns a table with one row per operation. A row has the kernel that runs, the kernels that could run instead,
    and the kernels that cannot run, with the reason."""
    table = Table(title=f"Kernels on {device}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("operation", "runs", "could also run", "cannot run"):
        table.add_column(column, overflow="fold")
    for op in dict.fromkeys(row.op for row in rows):
        mine = [row for row in rows if row.op == op]
        runs = [row.name for row in mine if row.status == "selected"]
        could = [row.name for row in mine if row.status == "available"]
        cannot = [f"{row.implementation}: {row.status}" for row in mine if row.status not in ("selected", "available")]
        table.add_row(op, *(escape("\n".join(items) or "-") for items in (runs, could, cannot)))
    return table


def without_kernel(rows: list[KernelRow]) -> list[str]:
    """Returns the operations for which no kernel is selected."""
    selected = {row.op for row in rows if row.status == "selected"}
    return [op for op in dict.fromkeys(row.op for row in rows) if op not in selected]
