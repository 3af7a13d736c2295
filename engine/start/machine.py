"""Finds the memory and the CPU cores that this process may use, as control groups limit them. Works without torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def format_bytes(count: int) -> str:
    """Returns a number of bytes as text in binary units: 9318400 becomes "8.9 MiB"."""
    if count < 1024:
        return f"{count} B"
    exponent = min(int(math.log2(count)) // 10, 4)
    return f"{count / 1024**exponent:.1f} {' KMGT'[exponent]}iB"


def available_memory(root: Path = Path("/")) -> int:
    """Returns how many bytes this process may still allocate: the machine's available memory, or less where its control
    group, or one above it, has a lower limit.

    `root` is the folder of proc/ and sys/. The inactive part of a group's page cache counts as free, because the kernel
    would drop it. Without proc/ (macOS) the result is the machine's whole memory.
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


def available_cpus(root: Path = Path("/")) -> int:
    """Returns how many CPU cores this process may use: those of its affinity mask, or the quota of its control groups
    in whole cores if that is less."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups(root, "cpu"):
        if (folder / "cpu.max").exists():  # it holds quota and period in microseconds: "200000 100000"
            quota, period = (folder / "cpu.max").read_text().split()
            limit = None if quota == "max" else int(quota) / int(period)
        else:
            quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
            limit = None if quota_us is None or quota_us < 0 or not period_us else quota_us / period_us
        if limit is not None:
            count = min(count, int(limit))
    return max(count, 1)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Yields the folders of this process's control group and of the groups above it, both for version 2 and for
    `controller` of version 1.

    In a container proc/self/cgroup may name the group by its path on the host. Then only the root folder exists.
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
    """Returns the number in a file. Returns None if the file says "max" or cannot be read."""
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
