"""The memory of a GPU: what is measured there, and what is planned from it, with a device that is a few numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.parallel.pipe import Pipe
from jamba_server.engine.quantization import UNQUANTIZED
from jamba_server.engine.scheduler import SchedulerOutput
from jamba_server.engine.start.build import Loaded, available_bytes, dummy_steps, gathered_tokens, measure_steps
from jamba_server.engine.start.memory import DummySteps, measure, usable_memory
from jamba_server.engine.start.memory_plan import Measured, MemoryPlan, plan_memory, usable_bytes
from jamba_server.engine.weight_sizes import weight_bytes
from jamba_server.llm import LLM
from tests.geometries import write_geometry
from tests.tiny import TINY_CONFIGS, save_tiny

MIB, GIB = 1024**2, 1024**3


class FakeMemory:
    """A GPU of 80 GiB, of which other processes use 2 GiB. A test says how much memory a step takes."""

    total = 80 * GIB

    def __init__(self, weights: int = 0) -> None:
        self.weights, self.now, self.most = weights, weights, weights

    def free_and_total(self) -> tuple[int, int]:
        return self.total - 2 * GIB - self.now, self.total

    def allocated(self) -> int:
        return self.now

    def reset_peak(self) -> None:
        self.most = self.now

    def peak(self) -> int:
        return self.most

    def take(self, count: int) -> None:
        """Takes memory and gives it back at once, so that only the peak shows it."""
        self.most = max(self.most, self.now + count)


@pytest.mark.parametrize(
    ("free", "utilization", "usable"),
    [(100, 1.0, 100), (100, 0.92, 92), (40, 0.92, 32), (5, 0.92, 0)],
)
def test_a_share_of_the_whole_device_stays_free_whoever_uses_the_rest(
    free: int, utilization: float, usable: int
) -> None:
    assert usable_bytes(free, 100, utilization) == usable


def test_what_steps_take_is_the_peak_beside_the_weights() -> None:
    memory = FakeMemory(weights=6 * GIB)
    memory.take(50 * GIB)  # loading, which is over
    sizes: list[int] = []

    def run(output: SchedulerOutput) -> None:
        sizes.append(len(output.chunks))
        memory.take([3 * GIB, GIB, GIB, 0][len(sizes) - 1])

    steps = DummySteps(max_num_batched_tokens=100, max_num_seqs=7, max_model_len=40, block_size=16)
    assert measure(run, steps, memory) == Measured(100, 7, 3 * GIB)
    assert sizes == [3, 1, 7, 1]
    assert usable_memory(memory, 0.9) == 72 * GIB - 2 * GIB - 6 * GIB


def test_a_step_that_does_not_fit_is_an_error_that_names_the_sizes() -> None:
    def run(output: SchedulerOutput) -> None:
        raise torch.OutOfMemoryError("tried to allocate 21 GiB")

    steps = DummySteps(max_num_batched_tokens=8192, max_num_seqs=4096, max_model_len=262_144, block_size=16)
    with pytest.raises(ConfigError, match=r"8192, or max_num_seqs 4096 at max_model_len 262144: lower one .*21 GiB"):
        measure(run, steps, FakeMemory())


def test_the_largest_steps_are_as_large_as_can_be() -> None:
    prompts, last, replies, smallest = DummySteps(
        max_num_batched_tokens=30, max_num_seqs=7, max_model_len=40, block_size=16
    ).largest()
    assert [(chunk.start, chunk.end) for chunk in prompts.chunks] == [(0, 37)]
    assert [(chunk.start, chunk.end) for chunk in last.chunks] == [(10, 40)]
    assert [(chunk.start, chunk.end) for chunk in replies.chunks] == [(39, 40)] * 7
    assert [(chunk.start, chunk.end) for chunk in smallest.chunks] == [(1, 2)]
    assert all(chunk.is_decode for chunk in (*replies.chunks, *smallest.chunks))
    for chunk in (*prompts.chunks, *replies.chunks, *smallest.chunks):
        assert chunk.num_sampled == 1
        assert set(chunk.sequence.block_ids) == {chunk.sequence.state_id} == {0}
        assert len(chunk.sequence.block_ids) * 16 >= chunk.end


@pytest.mark.parametrize(("gathered", "expected"), [(0, []), (25, [(0, 25)]), (35, [(5, 35)]), (41, [])])
def test_the_longest_prompt_whose_keys_are_copied_is_measured_too(
    gathered: int, expected: list[tuple[int, int]]
) -> None:
    """Attention copies no keys of longer prompts, so the longest prompt of all may need less memory."""
    steps = DummySteps(
        max_num_batched_tokens=30, max_num_seqs=7, max_model_len=40, block_size=16, gathered_tokens=gathered
    )
    outputs = [[(chunk.start, chunk.end) for chunk in output.chunks] for output in steps.largest()]
    assert outputs == [[(0, 37)], [(10, 40)], *([chunk] for chunk in expected), [(39, 40)] * 7, [(1, 2)]]


def test_keys_and_values_that_are_copied_take_512_mib(tmp_path: Path) -> None:
    """Mini has 8 KV heads of 128 numbers, and copies both."""
    tokens = gathered_tokens(load_model_config(write_geometry(tmp_path, "mini")), 2)
    assert tokens * 2 * 8 * 128 * 2 == 512 * MIB


def test_the_largest_steps_run_upon_one_page_and_one_state(tmp_path: Path) -> None:
    save_tiny(tmp_path, **TINY_CONFIGS["moe-gqa"])
    llm = LLM(tmp_path, max_num_seqs=5, max_num_batched_tokens=70, max_model_len=50)
    runner, config = llm.core.model_runner, EngineConfig(model="x", max_num_seqs=5, max_model_len=50)
    layout = cache_layout(runner.model.config, block_size=16, dtype="float32")
    loaded = Loaded(
        runner.model,
        Pipe(runner.model.parts.stage),
        runner.sampler,
        runner.masks,
        runner.kernels,
        UNQUANTIZED,
        torch.float32,
        layout,
        runner.device,
    )
    plan = plan_on_gpu(config, loaded.model.config, 10 * GIB)
    measured = measure_steps(loaded, dummy_steps(config, loaded.model.config, plan), FakeMemory())
    assert measured == Measured(plan.max_num_batched_tokens, 5, 0)


def plan_on_gpu(config: EngineConfig, model: JambaConfig, usable: int, measured: Measured | None = None) -> MemoryPlan:
    weights = weight_bytes(model, 2)
    return plan_memory(
        model,
        config,
        cache_layout(model, block_size=config.block_size, dtype="bfloat16"),
        weight_bytes=weights,
        available_bytes=weights + usable,
        device="cuda",
        measured=measured,
    )


def test_caches_get_what_measured_steps_and_graphs_leave(tmp_path: Path) -> None:
    model = load_model_config(write_geometry(tmp_path, "mini"))
    config = EngineConfig(model="x", max_num_seqs=256, enforce_eager=True)
    estimated = plan_on_gpu(config, model, 60 * GIB)
    plan = plan_on_gpu(config, model, 60 * GIB, Measured(estimated.max_num_batched_tokens, 256, 2 * GIB))
    assert plan.activation_bytes == 2 * GIB
    assert plan.graph_bytes == 0
    left = 58 * GIB - plan.kv_bytes - plan.state_bytes - plan.table_bytes
    assert 0 <= left < 16 * MIB, "less than a state is left over"
    assert plan.table_bytes == 4 * 257 * plan.max_model_len // 16
    with_graphs = plan_on_gpu(
        EngineConfig(model="x", max_num_seqs=256), model, 60 * GIB, Measured(plan.max_num_batched_tokens, 256, 2 * GIB)
    )
    assert with_graphs.graph_bytes > 0
    taken = with_graphs.kv_bytes + with_graphs.state_bytes + with_graphs.graph_bytes + with_graphs.table_bytes
    assert 0 <= 58 * GIB - taken < 16 * MIB


def test_a_batch_is_not_larger_than_the_one_that_was_measured(tmp_path: Path) -> None:
    model = load_model_config(write_geometry(tmp_path, "3b"))
    plan = plan_on_gpu(EngineConfig(model="x"), model, 60 * GIB, Measured(1000, 64, GIB))
    assert plan.max_num_batched_tokens == 1000
    reason = "the memory for activations is limited"
    assert plan.warnings == (f"max_num_batched_tokens 8192 is reduced to 1000: {reason}",)


def test_steps_that_take_more_than_there_is_are_an_error(tmp_path: Path) -> None:
    model = load_model_config(write_geometry(tmp_path, "3b"))
    with pytest.raises(ConfigError, match=r"No room for a cache .* 5\.\d GiB of activations 0 B are left"):
        plan_on_gpu(EngineConfig(model="x"), model, 4 * GIB, Measured(8192, 64, 5 * GIB))


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01])
def test_a_share_that_is_none_is_an_error(tmp_path: Path, share: float) -> None:
    model = load_model_config(write_geometry(tmp_path, "3b"))
    with pytest.raises(ConfigError, match=rf"gpu_memory_utilization is {share}; it must be more than 0 and at most 1"):
        plan_on_gpu(EngineConfig(model="x", gpu_memory_utilization=share), model, 60 * GIB)


def test_a_limit_of_a_cpus_memory_is_shared_by_its_ranks() -> None:
    def available(**options: Any) -> int:
        return available_bytes(torch.device("cpu"), EngineConfig(model="any", **options))

    assert available(cpu_memory_bytes=1000) == 1000
    assert available(cpu_memory_bytes=1000, tensor_parallel_size=2) == 500
    assert 0 < available(cpu_memory_bytes=1 << 60) < 1 << 60, "there is not so much memory"
