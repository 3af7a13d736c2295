"""EngineCore: everything that runs in the engine process, and the one function that is the engine: `step`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from engine.cache.manager import CacheManager
from engine.cache.spec import CacheSpec, MemoryPlan, available_cpus, available_memory, check_sizes, plan_memory
from engine.cache.storage import CacheStorage
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kernel_choice import check_kernels
from engine.model_config import JambaConfig, load_model_config, weight_bytes
from engine.model_runner import ModelRunner
from engine.models import Model, build_model
from engine.quantization import QuantizationPolicy
from engine.sampling.sampler import Sampler
from engine.scheduler import Scheduler
from engine.types import EngineInfo, Request, StepResult
from engine.weights import dummy_weights, load_weights
from kernels.table import select

OnProgress = Callable[[str, float], None]


class Inbox:
    """Requests and aborts on their way to the next step. The only part of the engine that other threads touch."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._submitted: dict[str, Request] = {}
        self._aborted: list[str] = []

    def submit(self, requests: list[Request]) -> None:
        with self._changed:
            self._submitted.update((request.id, request) for request in requests)
            self._changed.notify()

    def abort(self, request_ids: list[str]) -> None:
        with self._changed:
            # one that the scheduler has not seen yet must never reach it
            self._aborted += [i for i in request_ids if self._submitted.pop(i, None) is None]
            self._changed.notify()

    def submitted(self) -> list[Request]:
        with self._changed:
            requests, self._submitted = list(self._submitted.values()), {}
        return requests

    def aborted(self) -> list[str]:
        with self._changed:
            request_ids, self._aborted = self._aborted, []
        return request_ids

    def wait(self) -> None:
        """Blocks until something arrives."""
        with self._changed:
            self._changed.wait_for(lambda: self._submitted or self._aborted)

    def wake(self) -> None:
        """Ends a `wait` for good: an abort of nothing."""
        self.abort([""])


class EngineCore:
    """Loads the model, plans the memory, and steps. Raises ConfigError where a choice cannot be met."""

    def __init__(self, config: EngineConfig, on_progress: OnProgress = lambda phase, fraction: None) -> None:
        started = time.monotonic()
        device = choose_device(config)
        model_config = load_model_config(Path(config.model))
        if model_config.is_classifier:
            raise ConfigError(
                f"{config.model} is a {model_config.architecture}; serving classifiers is not supported yet."
            )
        dtype, policy = choose_dtype(config, model_config), QuantizationPolicy.of(config)
        check_sizes(config)
        if device.type == "cpu":  # before the kernels are loaded: they take as many threads as torch
            torch.set_num_threads(available_cpus() if config.threads is None else config.threads)
        kernels = select(device.type, config.kernels, config.exact)
        check_quantization(policy, kernels.names)
        check_kernels(config, dtype, device, kernels.names)
        plan = plan_memory(
            model_config,
            config,
            dtype_bytes=dtype.itemsize,
            weight_bytes=weight_bytes(model_config, dtype.itemsize, policy=policy),
            available_bytes=available_bytes(device),
            device=device.type,
        )
        model = build_model(model_config, kernels, dtype=dtype, device=device, policy=policy)
        load(model, config, on_progress)
        storage = make_storage(config, model_config, plan, dtype, device)
        sampler = Sampler(kernels, vocab_size=model_config.vocab_size, eos_token_ids=model_config.eos_token_ids)
        self.model_runner = ModelRunner(model, storage, sampler, kernels)
        self.scheduler = make_scheduler(config, model_config, plan, dtype_bytes=dtype.itemsize)
        self.inbox = Inbox()
        self.info = EngineInfo(
            architecture=model_config.architecture,
            num_parameters=model_config.num_parameters(),
            vocab_size=model_config.vocab_size,
            eos_token_ids=model_config.eos_token_ids,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            quantization=config.quantization,
            quantize_mamba=config.quantize_mamba,
            max_model_len=plan.max_model_len,
            max_num_seqs=plan.max_num_seqs,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            block_size=config.block_size,
            num_kv_blocks=plan.num_pages - 1,
            num_state_slots=plan.num_slots - 1,
            weight_bytes=plan.weight_bytes,
            kv_bytes=plan.kv_bytes,
            state_bytes=plan.state_bytes,
            kernels=kernels.names,
            inexact_ops=kernels.inexact_ops,
            load_seconds=time.monotonic() - started,
            warnings=plan.warnings,
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> StepResult:
        """Takes in what arrived, runs one batch, and says what came of it."""
        self.scheduler.abort(self.inbox.aborted())
        self.scheduler.add(self.inbox.submitted(), now=time.monotonic())
        output = self.scheduler.schedule(now=time.monotonic())
        results = self.model_runner.execute(output) if output.chunks else []
        updates = self.scheduler.update(output, results)
        return StepResult(updates, list(output.started), self.scheduler.stats)


def choose_device(config: EngineConfig) -> torch.device:
    """`auto` is the GPU where there is one."""
    if config.tensor_parallel_size != 1:
        raise ConfigError(f"tensor_parallel_size {config.tensor_parallel_size} is not supported yet; the limit is 1.")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but this torch sees no GPU. Use --device cpu or auto.")
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    return torch.device(name)


def choose_dtype(config: EngineConfig, model_config: JambaConfig) -> torch.dtype:
    """`auto` is the checkpoint's own."""
    name = model_config.dtype if config.dtype == "auto" else config.dtype
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def check_quantization(policy: QuantizationPolicy, names: Mapping[str, str]) -> None:
    """ConfigError where the kernels chosen (op -> implementation) take no quantised weights."""
    ops = [op for op in ("linear", "run_experts") if names[op] == "triton"]
    if policy.quantization is not None and ops:
        wishes = " ".join(f"--kernels {op}=reference" for op in ops)
        raise ConfigError(
            f"quantization {policy.quantization!r} is not supported by the triton kernels yet; leave it out, or add "
            f"{wishes}, which is slow."
        )


def available_bytes(device: torch.device) -> int:
    """Memory that weights and caches may take on `device` now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def load(model: Model, config: EngineConfig, on_progress: OnProgress) -> None:
    if config.load_format == "dummy":
        dummy_weights(model, config.seed)
    else:
        phase = "loading weights" if config.quantization is None else "loading and quantizing weights"
        load_weights(model, Path(config.model), on_progress, phase=phase)


def make_storage(
    config: EngineConfig, model_config: JambaConfig, plan: MemoryPlan, dtype: torch.dtype, device: torch.device
) -> CacheStorage:
    return CacheStorage(
        model_config,
        num_pages=plan.num_pages,
        num_slots=plan.num_slots,
        block_size=config.block_size,
        dtype=dtype,
        device=device,
        kv_dtype=None if config.kv_cache_dtype == "auto" else torch.float8_e4m3fn,
    )


def make_scheduler(config: EngineConfig, model_config: JambaConfig, plan: MemoryPlan, *, dtype_bytes: int) -> Scheduler:
    spec = CacheSpec.wanted(model_config, config, dtype_bytes=dtype_bytes)
    # a regular state every four times as many tokens as have a state's size in KV (design, "where a state is saved")
    interval = -(-4 * spec.bytes_per_slot // spec.bytes_per_page) * config.block_size
    cache = CacheManager(
        num_pages=plan.num_pages,
        num_slots=plan.num_slots,
        block_size=config.block_size,
        interval=interval,
        enabled=config.enable_prefix_caching,
    )
    return Scheduler(
        cache,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_model_len=plan.max_model_len,
        eos_token_ids=model_config.eos_token_ids,
    )
