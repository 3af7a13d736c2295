"""build_engine: from an EngineConfig to an EngineCore that can step."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from jamba_server.engine.batch import SampledTokens
from jamba_server.engine.cache.graph_sizes import GraphSizes
from jamba_server.engine.cache.manager import CacheManager
from jamba_server.engine.cache.spec import CacheSpec
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.core import EngineCore
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.graphs import CudaGraph, DecodeGraphs, why_no_graphs
from jamba_server.engine.model_config import JambaConfig, load_model_config, weight_bytes
from jamba_server.engine.model_runner import ModelRunner
from jamba_server.engine.models import Model, build_model
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.sampling.sampler import Sampler
from jamba_server.engine.scheduler import Scheduler
from jamba_server.engine.start.contents import StoredModel, read_model
from jamba_server.engine.start.kernel_choice import check_kernels
from jamba_server.engine.start.machine import available_cpus, available_memory
from jamba_server.engine.start.memory import CudaMemory, DeviceMemory, DummySteps, measure, usable_memory
from jamba_server.engine.start.memory_plan import Measured, MemoryPlan, check_sizes, plan_memory
from jamba_server.engine.start.rehearsal import Rehearsal, compiled_meanwhile
from jamba_server.engine.start.weights import dummy_weights, load_weights
from jamba_server.engine.types import EngineInfo
from jamba_server.kernels.cpu.graph import Arena, NativeGraph
from jamba_server.kernels.ops import Kernels
from jamba_server.kernels.table import select

OnProgress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its weights, and what it runs with."""

    model: Model
    sampler: Sampler
    kernels: Kernels
    policy: QuantizationPolicy
    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    warnings: tuple[str, ...] = ()

    def storage(self, num_pages: int, num_slots: int, block_size: int, num_compressed: int = 0) -> CacheStorage:
        return CacheStorage(
            self.model.config,
            num_pages=num_pages,
            num_slots=num_slots,
            num_compressed=num_compressed,
            block_size=block_size,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            device=self.device,
        )


def build_engine(config: EngineConfig, on_progress: OnProgress = lambda phase, fraction: None) -> EngineCore:
    """Loads the model and plans the memory. Raises ConfigError where a choice cannot be met."""
    started = time.monotonic()
    device = choose_device(config)
    stored = read_stored(config)
    model_config = stored.config
    if model_config.is_classifier:
        raise ConfigError(f"{config.model} is a {model_config.architecture}; serving classifiers is not supported yet.")
    dtype = choose_dtype(config, model_config)
    policy = QuantizationPolicy.of(config, model_config.fp8_roles, model_config.made_at_load)
    check_sizes(config)
    if device.type == "cpu":  # before the kernels are loaded: they take as many threads as torch
        torch.set_num_threads(available_cpus() if config.threads is None else config.threads)
    kernels = select(device.type, config.kernels, config.batch_invariant)
    check_kernels(config, dtype, device, kernels.names)
    planned = partial(
        plan_memory,
        model_config,
        config,
        dtype_bytes=dtype.itemsize,
        weight_bytes=weight_bytes(model_config, dtype.itemsize, policy=policy),
        device=device.type,
    )
    plan = planned(available_bytes=available_bytes(device, config))
    kv_dtype = dtype if config.kv_cache_dtype == "auto" else torch.float8_e4m3fn
    steps = dummy_steps(config, model_config, plan)
    rehearsal = Rehearsal(
        model_config, kernels, policy, dtype, kv_dtype, config.block_size, config.state_cache_dtype == "int8"
    )
    with compiled_meanwhile(rehearsal, steps) if rehearsal.is_for(device) else nullcontext():
        model = build_model(model_config, kernels, dtype=dtype, device=device, policy=policy)
        load(model, config, on_progress)
    sampler = Sampler(kernels, vocab_size=model_config.vocab_size, eos_token_ids=model_config.eos_token_ids)
    loaded = Loaded(model, sampler, kernels, policy, dtype, kv_dtype, device, stored.warnings)
    if device.type == "cuda":
        on_progress("measuring memory", 0.0)
        measured = measure_steps(loaded, steps, CudaMemory(device))
        plan = planned(available_bytes=plan.weight_bytes + available_bytes(device, config), measured=measured)
        on_progress("measuring memory", 1.0)
    return EngineCore(
        make_runner(loaded, config, plan),
        make_scheduler(config, model_config, plan, dtype_bytes=dtype.itemsize),
        make_info(loaded, config, plan, load_seconds=time.monotonic() - started),
    )


def read_stored(config: EngineConfig) -> StoredModel:
    """The configuration, as the weights have it where they are read."""
    folder = Path(config.model)
    return StoredModel(load_model_config(folder)) if config.load_format == "dummy" else read_model(folder)


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


def available_bytes(device: torch.device, config: EngineConfig) -> int:
    """Memory that weights and caches may take on `device` now."""
    if device.type == "cuda":
        return usable_memory(CudaMemory(device), config.gpu_memory_utilization)
    return available_memory()


def load(model: Model, config: EngineConfig, on_progress: OnProgress) -> None:
    if config.load_format == "dummy":
        dummy_weights(model, config.seed)
    else:
        phase = "loading weights" if config.quantization is None else "loading and quantizing weights"
        load_weights(model, Path(config.model), on_progress, phase=phase)


def dummy_steps(config: EngineConfig, model_config: JambaConfig, plan: MemoryPlan) -> DummySteps:
    """Of `plan`, or of one that has room for more sequences and longer ones."""
    trained = model_config.max_position_embeddings
    return DummySteps(
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_num_seqs=min(config.max_num_seqs, max(plan.max_num_batched_tokens, plan.max_num_seqs)),
        max_model_len=min(config.max_model_len or trained, trained),
        block_size=config.block_size,
    )


def measure_steps(loaded: Loaded, steps: DummySteps, memory: DeviceMemory) -> Measured:
    """What the largest of them take."""
    storage = loaded.storage(1, 1, steps.block_size)
    runner = ModelRunner(loaded.model, storage, loaded.sampler, loaded.kernels)
    return measure(lambda output: runner.launch(output).results(), steps, memory)


def make_runner(loaded: Loaded, config: EngineConfig, plan: MemoryPlan) -> ModelRunner:
    """With storage, graphs and what else `plan` and `config` ask for."""
    on_gpu, device = loaded.device.type == "cuda", loaded.device
    storage = loaded.storage(plan.num_pages, plan.num_slots, config.block_size, plan.num_compressed)
    graphs = None
    runs_ahead = on_gpu if config.async_scheduling is None else config.async_scheduling
    # On a CPU a step that runs ahead puts its tokens together with torch, which is in no graph.
    wanted = not config.enforce_eager and (on_gpu or not runs_ahead)
    if wanted and why_no_graphs(loaded.kernels.names, device.type) is None:
        sizes = GraphSizes(plan.max_num_seqs, plan.max_model_len, device.type)
        new_graph = partial(CudaGraph, torch.cuda.graph_pool_handle()) if on_gpu else partial(NativeGraph, Arena())
        graphs = DecodeGraphs(loaded.model, storage, sizes=sizes, new_graph=new_graph)
    sampled = SampledTokens(plan.max_num_seqs, device) if runs_ahead else None
    return ModelRunner(loaded.model, storage, loaded.sampler, loaded.kernels, graphs=graphs, sampled=sampled)


def make_info(loaded: Loaded, config: EngineConfig, plan: MemoryPlan, *, load_seconds: float) -> EngineInfo:
    model_config = loaded.model.config
    warnings = loaded.warnings + plan.warnings
    reason = None if config.enforce_eager else why_no_graphs(loaded.kernels.names, loaded.device.type)
    if reason is not None and set(loaded.kernels.names.values()) != {"reference"}:  # which is told already
        warnings += (f"no graphs of decoding steps: {reason}; enforce_eager asks for none",)
    return EngineInfo(
        architecture=model_config.architecture,
        num_parameters=model_config.num_parameters(),
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        quantization=loaded.policy.quantization,
        quantize_mamba=loaded.policy.mamba,
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        block_size=config.block_size,
        num_kv_blocks=plan.num_pages - 1,
        num_state_slots=plan.num_slots - 1,
        num_saved_states=plan.num_saved,
        state_cache_dtype=config.state_cache_dtype,
        weight_bytes=plan.weight_bytes,
        kv_bytes=plan.kv_bytes,
        state_bytes=plan.state_bytes,
        kernels=loaded.kernels.names,
        batch_dependent_ops=loaded.kernels.batch_dependent_ops,
        load_seconds=load_seconds,
        warnings=warnings,
    )


def make_scheduler(config: EngineConfig, model_config: JambaConfig, plan: MemoryPlan, *, dtype_bytes: int) -> Scheduler:
    spec = CacheSpec.wanted(model_config, config, dtype_bytes=dtype_bytes)
    # a regular state every four times as many tokens as have a state's size in KV (design, "where a state is saved")
    interval = -(-4 * spec.bytes_per_saved_state // spec.bytes_per_page) * config.block_size
    cache = CacheManager(
        num_pages=plan.num_pages,
        num_slots=plan.num_slots,
        num_compressed=plan.num_compressed,
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
