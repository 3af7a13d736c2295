"""How many threads the CPU kernels use and on which memory nodes, from made-up trees of /proc and /sys."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jamba_server.engine.errors import ConfigError
from jamba_server.engine.start.processors import Processors, choose_threads, find_processors, parse_cpu_list

QUOTA = {"proc/self/cgroup": "0::/pod\n", "sys/fs/cgroup/pod/cpu.max": "150000 100000\n"}
TWO_NODES = {
    "sys/devices/system/node/node0/cpulist": "0-3,8-11\n",
    "sys/devices/system/node/node1/cpulist": "4-7,12-15\n",
    "sys/devices/system/node/node2/cpulist": "\n",  # memory without processors
    "sys/devices/system/node/has_cpu": "0-1\n",
}


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_processors_of_two_nodes(tmp_path: Path) -> None:
    found = find_processors(machine(tmp_path, TWO_NODES), allowed=range(16))
    assert found == Processors(((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)), None)
    chosen = choose_threads(None, "auto", found)
    assert (chosen.count, chosen.nodes) == (16, found.nodes)
    assert chosen.reason.startswith(
        "16, one for each processor that this process may use, divided among 2 memory nodes"
    )


def test_processors_outside_the_cpuset_are_left_out(tmp_path: Path) -> None:
    root = machine(tmp_path, TWO_NODES)
    assert find_processors(root, allowed={2, 3, 5}).nodes == ((2, 3), (5,))
    one = find_processors(root, allowed={4, 12})
    assert one.nodes == ((4, 12),)
    assert choose_threads(None, "auto", one).reason == "2, one for each processor that this process may use"


def test_the_affinity_of_this_process_is_the_default(tmp_path: Path) -> None:
    allowed = os.sched_getaffinity(0)
    first = {min(allowed)}
    os.sched_setaffinity(0, first)
    try:
        assert find_processors(tmp_path).nodes == (tuple(first),)
    finally:
        os.sched_setaffinity(0, allowed)
    assert find_processors(tmp_path).nodes == (tuple(sorted(allowed)),)


def test_a_processor_without_a_node_counts_as_one_of_the_first(tmp_path: Path) -> None:
    assert find_processors(machine(tmp_path, TWO_NODES), allowed={3, 4, 99}).nodes == ((3, 99), (4,))
    assert find_processors(tmp_path / "nothing", allowed={5, 1}).nodes == ((1, 5),)


def test_nodes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    files = {f"sys/devices/system/node/node{node}/cpulist": f"{11 - node}\n" for node in range(12)}
    assert find_processors(machine(tmp_path, files), range(12)).nodes == tuple((11 - node,) for node in range(12))


def test_a_quota_is_rounded_down_and_told(tmp_path: Path) -> None:
    found = find_processors(machine(tmp_path, QUOTA), allowed={0, 1})
    assert found.quota == 1.5
    assert choose_threads(None, "auto", found).count == 1
    assert choose_threads(None, "auto", found).reason == (
        "1, because a control group allows the time of 1.5 processors"
    )


def test_the_option_threads_decides_and_says_that_it_is_too_many() -> None:
    two = Processors(((0, 1),))
    assert choose_threads(2, "auto", two).reason == "2 on 2 usable processors"
    assert choose_threads(64, "none", two).count == 64
    assert "64 on 2 usable processors (more threads than processors" in choose_threads(64, "auto", two).reason


def test_the_option_numa() -> None:
    several = Processors(((0, 2), (1, 3)))
    none = choose_threads(None, "none", several)
    assert none.nodes == ((0, 1, 2, 3),)
    assert none.reason.endswith(", not divided among the 2 memory nodes")
    assert choose_threads(3, "split", several).nodes == several.nodes
    with pytest.raises(
        ConfigError, match=r"numa 'split' needs .* at least 2 memory nodes; this process may use 2, on 1"
    ):
        choose_threads(None, "split", Processors(((0, 1),)))


@pytest.mark.parametrize(
    ("text", "numbers"), [("0\n", {0}), ("0-2,5", {0, 1, 2, 5}), ("\n", set()), ("190-191,7", {7, 190, 191})]
)
def test_lists_of_processors(text: str, numbers: set[int]) -> None:
    assert parse_cpu_list(text) == numbers
