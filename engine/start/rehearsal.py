"""Rehearsal: steps upon the device "meta", so that a GPU's kernels are compiled while the weights load.

Tensors there have shapes, strides and (from 0) addresses, which is all that Triton specialises a kernel by, but no
memory; a launch compiles and does nothing else (`kernels.triton.launch.compile_launches`). The steps are launched by
the code that will run them, so that nothing says a second time which kernels a model needs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar

import torch

from jamba_server.engine.cache.layout import CacheLayout
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.model_runner import ModelRunner
from jamba_server.engine.models import build_model
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.sampling.sampler import Sampler
from jamba_server.engine.start.machine import available_cpus
from jamba_server.engine.start.memory import DummySteps
from jamba_server.kernels.ops import Kernels

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a model's kernels depend on beside the sizes of its steps."""

    config: JambaConfig
    kernels: Kernels
    policy: QuantizationPolicy
    dtype: torch.dtype
    layout: CacheLayout

    def is_for(self, device: torch.device) -> bool:
        """Whether there is anything to compile."""
        return device.type == "cuda" and any(name.startswith("triton") for name in self.kernels.names.values())

    def runner(self) -> ModelRunner:
        """Of a model with as many of its first layers as have one of every kind, and the cache of all of them."""
        kinds = [(self.config.is_attention(i), self.config.is_moe(i)) for i in range(self.config.num_hidden_layers)]
        config = replace(self.config, num_hidden_layers=1 + max(map(kinds.index, kinds)))
        meta = torch.device("meta")
        model = build_model(config, self.kernels, dtype=self.dtype, device=meta, policy=self.policy)
        for unit in model.tensor_map().units:
            unit.pack()
        places = int(self.layout.compresses)
        storage = CacheStorage(self.layout, num_pages=1, num_slots=1, num_compressed=places, device=meta)
        sampler = Sampler(self.kernels, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
        return ModelRunner(model, storage, sampler, self.kernels)

    def launch(self, steps: DummySteps) -> None:
        """Launches steps of all sizes, for whoever makes something else of a launch."""
        runner = self.runner()
        for output in steps.of_all_sizes():
            runner.launch(output)

    def compile(self, steps: DummySteps, executor: Executor) -> int:
        """Compiles what these steps launch, in `executor`, and loads it onto the device. Returns how many kernels."""
        from jamba_server.kernels.triton.launch import compile_launches  # imported where triton is installed

        return compile_launches(lambda: self.launch(steps), executor)


class Compilers(ThreadPoolExecutor):
    """Threads whose work can be called off. `shutdown(cancel_futures=True)` does so, too, but never wakes a thread that
    is in `as_completed` with such futures, as Triton's is."""

    _called_off = False

    def call_off(self) -> None:
        """What has not begun fails, and nothing more is taken."""
        self._called_off = True
        self.shutdown(wait=False)

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        def run() -> T:
            if self._called_off:
                raise CancelledError
            return fn(*args, **kwargs)

        return super().submit(run)


@contextmanager
def compiled_meanwhile(rehearsal: Rehearsal, steps: DummySteps) -> Generator[None]:
    """Compiles the kernels of `steps` in other threads during a `with` block, in which nobody else may launch one; its
    end waits for them. What is not compiled then, because an op does not run on the device "meta", will be when it is
    needed: that is told, but stops nobody."""
    started = time.monotonic()
    with Compilers(available_cpus()) as compilers, ThreadPoolExecutor(1) as stage:
        rehearsed = stage.submit(rehearsal.compile, steps, compilers)
        try:
            yield
            loaded = time.monotonic()
            error = rehearsed.exception()
        except BaseException:
            compilers.call_off()  # nobody waits for more than what is under way
            raise
    if error is not None:
        logger.warning("kernels are compiled when they are needed, not while the weights load: %r", error)
        return
    now = time.monotonic()
    seconds = (rehearsed.result(), now - started, now - loaded)
    logger.info("compiled %d kernels in %.1f s while the weights loaded, %.1f s longer than they did", *seconds)
