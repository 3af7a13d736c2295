"""Finds how much memory and how many CPU cores this process may use within the limits of its control groups. Works
without torch."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path


def format_bytes(count: int) -> str:
    """Formats a number of bytes in binary units: 9318400 becomes "8.9 MiB"."""
    if count < 1024:
        return f"{count} B"
    exponent = min(int(math.log2(count)) // 10, 4)
    return f"{count / 1024**exponent:.1f} {' KMGT'[exponent]}iB"


def available_memory(root: Path = Path("/")) -> int:
    """Returns how many bytes this process may still allocate: the available memory of the machine, or less if a control
    group that contains the process has a lower limit.

    `root` is the folder that contains proc/ and sys/. The inactive part of a group's page cache counts as free, because
    Linux drops it when memory is short. Without proc/ (macOS) the result is the machine's whole memory.
    """
    try:
        meminfo = (root / "proc/meminfo").read_text()
    except FileNotFoundError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(line.split(":", 1) for line in meminfo.splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for folder in _control_groups(root, "memory"):
        v1 = (folder / "memory.limit_in_bytes").exists()
        limit = _number(folder / ("memory.limit_in_bytes" if v1 else "memory.max"))
        used = _number(folder / ("memory.usage_in_bytes" if v1 else "memory.current"))
        if limit is not None and used is not None:
            available = min(available, limit - used + _inactive_file(folder / "memory.stat", v1))
    return max(available, 0)


def release_free_memory() -> None:
    """Returns freed memory, which the C library keeps for later allocations, to the operating system. Loading a model
    frees many large temporary tensors. Only glibc, the C library of most Linux systems, has a function for this."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def available_cpus(root: Path = Path("/")) -> int:
    """Returns how many CPU cores this process may use: the number of cores in its affinity mask, or the CPU quota of
    its control groups, rounded down to whole cores, if the quota is smaller."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return max(count if quota is None else min(count, int(quota)), 1)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Returns how many processors' worth of time the control groups of this process allow, or None without a limit."""
    quotas = list[float]()
    for folder in _control_groups(root, "cpu"):
        # The file cpu.max contains the quota and the period in microseconds, for example "200000 100000".
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
        else:
            quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
            if quota_us is not None and quota_us >= 0 and period_us:
                quotas.append(quota_us / period_us)
    return min(quotas, default=None)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yields the folders of this process's control group and of all control groups that contain this group.
    `controller` selects the hierarchy in version 1 of control groups; version 2 has a single hierarchy.

    In a container proc/self/cgroup may name the group by its path on the host. Such a path does not exist in the
    container, so only the folder of the root group is yielded.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except FileNotFoundError:
        return
    base = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = base / controller if controllers else base
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_dir():
                yield folder
            if folder == top:
                break


def _number(path: Path) -> int | None:
    """Returns the number that a file contains. Returns None if the file contains "max" or cannot be read."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)


def _inactive_file(path: Path, v1: bool) -> int:
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
    except OSError:
        return 0
    return int(fields.get("total_inactive_file" if v1 else "inactive_file", 0))
