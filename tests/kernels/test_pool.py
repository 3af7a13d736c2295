"""The thread pool of the CPU kernels: a program without the kernels, and kernels on many threads."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jamba_server.kernels.cpu.library import Library, library
from jamba_server.kernels.cpu.linear import Linear
from jamba_server.kernels.ops import KernelUnavailable
from tests.kernels.cases import assert_same, random

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "kernels" / "cpu" / "src"
FLAGS = ("-std=c++17", "-pthread", "-Wall", "-Wextra", "-Werror")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (compiler := shutil.which("g++") or shutil.which("clang++")) is None:
        pytest.skip("there is no C++ compiler")
    program = tmp_path_factory.mktemp("pool") / "driver"
    source = Path(__file__).parent / "pool" / "driver.cpp"
    subprocess.run([compiler, *FLAGS, "-O1", f"-I{SOURCES}", source, "-o", program], check=True)
    return program


def run(driver: Path, *arguments: int | str) -> str:
    result = subprocess.run([driver, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_random_jobs(driver: Path) -> None:
    """`make fuzz-pool` runs more of them, under ThreadSanitizer."""
    assert run(driver, "fuzz", 1, 20) == "ok: 20 rounds with seed 1\n"


@pytest.mark.parametrize("threads", [1, 2, 3, 64, 192])
def test_every_thread_takes_a_part(driver: Path, threads: int) -> None:
    assert run(driver, "together", threads).startswith(f"ok: each of {threads} threads took at least ")


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize(("threads", "processors"), [(3, 2), (64, 2), (192, 2), (40, 24), (33, 5), (3, 1)])
def test_workers_take_turns_with_more_threads_than_processors(
    driver: Path, threads: int, processors: int, nodes: int
) -> None:
    """The pool is told how many processors there are. The nodes are made up from those that this process may use."""
    assert run(driver, "turns", threads, processors, nodes) == f"ok: each of {threads} threads had work\n"


@pytest.mark.parametrize(("threads", "processors"), [(1, 1), (2, 2), (3, 8), (8, 8)])
def test_no_worker_passes_its_turn_on_with_enough_processors(driver: Path, threads: int, processors: int) -> None:
    expected = f"ok: no turns with {threads} threads on {processors} processors\n"
    assert run(driver, "turns", threads, processors, 1) == expected


def test_threads_take_pieces_of_their_own_node_first(driver: Path) -> None:
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        pytest.skip("two nodes need two processors")
    assert "20 first pieces ran on their node, and all pages were written there" in run(
        driver, "nodes", *processors[:2]
    )


@pytest.fixture
def native() -> Iterator[Library]:
    """The compiled library. Its threads and nodes are reset after the test."""
    try:
        found = library()
    except KernelUnavailable as error:
        pytest.skip(str(error))
    yield found
    found.set_nodes([sorted(os.sched_getaffinity(0))])
    library()  # as many threads as torch has, as before


@pytest.fixture
def together(native: Library) -> Iterator[Library]:
    """The library in the mode in which every thread that a product has pieces for takes one."""
    native.set_together(True)
    yield native
    native.set_together(False)


@pytest.mark.parametrize("threads", [2, 3, 64, 192])
@pytest.mark.parametrize("rows", [1, 40])
def test_a_product_on_many_threads(together: Library, threads: int, rows: int) -> None:
    linear, x = Linear(), random(rows, 64, seed=1, dtype=torch.bfloat16)
    packed = linear.pack(random(32 * 192, 64, seed=2, dtype=torch.bfloat16))
    together.set_threads(1)
    expected = linear(x, packed)
    together.set_threads(threads)
    assert_same(linear(x, packed), expected)
    assert min(together.pieces_taken(threads)) > 0


@pytest.mark.parametrize("nodes", [1, 2])
def test_products_of_workers_that_take_turns(native: Library, nodes: int) -> None:
    processors = sorted(os.sched_getaffinity(0))
    if not nodes <= len(processors) < 64:
        pytest.skip("64 threads must be more than the processors, and each node needs a processor")
    linear, x = Linear(), random(3, 256, seed=1, dtype=torch.bfloat16)
    packed = linear.pack(random(2048, 256, seed=2, dtype=torch.bfloat16))
    native.set_threads(1)
    expected = linear(x, packed)
    native.set_nodes([processors[node::nodes] for node in range(nodes)])
    native.set_threads(64)
    products = 0
    while min(native.pieces_taken(64)) == 0:
        assert products < 100_000, native.pieces_taken(64)
        for _ in range(100):
            assert_same(linear(x, packed), expected)
        products += 100


def test_a_description_of_nodes_is_checked(together: Library) -> None:
    for nodes in ([], [[0], []], [[8192]], [[-1]], [[0]] * 65):
        with pytest.raises(ValueError, match="memory nodes must have processors"):
            together.set_nodes(nodes)


def test_memory_on_two_nodes(together: Library) -> None:
    """Packed weights of at least one huge page are placed on the nodes before they are written."""
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) < 2:
        pytest.skip("two nodes need two processors")
    weight, x = random(2048, 600, seed=3, dtype=torch.bfloat16), random(3, 600, seed=4, dtype=torch.bfloat16)
    linear = Linear()
    expected = linear(x, linear.pack(weight))
    assert together.set_nodes([processors[:1], processors[1:]]) == 0
    together.set_threads(5)
    assert_same(linear(x, linear.pack(weight)), expected)
    assert min(together.pieces_taken(5)) > 0
