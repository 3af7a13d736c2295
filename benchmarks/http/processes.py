"""What the kernel knows of a server's processes: resident memory and open file descriptors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import httpx

from benchmarks.http.shapes import descendants
from benchmarks.shapes import resident_bytes

# The command that runs the server under a limit of open files: it is put before the server's own command.
LIMITED = ("sh", "-c", 'ulimit -Sn "$0" && ulimit -Hn "$0" && exec "$@"')


def processes() -> dict[str, int]:
    """Returns the ids of the processes that this program has started, by a name from their command lines.

    The HTTP process is called `http`. A process that the server has started is called after its Python module.
    """
    found: dict[str, int] = {}
    for pid in descendants("self"):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        except OSError:
            continue  # The process ended after `descendants` had listed its id.
        if "serve" in arguments:
            found["http"] = pid
        elif "-m" in arguments:
            found[arguments[arguments.index("-m") + 1].removeprefix("jamba_server.")] = pid
        else:
            found[f"pid {pid}"] = pid
    return found


def memory_of(pids: Mapping[str, int]) -> dict[str, int]:
    """Returns the resident memory of each process in bytes, without the processes that have ended."""
    memory: dict[str, int] = {}
    for name, pid in pids.items():
        try:
            memory[name] = resident_bytes(pid)
        except (OSError, IndexError):  # an ended process has no line VmRSS
            continue
    return memory


def descriptors_of(pids: Mapping[str, int]) -> dict[str, int]:
    """Returns the number of open file descriptors of each process."""
    return {name: len(list(Path(f"/proc/{pid}/fd").iterdir())) for name, pid in pids.items()}


def gauges(url: str) -> dict[str, float]:
    """Returns the values of the server's metrics that have no label except the model's name."""
    values: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
        name, _, rest = line.partition("{")
        if rest.startswith("model_name=") and rest.count("=") == 1:
            values[name] = float(rest.rpartition(" ")[2])
    return values
