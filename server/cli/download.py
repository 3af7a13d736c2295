"""Downloads a model from the hub, writes one log line and shows a progress bar. Ctrl-C ends the download at once.

A separate process (`hub.py`) receives the files and sends messages on its progress to this process.
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
from typing import IO, Literal

import msgspec
from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

import jamba_server
from jamba_server.engine.errors import CheckpointError

logger = logging.getLogger(__name__)

CLEAN_UP_SECONDS = 2.0  # seconds that the download process has to remove partial files before it is killed
COMMAND = (sys.executable, "-P", "-m", "jamba_server.server.cli.hub")


class Download(msgspec.Struct, frozen=True):
    """The order to the download process: download the files of the hub id `name` at `revision`. Only files whose names
    match one of `patterns` are downloaded. If `quantization` is not None, a GGUF file is downloaded instead: the one
    with this quantisation, or the usual one if `quantization` is "".

    The files that are downloaded are compared with the hub's checksums. With `check_all` so are those that were in the
    local cache before. With `with_list` the answer is Listed instead of Done."""

    name: str
    revision: str | None
    patterns: list[str]
    quantization: str | None = None
    check_all: bool = False
    with_list: bool = False


class HubFile(msgspec.Struct, frozen=True):
    """A file of a model on the hub: its path in the repository, and its size in bytes."""

    path: str
    size: int


class Plan(msgspec.Struct, frozen=True, tag=True):
    """Message of the download process: the number of files to download, and the sum of their sizes in bytes. If `work`
    is "checking", the files are here and their checksums are computed."""

    num_files: int
    num_bytes: int
    work: Literal["downloading", "checking"] = "downloading"


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Message of the download process: the number of bytes received or checked since the latest Plan."""

    num_bytes: int


class Listed(msgspec.Struct, frozen=True, tag=True):
    """Message of the download process: all files of a model on the hub. The files that the order wants are in
    `folder`."""

    files: list[HubFile]
    folder: str


class Done(msgspec.Struct, frozen=True, tag=True):
    """Message of the download process: the download is complete. All files are in the folder `folder`. If a GGUF file
    was wanted, `file` is its name, and `found` lists the quantisations of which it is one."""

    folder: str
    file: str = ""
    found: list[str] = msgspec.field(default_factory=list[str])


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Message of the download process: the download has failed. The text `message` tells the user the reason and what
    to do."""

    message: str


FromHub = Plan | Progress | Listed | Done | Failed


def download(
    name: str, revision: str | None, patterns: list[str], quantization: str | None = None, *, check_all: bool = False
) -> Path:
    """Downloads the files of the hub id `name` that match `patterns` and are not in the local cache. Returns their
    folder. If `quantization` is not None, downloads the GGUF file with this quantisation instead and returns its path.
    With `check_all`, files that were in the cache before are compared with the hub's checksums too. Raises
    CheckpointError with one sentence that says what to do."""
    done = _ask(Download(name, revision, patterns, quantization, check_all=check_all))
    assert isinstance(done, Done), "only an order with `with_list` is answered by Listed"
    if len(done.found) > 1 and not quantization:
        logger.info("%s has the quantisations %s; %s is taken", name, ", ".join(done.found), done.file)
    return Path(done.folder) / done.file


def list_files(name: str, revision: str | None, patterns: list[str]) -> tuple[list[HubFile], Path]:
    """Returns all files that the hub id `name` has on the hub, and the folder with those that match `patterns`, which
    are downloaded. Raises CheckpointError with one sentence that says what to do."""
    listed = _ask(Download(name, revision, patterns, with_list=True))
    assert isinstance(listed, Listed), "an order with `with_list` is never answered by Done"
    return listed.files, Path(listed.folder)


def _ask(wanted: Download) -> Done | Listed:
    """Starts a download process and shows its progress until it has answered. Raises CheckpointError."""
    name = wanted.name
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with (
        tempfile.TemporaryFile() as stderr,
        hub_process(wanted, stderr) as messages,
        Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        for line in messages:
            message: FromHub = msgspec.json.decode(line, type=FromHub)
            match message:
                case Plan(num_files, num_bytes, work):
                    if work == "downloading":
                        files = f"{num_files} file{'' if num_files == 1 else 's'}"
                        logger.info("downloading %s, %s, %s", name, files, filesize.decimal(num_bytes))
                    bar.add_task(work, total=num_bytes)
                case Progress(num_bytes):
                    for task in bar.task_ids[-1:]:  # `bar` has no task if no file is missing
                        bar.update(task, completed=max(num_bytes, bar.tasks[-1].completed))
                case Done() | Listed():
                    return message
                case Failed(reason):
                    raise CheckpointError(reason)
        stderr.seek(0)
        last = (stderr.read().decode(errors="replace").strip().splitlines() or ["it printed no error"])[-1]
    raise CheckpointError(f"The process that downloads {name} has ended without a result: {last}")


@contextmanager
def hub_process(wanted: Download, stderr: IO[bytes]) -> Generator[IO[bytes]]:
    """Starts the download process and yields the stream of its output, which has one message per line. At the end of
    the `with` block the process is ended."""
    root = str(Path(jamba_server.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        # The progress bar of this process shows the numbers that the hub client's progress bars count. The hub client's
        # bars are therefore switched on even if the user's environment switches them off.
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_DISABLE_PROGRESS_BARS": "0"},
        start_new_session=True,  # Ctrl-C reaches only this process, which then ends the download process
    )
    with process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # if the download process has ended already, nothing is sent
                os.write(process.stdin.fileno(), msgspec.json.encode(wanted) + b"\n")
            yield process.stdout
        finally:
            process.stdin.close()
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(CLEAN_UP_SECONDS)
            finally:  # the kill happens even if a second Ctrl-C interrupts the wait
                process.kill()
