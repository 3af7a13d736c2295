"""Recorded calls: the same numbers as when Python makes them, from other inputs, among other graphs."""

from __future__ import annotations

import threading

import pytest
from torch import Tensor

from jamba_server.kernels.cpu.graph import Arena, NativeGraph
from jamba_server.kernels.cpu.library import library
from jamba_server.kernels.cpu.linear import Linear
from jamba_server.kernels.cpu.moe import SiluAndMul
from jamba_server.kernels.cpu.norm import RmsNorm
from jamba_server.kernels.ops import KernelUnavailable
from tests.kernels.cases import assert_same, random


@pytest.fixture(autouse=True)
def _compiled() -> None:  # pyright: ignore[reportUnusedFunction]
    try:
        library()
    except KernelUnavailable as error:
        pytest.skip(str(error))


class FeedForward:
    """A norm with an eps, which is the one number that is not whole, and three products with views between them."""

    def __init__(self, hidden: int, inner: int) -> None:
        self.linear, self.norm, self.silu = Linear(), RmsNorm(), SiluAndMul()
        self.gate_up = self.linear.pack(random(2 * inner, hidden))
        self.down = self.linear.pack(random(hidden, inner))
        self.norm_weight = random(hidden)

    def __call__(self, x: Tensor) -> Tensor:
        normed, total = self.norm(x, self.norm_weight, 1e-5, residual=x)
        y = self.linear(self.silu(self.linear(normed, self.gate_up)), self.down)
        return self.norm(y.unflatten(1, (2, -1)).flatten(1), self.norm_weight, 1e-3, residual=total)[0]


def test_a_replay_computes_from_what_the_inputs_hold_then() -> None:
    layer, x, arena = FeedForward(48, 80), random(5, 48), Arena()
    graph = NativeGraph(arena)
    graph.capture(lambda: layer(x))
    for seed in range(3):
        x.copy_(random(5, 48, seed=seed))
        expected = layer(x)
        assert_same(graph.replay(), expected)


def test_graphs_share_memory_and_results_stay_right() -> None:
    layer, arena, graphs = FeedForward(48, 80), Arena(), list[tuple[Tensor, NativeGraph]]()
    for rows in (8, 7, 8, 5):
        x, graph = random(rows, 48, seed=rows), NativeGraph(arena)
        graph.capture(lambda x=x: layer(x))
        graphs.append((x, graph))
    for x, graph in graphs[::-1] + graphs:
        assert_same(graph.replay(), layer(x))
    alone = Arena()
    NativeGraph(alone).capture(lambda: layer(graphs[0][0]))
    before = arena.num_bytes
    NativeGraph(arena).capture(lambda: layer(graphs[0][0]))
    assert arena.num_bytes - before < alone.num_bytes / 2, "one more graph takes memory for its result only"


def test_other_threads_calls_are_their_own() -> None:
    layer, x = FeedForward(48, 80), random(5, 48)
    expected, others, done = layer(x), list[Tensor](), threading.Event()

    def work() -> None:
        own = random(7, 48)
        while not done.is_set():
            others[:] = [layer(own)]

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            graph = NativeGraph(Arena())
            assert_same(graph.capture(lambda: layer(x)), expected)
            assert graph.num_calls == 5
            assert_same(graph.replay(), expected)
    finally:
        done.set()
        thread.join()
    assert_same(others[0], layer(random(7, 48)))


def test_what_a_replay_would_miss_is_refused() -> None:
    x = random(2, 8)
    with pytest.raises(RuntimeError, match="add cannot be recorded"):
        NativeGraph(Arena()).capture(lambda: x + 1)
    with pytest.raises(RuntimeError, match="contiguous would copy"):
        NativeGraph(Arena()).capture(lambda: x[:, ::2].contiguous())
    assert_same(FeedForward(8, 8)(x), FeedForward(8, 8)(x))  # nothing is recorded any more
