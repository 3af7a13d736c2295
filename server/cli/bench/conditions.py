"""Collects what a report says on the machine: its properties, the measured memory bandwidth and the versions of
libraries."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np


class Machine(msgspec.Struct, frozen=True):
    """Properties of the machine that runs this process. The field `cores` is the number of CPU cores that this process
    may use."""

    cpu: str
    cores: int
    memory_gib: float
    system: str


def describe_machine() -> Machine:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(_cpu_model(), cores, round(memory / 2**30, 1), platform.platform())


def describe_versions(distributions: Iterable[str]) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in distributions}


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def uncached_size() -> int:
    """Returns a number of bytes of which the processor's caches hold at most a quarter, or half a gigabyte where the
    size of the caches is not known."""
    name = "SC_LEVEL3_CACHE_SIZE"
    cache = os.sysconf(name) if name in os.sysconf_names else 0
    return max(1 << 29, 4 * cache)


def read_bandwidth(threads: int, *, size: int | None = None, rounds: int = 8) -> float:
    """Measures the bandwidth at which the CPU reads memory, in bytes per second.

    In each of `rounds` runs, `threads` threads together read `size` bytes, or as many as `uncached_size` returns if
    `size` is None. The fastest run gives the result.
    """
    size = uncached_size() if size is None else size
    parts = [np.ones(size // threads // 8, dtype=np.uint64) for _ in range(threads)]

    def seconds(pool: ThreadPoolExecutor) -> float:
        start = time.perf_counter()
        list(pool.map(np.bitwise_or.reduce, parts))  # numpy releases the GIL, so the threads run in parallel
        return time.perf_counter() - start

    with ThreadPoolExecutor(threads) as pool:
        return sum(part.nbytes for part in parts) / min(seconds(pool) for _ in range(rounds))


def _cpu_model() -> str:
    """Returns the name of the CPU's model. On x86 Linux the name is in /proc/cpuinfo; elsewhere Python's module
    `platform` gives it."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return match[1] if match else platform.processor() or platform.machine()
