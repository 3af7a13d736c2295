"""Rehearsal: runs dummy steps on torch's device "meta" to find which GPU kernels the model needs, so that these kernels
are compiled while the weights are loaded.

Tensors on "meta" have no memory, but they have dtypes, shapes, strides and addresses (counted from 0). Triton
specialises a kernel only by these properties of its tensors. During a rehearsal, a kernel launch compiles the kernel
and does not run it (`kernels.triton.launch.compile_launches`). The same code launches the rehearsed and the real steps,
so there is no separate list of kernels to maintain.
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
from jamba_server.engine.grammar.masks import MaskFiller
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
    """Compiles the kernels that a model needs. Which kernels are needed depends only on the fields of this class and on
    the sizes of the steps."""

    config: JambaConfig
    kernels: Kernels
    policy: QuantizationPolicy
    dtype: torch.dtype
    layout: CacheLayout

    def is_for(self, device: torch.device) -> bool:
        """Returns whether there are kernels to compile, which is the case if the device is a GPU and some operation
        uses Triton."""
        return device.type == "cuda" and any(name.startswith("triton") for name in self.kernels.names.values())

    def runner(self) -> ModelRunner:
        """Returns a model runner on the device "meta". Its model has only the first layers of the real model, up to the
        first point where every kind of layer has occurred. Its cache has all layers, because the number of layers
        decides the strides of the cache tensors."""
        kinds = [(self.config.is_attention(i), self.config.is_moe(i)) for i in range(self.config.num_hidden_layers)]
        config = replace(self.config, num_hidden_layers=1 + max(map(kinds.index, kinds)))
        meta = torch.device("meta")
        model = build_model(config, self.kernels, dtype=self.dtype, device=meta, policy=self.policy)
        for unit in model.tensor_map().units:
            unit.pack()
        places = int(self.layout.compresses)
        storage = CacheStorage(self.layout, num_pages=1, num_slots=1, num_compressed=places, device=meta)
        sampler = Sampler(self.kernels, vocab_size=config.vocab_size, eos_token_ids=config.eos_token_ids)
        masks = MaskFiller(config.vocab_size, config.eos_token_ids, num_threads=1)
        return ModelRunner(model, storage, sampler, self.kernels, masks)

    def launch(self, steps: DummySteps) -> None:
        """Launches steps of all sizes. The caller must first have replaced kernel launches by compilation."""
        runner = self.runner()
        for output in steps.of_all_sizes():
            runner.launch(output)

    def compile(self, steps: DummySteps, executor: Executor) -> int:
        """Compiles the kernels that `steps` launch, in the threads of `executor`, and loads the kernels onto the
        device. Returns the number of kernels."""
        # This import is not at the top of the file, because the package triton might not be installed.
        from jamba_server.kernels.triton.launch import compile_launches

        return compile_launches(lambda: self.launch(steps), executor)


class Compilers(ThreadPoolExecutor):
    """A pool of threads whose queued work can be cancelled. The inherited method `shutdown(cancel_futures=True)` also
    cancels queued work. But it never wakes a thread that waits in the function `as_completed` for the cancelled
    futures, and Triton waits in this function."""

    _called_off = False

    def call_off(self) -> None:
        """Refuses further work at once. Work that is queued already is not run: it fails with CancelledError when a
        thread takes it from the queue."""
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
    """Compiles the kernels of `steps` in other threads while a `with` block runs, and waits for these threads at the
    end of the block. No other code may launch a kernel during the block. The rehearsal may fail, for example because an
    operation does not run on the device "meta". Then a warning is logged, and each kernel that is not compiled yet is
    compiled at its first use."""
    started = time.monotonic()
    with Compilers(available_cpus()) as compilers, ThreadPoolExecutor(1) as stage:
        rehearsed = stage.submit(rehearsal.compile, steps, compilers)
        try:
            yield
            loaded = time.monotonic()
            error = rehearsed.exception()
        except BaseException:
            compilers.call_off()  # the end of the block then waits only for kernels whose compilation has begun
            raise
    if error is not None:
        logger.warning("kernels could not be compiled while the weights load, and are at their first use: %r", error)
        return
    now = time.monotonic()
    seconds = (rehearsed.result(), now - started, now - loaded)
    logger.info("compiled %d kernels in %.1f s while the weights loaded, %.1f s longer than they did", *seconds)
