"""Implements `jamba convert`, which writes a checkpoint in another format. A process of its own does the work, since
only that process loads torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import jamba_server
from jamba_server.engine.errors import ConfigError, JambaError
from jamba_server.engine.start.machine import format_bytes
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.config import ServerConfig


class Target(StrEnum):
    """The formats that a checkpoint is converted to."""

    gguf = "gguf"
    int8 = "int8"
    int4 = "int4"
    int4_g32 = "int4-g32"


class GgufType(StrEnum):
    """The types of the matrices in a GGUF file."""

    q8_0 = "Q8_0"
    q4_0 = "Q4_0"
    f16 = "F16"
    bf16 = "BF16"


def convert(
    model: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder, GGUF file or hub id", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="GGUF file or folder to write", show_default=False)],
    to: Annotated[
        Target,
        typer.Option("--to", help="A GGUF file, or a folder with the weights of --quantization int8, int4 or int4-g32"),
    ],
    kind: Annotated[
        GgufType | None,
        typer.Option("--type", help="Type of the matrices of a GGUF file  [default: Q8_0]", show_default=False),
    ] = None,
) -> None:
    """Write a checkpoint as a GGUF file, or as a folder whose weights are quantised already."""
    if kind is not None and to is not Target.gguf:
        raise ConfigError(f"--type {kind.value} is for --to gguf, not for --to {to.value}.")
    if out.exists():
        raise ConfigError(f"{out} exists already; name a new {'file' if to is Target.gguf else 'folder'}.")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out.absolute().parent} is no folder to write in.")
    source = find_checkpoint(ServerConfig(model=model)).folder
    form = (kind or GgufType.q8_0).value if to is Target.gguf else to.value
    started = time.monotonic()
    _run(source, out, form)
    files = [out] if out.is_file() else list(out.iterdir())
    size = format_bytes(sum(file.stat().st_size for file in files))
    Console().print(f"{out}: {form}, {size}, {time.monotonic() - started:.0f} s", markup=False, highlight=False)


def _run(source: Path, out: Path, form: str) -> None:
    """Runs the process that converts. Raises JambaError with the sentence that the process wrote if it failed."""
    root = str(Path(jamba_server.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-P", "-m", "jamba_server.engine.convert", str(source), str(out), form]
    result = subprocess.run(command, env=environment, stderr=subprocess.PIPE, check=False)
    if result.returncode:
        last = (result.stderr.decode(errors="replace").strip().splitlines() or ["it printed no error"])[-1]
        raise JambaError(last)
