"""Downloads from the hub, as people see them: one line, one bar, and an end at once when they want one.

The work is done by a process of its own (`hub.py`).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import msgspec
from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

import jamba_server
from jamba_server.engine.errors import CheckpointError

logger = logging.getLogger(__name__)

CLEAN_UP_SECONDS = 2.0  # that the process has for removing what it has half of
COMMAND = (sys.executable, "-P", "-m", "jamba_server.server.cli.hub")


class Download(msgspec.Struct, frozen=True):
    """Files of `name` at `revision` whose names match one of `patterns`."""

    name: str
    revision: str | None
    patterns: list[str]


class Plan(msgspec.Struct, frozen=True, tag=True):
    """What has to come."""

    num_files: int
    num_bytes: int


class Progress(msgspec.Struct, frozen=True, tag=True):
    """So many bytes have come."""

    num_bytes: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """Everything is in `folder`."""

    folder: str


class Failed(msgspec.Struct, frozen=True, tag=True):
    """`message` is for the user."""

    message: str


FromHub = Plan | Progress | Done | Failed


def download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder with what matches `patterns`, after what is missing of it has come. Raises CheckpointError with one
    sentence that says what to do."""
    columns = (TextColumn("downloading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with (
        tempfile.TemporaryFile() as stderr,
        hub_process(Download(name, revision, patterns), stderr) as messages,
        Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        for line in messages:
            message: FromHub = msgspec.json.decode(line, type=FromHub)
            match message:
                case Plan(num_files, num_bytes):
                    files = f"{num_files} file{'' if num_files == 1 else 's'}"
                    logger.info("downloading %s, %s, %s", name, files, filesize.decimal(num_bytes))
                    bar.add_task("", total=num_bytes)
                case Progress(num_bytes):
                    for task in bar.task_ids:  # there is none while nothing has to come
                        bar.update(task, completed=max(num_bytes, bar.tasks[task].completed))
                case Done(folder):
                    return Path(folder)
                case Failed(reason):
                    raise CheckpointError(reason)
        stderr.seek(0)
        last = (stderr.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    raise CheckpointError(f"The process that was to download {name} ended early: {last}")


@contextmanager
def hub_process(wanted: Download, stderr: IO[bytes]) -> Generator[IO[bytes]]:
    """The lines that it says. On leaving, however that happens, it ends."""
    root = str(Path(jamba_server.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        # its bars count for ours, whoever has switched them off
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "0"},
        start_new_session=True,  # Ctrl-C is for us: we end it
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has ended, and there is nothing to read
                os.write(process.stdin.fileno(), msgspec.json.encode(wanted) + b"\n")
            yield process.stdout
        finally:
            process.stdin.close()
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(CLEAN_UP_SECONDS)
            finally:  # also after a second Ctrl-C
                process.kill()
