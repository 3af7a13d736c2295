"""Kernels compiled while the weights load: after a rehearsal no step needs another. A GPU, its compiler and what it
computes are doubles; Triton's own code decides which launches share a compiled kernel."""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from random import Random
from types import FrameType, SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

import jamba_server.kernels.table
from benchmarks.shapes import Format, write_config
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.start import build
from jamba_server.engine.start.machine import available_cpus
from jamba_server.engine.start.memory import DummySteps
from jamba_server.engine.start.rehearsal import Compilers, Rehearsal, compiled_meanwhile
from jamba_server.engine.types import SamplingParams
from jamba_server.kernels.ops import Kernels, SampleInputs
from jamba_server.llm import LLM
from tests.engine.test_graphs import with_graphs
from tests.tiny import TINY_CONFIGS, save_tiny

pytest.importorskip("triton", reason="the package triton is not installed")
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


class Gpu:
    """Takes the place of Triton's driver and compiler. It records the kernels that are compiled and launched, and runs
    none of them."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.launched: list[str] = []
        self.may_compile = threading.Event()
        self.may_compile.set()
        self.free = threading.Semaphore(0)  # this number of kernels is compiled even if `may_compile` is not set
        self.broken = ""  # the name of a kernel whose compilation fails

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> Any:
        return id(self)  # Triton has no compiled kernels of other tests for this device number

    def get_current_stream(self, device: Any) -> int:
        return 0

    def compile(self, source: Any, **_: Any) -> Any:
        assert self.free.acquire(blocking=False) or self.may_compile.wait(60)
        if (name := source.fn.__name__) == self.broken:
            raise RuntimeError(f"{name} is broken")
        self.compiled.append(name)
        kernel = SimpleNamespace(run=lambda *_: self.launched.append(name), function=None, packed_metadata=None)
        kernel.launch_metadata = lambda *_: None
        return kernel


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    import triton.compiler
    from triton.runtime import driver

    found = Gpu()
    monkeypatch.setattr(driver, "_active", found)
    monkeypatch.setattr(triton.compiler, "compile", found.compile)
    monkeypatch.setattr(jamba_server.kernels.table, "ensure_available", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return found


@pytest.fixture
def slow_gpu(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU for which nothing is compiled until `Compilers.call_off` was called. If it is not called, all waits for
    kernels time out."""
    gpu.may_compile.clear()
    call_off = Compilers.call_off

    def watched(self: Compilers) -> None:
        call_off(self)
        gpu.may_compile.set()

    monkeypatch.setattr(Compilers, "call_off", watched)
    return gpu


def triton_kernels(batch_invariant: bool | None = None) -> Kernels:
    return jamba_server.kernels.table.select("cuda", {"all": "triton"}, batch_invariant)


def token_0(chosen: Kernels) -> Kernels:
    """Returns these kernels, which compute nothing, with an op `sample` that always returns the token 0. Otherwise the
    token ids would be arbitrary numbers."""

    def sample(logits: Tensor, inputs: SampleInputs) -> Tensor:
        return chosen.sample(logits, inputs).zero_()

    return dataclasses.replace(chosen, sample=sample)


CASES = [
    ("moe-gqa", {}),
    ("dense-mqa-tied", {"kv_cache_dtype": "fp8"}),
    ("conv3-state8-all-biases", {"dtype": "float32", "quantization": "fp8"}),
    ("expand3-no-biases-moe-everywhere", {"quantization": "int8", "quantize_mamba": True}),
    ("conv2-dt-rank-auto", {"quantization": "int4"}),
    ("moe-gqa", {"state_cache_dtype": "int8"}),
]


# Numbers of replies, and lengths of prompts: at the borders of tiles and graphs, and such as Triton tells apart, which
# are 1, multiples of 16 and all others.
SOME_SIZES = ((1, 2, 3, 9, 15, 16, 17, 65, 70), (1, 16, 17, 64, 65, 511, 1024, 1100, 1250))
MANY_SIZES = ((*range(1, 20), 31, 64, 65, 70), (1, 15, 16, 17, 63, 64, 65, 130, 511, 1023, 1024, 1100, 1250))


@pytest.mark.parametrize(
    "sizes", [SOME_SIZES, pytest.param(MANY_SIZES, marks=pytest.mark.nightly)], ids=["some", "many"]
)
@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_nothing_is_compiled_after_the_weights_are_loaded(
    name: str,
    settings: dict[str, Any],
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    gpu: Gpu,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU that passes for a GPU."""
    save_tiny(tmp_path, **TINY_CONFIGS[name])
    monkeypatch.setattr(
        build, "select", lambda device, wishes, batch_invariant: token_0(triton_kernels(batch_invariant))
    )
    monkeypatch.setattr(Rehearsal, "is_for", lambda self, device: True)
    limits = {"max_num_seqs": 70, "max_num_batched_tokens": 1100, "max_model_len": 1300}
    llm = LLM(tmp_path, device="cpu", **{"dtype": "bfloat16"} | limits | settings)
    before = list(gpu.compiled)
    assert len(before) > 20
    assert gpu.launched == []
    with_graphs(llm)
    random = Random(0)

    def prompt(length: int) -> list[int]:
        return random.choices(range(3, 60), k=length)

    masked = SamplingParams(thinking_token_budget=1, thinking_end=(4,))
    for params in (GREEDY, masked, SamplingParams(temperature=0.7, top_k=3, top_p=0.9, logprobs=2, prompt_logprobs=1)):
        for count in sizes[0]:
            prompts = [prompt(random.choice((1, 2, 17, 40))) for _ in range(count)]
            llm.generate([*prompts], msgspec.structs.replace(params, max_tokens=3))
        for length in sizes[1]:
            llm.generate([prompt(length)], msgspec.structs.replace(params, max_tokens=2))
    for _ in range(3):  # answers that were not read to their end, so that pages and states are copied
        llm.generate([[5] * 20 + [0] * extra for extra in range(9)], msgspec.structs.replace(GREEDY, max_tokens=9))
    assert "copy_kernel" in gpu.launched
    assert set(gpu.launched) == set(before), "nothing was compiled in vain"
    assert gpu.compiled == before


def rehearsal_of(shape: str, format: str, folder: Path) -> Rehearsal:
    write_config(shape, folder)
    policy = Format.parse(format).policy
    config = load_model_config(folder)
    layout = cache_layout(config, block_size=16, dtype="bfloat16")
    return Rehearsal(config, triton_kernels(), policy, torch.bfloat16, layout)


def dummy_steps(max_num_seqs: int, max_num_batched_tokens: int) -> DummySteps:
    return DummySteps(
        max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs, max_model_len=4096, block_size=16
    )


@pytest.mark.parametrize(("shape", "format"), [("3b", "bf16"), ("mini", "int8"), ("mini", "int4+mamba")])
def test_any_step_of_a_real_model_launches_what_was_rehearsed(
    shape: str, format: str, gpu: Gpu, tmp_path: Path
) -> None:
    """Any number of replies beside any number of prompts of any length."""
    rehearsal, steps, random = rehearsal_of(shape, format, tmp_path), dummy_steps(256, 2048), Random(0)
    with ThreadPoolExecutor(2) as executor:
        assert rehearsal.compile(steps, executor) == len(gpu.compiled) > 25
    runner, before = rehearsal.runner(), list(gpu.compiled)
    output = next(steps.of_all_sizes())
    for _ in range(60):
        replies = output.chunks * random.choice((0, 1, random.randint(1, 30), random.randint(1, 256)))
        lengths = [random.choice((1, 5, 70, 500, 1100)) for _ in range(random.choice((0, 1, 4, 20)))]
        prompts = [chunk for length in lengths for chunk in steps.prompts(length, length)]
        if replies or prompts:
            runner.launch(dataclasses.replace(output, chunks=(*replies, *prompts)))
    assert set(gpu.launched) == set(before) - {"copy_kernel"}
    assert gpu.compiled == before


def test_the_thread_that_loads_launches_as_ever(gpu: Gpu, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from jamba_server.kernels.triton.norm import rms_norm

    rehearsal, x = rehearsal_of("tiny", "bf16", tmp_path), torch.ones(2, 64)
    with caplog.at_level(logging.INFO), compiled_meanwhile(rehearsal, dummy_steps(4, 64)):
        rms_norm(x, x[0], 1e-6)
    assert gpu.launched == ["norm_kernel"]
    [record] = caplog.records
    assert f"compiled {len(gpu.compiled) - 1} kernels in " in record.getMessage()


def test_what_cannot_be_compiled_ahead_is_told_and_stops_nobody(
    gpu: Gpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.broken = "scan_kernel"
    with compiled_meanwhile(rehearsal_of("tiny", "bf16", tmp_path), dummy_steps(4, 64)):
        pass
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "kernels could not be compiled while the weights load, and are at their first use: " in caplog.text
    assert "scan_kernel is broken" in caplog.text
    assert "merge_kernel" in gpu.compiled, "the others are compiled all the same"


def test_nobody_waits_for_kernels_of_a_model_that_cannot_be_loaded(
    slow_gpu: Gpu, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rehearsal = rehearsal_of("tiny", "bf16", tmp_path)
    with pytest.raises(CheckpointError, match="no weights"), compiled_meanwhile(rehearsal, dummy_steps(4, 64)):
        raise CheckpointError("no weights")
    assert slow_gpu.may_compile.is_set()
    assert len(slow_gpu.compiled) <= available_cpus()
    assert caplog.text == ""


def test_a_load_that_fails_late_ends_the_wait_for_kernels_in_the_queue(
    slow_gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are submitted, most have not begun, and their thread waits for them when they are called off."""
    slow_gpu.free.release()
    waiting, ended = threading.Event(), threading.Event()

    def watched(futures: Iterable[Future[Any]]) -> Iterator[Future[Any]]:
        for future in as_completed(futures):
            waiting.set()  # the first is done: the wait for all the others has begun
            yield future

    monkeypatch.setattr("triton.runtime._async_compile.as_completed", watched)
    rehearsal = rehearsal_of("tiny", "bf16", tmp_path)

    def load() -> None:
        with suppress(CheckpointError), compiled_meanwhile(rehearsal, dummy_steps(4, 64)):
            assert waiting.wait(60)
            raise CheckpointError("no weights")
        ended.set()

    threading.Thread(target=load, daemon=True).start()
    assert ended.wait(60)
    assert len(slow_gpu.compiled) <= available_cpus() + 1


def is_within(thread: int, function: Any) -> bool:
    """Whether a thread is in a call of this function of Python."""
    frame: FrameType | None = sys._current_frames().get(thread)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame is not None


def test_an_interrupt_ends_the_wait_for_kernels(slow_gpu: Gpu, tmp_path: Path) -> None:
    main, over = threading.get_ident(), threading.Event()

    def interrupt() -> None:
        while not is_within(main, Future.exception):
            if over.wait(0.001):
                return
        signal.pthread_kill(main, signal.SIGINT)

    rehearsal = rehearsal_of("tiny", "bf16", tmp_path)
    interrupter = threading.Thread(target=interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), compiled_meanwhile(rehearsal, dummy_steps(4, 64)):
            interrupter.start()
    finally:
        over.set()
        interrupter.join()
    assert slow_gpu.may_compile.is_set()
    assert len(slow_gpu.compiled) <= available_cpus()


def test_only_a_gpu_with_triton_kernels_has_something_to_compile(tmp_path: Path, gpu: Gpu) -> None:
    rehearsal = rehearsal_of("tiny", "bf16", tmp_path)
    assert rehearsal.is_for(torch.device("cuda"))
    assert not rehearsal.is_for(torch.device("cpu"))
    without = dataclasses.replace(rehearsal, kernels=jamba_server.kernels.table.select("cuda", {"all": "reference"}))
    assert not without.is_for(torch.device("cuda"))
