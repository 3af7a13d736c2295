"""What this machine has: memory and cores, as its control groups limit them. No torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def format_bytes(count: int) -> str:
    """`9318400` as "8.9 MiB"."""
    if count < 1024:
        return f"{count} B"
    exponent = min(int(math.log2(count)) // 10, 4)
    return f"{count / 1024**exponent:.1f} {' KMGT'[exponent]}iB"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: the machine's, or what its control group and those above it leave.

    `root` holds proc/ and sys/. What a group's page cache holds and has not used lately counts as free, as the kernel
    would drop it. Without proc/ (macOS) it is the machine's memory.
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
    """Cores that this process may use: its affinity, or its control groups' quota in whole cores where that is less."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _control_groups(root, "cpu"):
        if (folder / "cpu.max").exists():  # "200000 100000" or "max 100000": microseconds, of a period
            quota, period = (folder / "cpu.max").read_text().split()
            limit = None if quota == "max" else int(quota) / int(period)
        else:
            quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
            limit = None if quota_us is None or quota_us < 0 or not period_us else quota_us / period_us
        if limit is not None:
            count = min(count, int(limit))
    return max(count, 1)


def _control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those above it, for version 2 and for `controller` of version 1.

    In a container proc/self/cgroup may name the group as the host sees it; then only the mounted root exists.
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
    """The number in a file; None for "max" or no such file."""
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
