"""Chooses how many threads the CPU kernels use, and on which memory nodes of the machine they run. Works without torch.

A machine with several sockets, and some processors with one, have several *memory nodes*: a processor reads the memory
of its own node faster than that of another, and the bandwidth of the machine is the sum of those of its nodes.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from jamba_server.engine.config import Numa
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.start.machine import cpu_quota


@dataclass(frozen=True, slots=True)
class Processors:
    """The processors that this process may use, for each memory node that has some, and the number of processors' worth
    of time that the control groups allow, or None if they set no limit."""

    nodes: tuple[tuple[int, ...], ...]
    quota: float | None = None

    @property
    def count(self) -> int:
        return sum(map(len, self.nodes))

    @property
    def usable(self) -> int:
        """The number of threads that have a processor each: the quota is rounded down, because a thread beyond it would
        be stopped for a part of each period while the others wait for it."""
        return max(1, self.count if self.quota is None else min(self.count, int(self.quota)))


@dataclass(frozen=True, slots=True)
class Threads:
    """The number of threads of the CPU kernels, the processors of each memory node among which they are divided, and
    the reason in words."""

    count: int
    nodes: tuple[tuple[int, ...], ...]
    reason: str


def find_processors(root: Path = Path("/"), allowed: Collection[int] | None = None) -> Processors:
    """Reads the memory nodes and the limits of the control groups from the folder `root` that contains proc/ and sys/.

    `allowed` are the processors that the process may use. None means its affinity mask, which contains no processor
    outside the cpuset of its control group. A processor of which the system does not tell a node counts as one of the
    first node.
    """
    if allowed is None:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    left, nodes = set(allowed), list[list[int]]()
    for path in sorted((root / "sys/devices/system/node").glob("node[0-9]*/cpulist"), key=_node_number):
        if own := parse_cpu_list(path.read_text()) & left:
            nodes.append(sorted(own))
            left -= own
    if left:
        nodes[:1] = [sorted(left.union(*nodes[:1]))]
    return Processors(tuple(map(tuple, nodes)), cpu_quota(root))


def choose_threads(threads: int | None, numa: Numa, processors: Processors) -> Threads:
    """Returns the number of threads that the option `threads` or the machine gives, and the nodes on which they run.

    Raises ConfigError if `numa` is "split" and all processors are on one node.
    """
    nodes, usable = processors.nodes, processors.usable
    if numa == "split" and len(nodes) == 1:
        raise ConfigError(
            f"numa 'split' needs processors on at least 2 memory nodes; this process may use {processors.count}, on 1."
        )
    if numa == "none" or len(nodes) == 1:
        place = "" if len(nodes) == 1 else f", not divided among the {len(nodes)} memory nodes"
        nodes = (tuple(sorted(number for node in nodes for number in node)),)
    else:
        place = f", divided among {len(nodes)} memory nodes, each with its share of the weights"
    if threads is not None:
        more = " (more threads than processors, so not all run at once)" if threads > usable else ""
        return Threads(threads, nodes, f"{threads} on {_count(usable, 'usable processor')}{more}{place}")
    if usable < processors.count:
        reason = f"{usable}, because a control group allows the time of {processors.quota:g} processors{place}"
    else:
        reason = f"{usable}, one for each processor that this process may use{place}"
    return Threads(usable, nodes, reason)


def parse_cpu_list(text: str) -> set[int]:
    """Returns the numbers in a list of Linux such as "0-3,8,10-11"."""
    numbers = set[int]()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _node_number(path: Path) -> int:
    return int(path.parent.name.removeprefix("node"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
