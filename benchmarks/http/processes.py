"""Reads from the operating system the resident memory and the open file descriptors of a server's processes, and some
metrics from the server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import httpx

from benchmarks.http.shapes import descendants
from benchmarks.shapes import resident_bytes

# The beginning of a command line that runs the server under a limit on open files. The limit and the server's own
# command follow.
LIMITED = ("sh", "-c", 'ulimit -Sn "$0" && ulimit -Hn "$0" && exec "$@"')


def processes() -> dict[str, int]:
    """Finds the processes of the server that this program has started. Returns their process ids, under names that are
    derived from their command lines.

    The server's main process, which handles HTTP, has the name `http`. Each child process of the server has the name of
    its Python module.
    """
    found: dict[str, int] = {}
    for pid in descendants("self"):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            continue  # The process has ended since `descendants` listed its id, so it is skipped.
        if "serve" in arguments:
            found["http"] = pid
        elif "-m" in arguments:
            found[arguments[arguments.index("-m") + 1].removeprefix("jamba_server.")] = pid
        else:
            found[f"pid {pid}"] = pid
    return found


def memory_of(pids: Mapping[str, int]) -> dict[str, int]:
    """Returns the resident memory of each process in bytes. Processes that have ended are left out."""
    memory: dict[str, int] = {}
    for name, pid in pids.items():
        try:
            memory[name] = resident_bytes(pid)
        except (OSError, IndexError):  # the process has ended: it has no file, or the file has no line VmRSS
            continue
    return memory


def descriptors_of(pids: Mapping[str, int]) -> dict[str, int]:
    """Returns the number of open file descriptors of each process."""
    return {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in pids.items()}


def gauges(url: str) -> dict[str, float]:
    """Requests the server's metrics. Returns the values of those metrics that have no label except the model's name."""
    values: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
        name, _, rest = line.partition("{")
        if rest.startswith("model_name=") and rest.count("=") == 1:
            values[name] = float(rest.rpartition(" ")[2])
    return values
