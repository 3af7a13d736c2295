"""build_engine: creates an EngineCore, which is ready to run steps, from an EngineConfig."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jamba_server.engine.batch import SampledTokens
from jamba_server.engine.cache.graph_sizes import GraphSizes, table_bytes
from jamba_server.engine.cache.layout import CacheLayout
from jamba_server.engine.cache.spec import CacheSpec
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.cache.tiers.segment import SegmentLayout
from jamba_server.engine.config import ActivationQuantization, EngineConfig
from jamba_server.engine.core import EngineCore
from jamba_server.engine.device_tables import DeviceTables
from jamba_server.engine.disk_tier.worker import Worker
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.grammar.compiler import GrammarCompiler
from jamba_server.engine.grammar.masks import MaskFiller
from jamba_server.engine.graphs import CudaGraph, StepGraphs, captures_prompts, free_gpu_bytes, why_no_graphs
from jamba_server.engine.model_cache import wanted_layout
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.model_runner import ModelRunner
from jamba_server.engine.models import Model, build_model
from jamba_server.engine.parallel.pipe import Pipe
from jamba_server.engine.parallel.shards import Parts
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.sampling.sampler import Sampler
from jamba_server.engine.scheduler import Chunk, Scheduler
from jamba_server.engine.stage_runner import StageRunner
from jamba_server.engine.start.activations import int8_activations
from jamba_server.engine.start.contents import StoredModel, conversions, read_model
from jamba_server.engine.start.fingerprint import WeightHash, fingerprint
from jamba_server.engine.start.kernel_choice import check_kernels
from jamba_server.engine.start.machine import available_cpus, available_memory, release_free_memory
from jamba_server.engine.start.memory import CudaMemory, DeviceMemory, DummySteps, measure, usable_memory
from jamba_server.engine.start.memory_plan import Measured, MemoryPlan, bytes_per_row, check_sizes, plan_memory
from jamba_server.engine.start.parallel import Joined, agreed, alone, choose_device, of_rank
from jamba_server.engine.start.processors import choose_threads, find_processors
from jamba_server.engine.start.rank_options import check_options, ranks_per_node
from jamba_server.engine.start.rehearsal import Rehearsal, compiled_meanwhile
from jamba_server.engine.start.step_size import StepSize, choose_step_size, format_shares, measure_rates
from jamba_server.engine.start.tier_sizes import with_host_tier
from jamba_server.engine.start.tiers import check_folder, make_cache, make_worker
from jamba_server.engine.start.weights import dummy_weights, load_weights
from jamba_server.engine.types import EngineInfo
from jamba_server.engine.weight_sizes import policy_of, rank_weight_bytes, weight_bytes
from jamba_server.kernels.activations import with_int8_activations
from jamba_server.kernels.cpu.graph import Arena, NativeGraph
from jamba_server.kernels.cpu.library import library
from jamba_server.kernels.int8_activations import Kind
from jamba_server.kernels.ops import Kernels, KernelUnavailable
from jamba_server.kernels.table import select
from jamba_server.kernels.torch_ops import MAX_GATHERED_BYTES

logger = logging.getLogger(__name__)

OnProgress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its weights, and everything else that is needed to build a model runner."""

    model: Model
    pipe: Pipe
    sampler: Sampler
    masks: MaskFiller
    kernels: Kernels
    policy: QuantizationPolicy
    dtype: torch.dtype
    layout: CacheLayout
    device: torch.device
    warnings: tuple[str, ...] = ()
    int8_kinds: frozenset[Kind] = frozenset()  # the kinds of weights that are multiplied by 8-bit activations
    threads: str = ""

    @property
    def activation_quantization(self) -> ActivationQuantization:
        return "int8" if self.int8_kinds else "none"

    def storage(self, num_pages: int, num_slots: int, num_compressed: int = 0) -> CacheStorage:
        return CacheStorage(
            self.layout,
            num_pages=num_pages,
            num_slots=num_slots,
            num_compressed=num_compressed,
            device=self.device,
        )


def build_engine(
    config: EngineConfig, on_progress: OnProgress = lambda phase, fraction: None, joined: Joined | None = None
) -> EngineCore:
    """Loads the model, plans the memory and returns the engine. `on_progress` is called with the name of the current
    phase and the fraction of this phase that is done. If several ranks run the model, each of them calls this function
    with what it shares with the others. Raises ConfigError if an option cannot be satisfied."""
    started = time.monotonic()
    device = choose_device(config)
    check_options(config)
    stored = read_stored(config)
    model_config = stored.config
    joined = alone(config, model_config) if joined is None else joined
    dtype, policy = choose_dtype(config, model_config), policy_of(config, model_config)
    warnings = stored.warnings + conversions(model_config, policy, str(dtype).removeprefix("torch."))
    check_sizes(config)
    check_folder(config)
    parts = Parts.of(model_config, joined.group.shard, policy, joined.pipe.stage)
    config = of_rank(config)
    threads = start_threads(config, device)
    kernels, int8_kinds = choose_kernels(config, policy, dtype, device)
    step = choose_steps(config, model_config, policy, dtype, device, kernels)
    if step is not None:
        config = step.applied_to(config)
    layout = wanted_layout(model_config, config, parts)
    weight_size = rank_weight_bytes(model_config, dtype.itemsize, parts=parts, policy=policy)
    planned = planner(model_config, config, layout, weight_size, device, joined)
    plan = planned(available_bytes(device, config))
    config, more = with_host_tier(config, available_memory() - (device.type == "cpu") * plan.total_bytes)
    warnings += more
    gathered = gathered_tokens(model_config, dtype.itemsize) if kernels.names["attention_prefill"] == "torch" else 0
    steps = dummy_steps(config, model_config, plan, gathered)
    rehearsal = Rehearsal(model_config, kernels, policy, dtype, layout)
    # The grammar compiler reads the tokenizer in a thread of its own while the weights are loaded.
    compiler = GrammarCompiler(tokenizer_of(config), model_config.vocab_size, model_config.eos_token_ids)
    weights = None if config.state_cache_disk_path is None else WeightHash(config)
    with compiled_meanwhile(rehearsal, steps) if rehearsal.is_for(device) and parts.is_whole else nullcontext():
        model = build_model(model_config, kernels, dtype=dtype, device=device, policy=policy, **joined.build())
        load(model, config, on_progress)
        release_free_memory()
    sampler = Sampler(kernels, vocab_size=model_config.vocab_size, eos_token_ids=model_config.eos_token_ids)
    masks = MaskFiller(model_config.vocab_size, model_config.eos_token_ids, config.threads or available_cpus())
    own = model, joined.pipe, sampler, masks
    loaded = Loaded(*own, kernels, policy, dtype, layout, device, warnings, int8_kinds, threads)
    if device.type == "cuda":
        on_progress("measuring memory", 0.0)
        measured = measure_steps(loaded, steps, CudaMemory(device))
        plan = planned(plan.weight_bytes + available_bytes(device, config), measured)
        on_progress("measuring memory", 1.0)
    runner, worker = make_runner(loaded, config, plan), open_disk_tier(loaded, config, weights)
    if device.type == "cuda" and (reply := steps.reply()) is not None:
        capture(runner, reply, on_progress)
    core = EngineCore(
        runner,
        make_scheduler(loaded, config, plan, runner.storage, worker),
        make_info(loaded, config, plan, load_seconds=time.monotonic() - started, step_size=step and step.reason),
        compiler,
    )
    if worker is not None:
        worker.start(core.inbox.post)
    return core


def tokenizer_of(config: EngineConfig) -> Path:
    """Returns the path of the tokenizer, which is the model's if there is no other."""
    return Path(config.tokenizer or config.model)


def start_threads(config: EngineConfig, device: torch.device) -> str:
    """Starts the threads of the CPU kernels, and says how many there are and why. Returns "" for a GPU.

    The function must be called before the kernels are loaded: they use as many threads as torch is set to use at the
    time of loading. Raises ConfigError if the option numa cannot be satisfied or the system does not start so many
    threads.
    """
    if device.type != "cpu":
        if config.numa != "auto":
            raise ConfigError(f"numa {config.numa!r} is for CPUs; leave the option out on a GPU.")
        return ""
    threads = choose_threads(config.threads, config.numa, find_processors())
    torch.set_num_threads(threads.count)
    try:
        unbound = library().set_nodes(threads.nodes)
    except OSError as error:
        raise ConfigError(f"threads {threads.count} is too many: {error}.") from error
    except KernelUnavailable as error:  # `select` says which kernels run instead
        return f"{threads.count}, not divided among memory nodes: {error}" if len(threads.nodes) > 1 else threads.reason
    return threads.reason + (f"; {unbound} of them could not be bound to their node" if unbound else "")


def planner(
    model_config: JambaConfig,
    config: EngineConfig,
    layout: CacheLayout,
    weight_size: int,
    device: torch.device,
    joined: Joined,
) -> Callable[..., MemoryPlan]:
    """Returns a function that plans the memory of `available` bytes, perhaps with `measured` activations. All ranks of
    the engine must call the function, and get the same numbers of pages, slots, tokens and sequences."""

    def planned(available: int, measured: Measured | None = None) -> MemoryPlan:
        sizes: dict[str, Any] = {"weight_bytes": weight_size, "available_bytes": available, "device": device.type}
        return agreed(plan_memory(model_config, config, layout, **sizes, measured=measured), joined, device)

    return planned


def choose_kernels(
    config: EngineConfig, policy: QuantizationPolicy, dtype: torch.dtype, device: torch.device
) -> tuple[Kernels, frozenset[Kind]]:
    """Returns the kernels, and the kinds of weights that they multiply by 8-bit activations. Raises ConfigError or
    KernelError."""
    kernels = select(device.type, config.kernels, config.batch_invariant)
    check_kernels(config, dtype, device, kernels.names)
    kinds = int8_activations(config, policy, dtype, device, kernels.names)
    return with_int8_activations(kernels, kinds) if kinds else kernels, kinds


def choose_steps(
    config: EngineConfig,
    model: JambaConfig,
    policy: QuantizationPolicy,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Kernels,
) -> StepSize | None:
    """Returns the numbers of prompt tokens in a step if the time of a step decides them. Raises ConfigError if
    max_step_ms is given for a GPU."""
    if device.type == "cpu":
        shares, weight_size = format_shares(model, policy), weight_bytes(model, dtype.itemsize, policy=policy)
        measure = partial(measure_rates, kernels, dtype, shares, model, weight_size)
        return choose_step_size(config, model, policy, dtype, measure)
    if config.max_step_ms is not None:
        raise ConfigError("max_step_ms is for CPUs; on a GPU, max_num_batched_tokens limits a step.")
    return None


def read_stored(config: EngineConfig) -> StoredModel:
    """Returns the model's configuration. Unless the weights are dummies, the headers of the weight files are read to
    correct the configuration and to add warnings."""
    folder = Path(config.model)
    return StoredModel(load_model_config(folder)) if config.load_format == "dummy" else read_model(folder)


def choose_dtype(config: EngineConfig, model_config: JambaConfig) -> torch.dtype:
    """Returns the dtype of weights and activations. The option value "auto" means the dtype that config.json names."""
    name = model_config.dtype if config.dtype == "auto" else config.dtype
    return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]


def available_bytes(device: torch.device, config: EngineConfig) -> int:
    """Returns how many bytes of memory on `device` are available at this moment for weights, activations and caches
    together."""
    if device.type == "cuda":
        return usable_memory(CudaMemory(device), config.gpu_memory_utilization)
    allowed = available_memory() if config.cpu_memory_bytes is None else config.cpu_memory_bytes
    # The ranks on a CPU share its memory.
    return min(allowed, available_memory()) // ranks_per_node(config)


def load(model: Model, config: EngineConfig, on_progress: OnProgress) -> None:
    if config.load_format == "dummy":
        dummy_weights(model, config.seed)
    else:
        phase = "loading weights" if config.quantization is None else "loading and quantizing weights"
        load_weights(model, Path(config.model), on_progress, phase=phase)


def dummy_steps(config: EngineConfig, model_config: JambaConfig, plan: MemoryPlan, gathered: int = 0) -> DummySteps:
    """Returns the dummy steps, which run once so that their memory is measured and their kernels are compiled.

    The argument `plan` is preliminary, because it is based on an estimate of the memory. The plan made after the
    measurement may allow more or longer sequences. The dummy steps are as large as the largest steps of both plans.
    Attention copies the keys and values of at most `gathered` tokens.
    """
    trained = model_config.max_position_embeddings
    return DummySteps(
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_num_seqs=min(config.max_num_seqs, max(plan.max_num_batched_tokens, plan.max_num_seqs)),
        max_model_len=min(config.max_model_len or trained, trained),
        block_size=config.block_size,
        kind="classify" if model_config.is_classifier else "generate",
        gathered_tokens=gathered,
    )


def gathered_tokens(model_config: JambaConfig, item_bytes: int) -> int:
    """Returns the largest number of tokens whose keys and values torch's flash attention copies."""
    return MAX_GATHERED_BYTES // (2 * model_config.num_key_value_heads * model_config.head_dim * item_bytes)


def measure_steps(loaded: Loaded, steps: DummySteps, memory: DeviceMemory) -> Measured:
    """Runs the largest dummy steps and returns how much memory these steps needed."""
    storage = loaded.storage(1, 1)
    runner = new_runner(loaded, storage)
    return measure(lambda output: runner.launch(output).results(), steps, memory)


def make_runner(loaded: Loaded, config: EngineConfig, plan: MemoryPlan) -> ModelRunner:
    """Returns the model runner, with the cache storage, graphs and asynchronous scheduling that `plan` and `config`
    ask for."""
    on_gpu, device = loaded.device.type == "cuda", loaded.device
    storage = loaded.storage(plan.num_pages, plan.num_slots, plan.num_compressed)
    graphs, tables = None, None
    if on_gpu and table_bytes(plan.max_num_seqs, plan.max_model_len, config.block_size):
        tables = DeviceTables(plan.max_num_seqs, -(-plan.max_model_len // config.block_size), device)
    # The stages of a pipeline have several steps in flight, none of which needs tokens that only the device knows.
    runs_ahead = on_gpu and loaded.pipe.stage.count == 1
    runs_ahead = runs_ahead if config.async_scheduling is None else config.async_scheduling
    # On a CPU, asynchronous scheduling rules out graphs: a step that is launched before the previous step has finished
    # gathers its input tokens with a torch operation. A CPU graph can replay only this project's own kernels.
    wanted = not config.enforce_eager and (on_gpu or not runs_ahead)
    # The graphs do not include what ranks exchange, and no graph of this project adds sections.
    wanted = wanted and loaded.model.parts.is_whole
    if wanted and why_no_graphs(loaded.kernels.names, device.type) is None:
        names = loaded.kernels.names
        sizes = GraphSizes(
            plan.max_num_seqs, plan.max_model_len, device.type, mixed=captures_prompts(names, device.type)
        )
        graphs = StepGraphs(
            loaded.model,
            storage,
            sizes=sizes,
            new_graph=partial(CudaGraph, torch.cuda.graph_pool_handle()) if on_gpu else partial(NativeGraph, Arena()),
            tables=tables,
            free_bytes=free_gpu_bytes if on_gpu else None,
            bytes_per_row=bytes_per_row(loaded.model.config),
        )
    sampled = SampledTokens(plan.max_num_seqs, device) if runs_ahead else None
    return new_runner(loaded, storage, graphs=graphs, sampled=sampled, tables=tables)


def new_runner(loaded: Loaded, storage: CacheStorage, **settings: Any) -> ModelRunner:
    """Returns a model runner, or that of a stage if there are several. `settings` are arguments of `ModelRunner`."""
    parts = loaded.model, storage, loaded.sampler, loaded.kernels, loaded.masks
    if loaded.pipe.stage.count > 1:
        return StageRunner(loaded.pipe, *parts, **settings)
    return ModelRunner(*parts, **settings)


def capture(runner: ModelRunner, reply: Chunk, on_progress: OnProgress) -> None:
    """Captures the graphs of decode steps before the first request. `reply` is a dummy chunk that decodes."""
    on_progress("capturing graphs", 0.0)
    started = time.monotonic()
    count = runner.capture_graphs(reply)
    logger.info("captured %d CUDA graphs in %.1f s", count, time.monotonic() - started)
    on_progress("capturing graphs", 1.0)


def make_info(
    loaded: Loaded, config: EngineConfig, plan: MemoryPlan, *, load_seconds: float, step_size: str | None = None
) -> EngineInfo:
    model_config = loaded.model.config
    warnings = loaded.warnings + plan.warnings
    reason = None if config.enforce_eager else why_no_graphs(loaded.kernels.names, loaded.device.type)
    # If all operations use reference kernels, there is no warning about graphs, because the field `kernels` of the
    # result shows already that no fast kernel is used.
    if reason is not None and set(loaded.kernels.names.values()) != {"reference"}:
        warnings += (f"decode steps run without graphs: {reason}; set enforce_eager to hide this warning",)
    segment = SegmentLayout.of(loaded.layout) if config.state_cache_disk_path is not None else None
    return EngineInfo(
        architecture=model_config.architecture,
        num_parameters=model_config.num_parameters(),
        vocab_size=model_config.vocab_size,
        eos_token_ids=model_config.eos_token_ids,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        quantization=loaded.policy.quantization,
        quantize_mamba=loaded.policy.mamba,
        activation_quantization=loaded.activation_quantization,
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_num_mixed_tokens=plan.max_num_mixed_tokens,
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
        step_size=step_size or "",
        threads=loaded.threads,
        hidden_size=model_config.hidden_size,
        labels=model_config.labels if model_config.is_classifier else (),
        problem_type=model_config.problem_type,
        pad_token_id=model_config.pad_token_id,
        tensor_parallel_size=config.tensor_parallel_size,
        tensor_parallel_exact=loaded.model.parts.shard.exact,
        pipeline_parallel_size=loaded.model.parts.stage.count,
        segment_page={} if segment is None else {**segment.page},
        segment_state={} if segment is None else {**segment.state},
    )


def make_scheduler(
    loaded: Loaded, config: EngineConfig, plan: MemoryPlan, storage: CacheStorage, worker: Worker | None
) -> Scheduler:
    # All ranks save states at the same places, so the interval depends on the layout of the whole model.
    spec = CacheSpec.of(wanted_layout(loaded.model.config, config))
    # The interval between regularly saved states is chosen so that one saved state takes at most a quarter of the
    # memory of the KV pages in the interval.
    interval = -(-4 * spec.bytes_per_saved_state // spec.bytes_per_page) * config.block_size
    return Scheduler(
        make_cache(config, plan, storage, loaded.layout, worker=worker, interval=interval),
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens,
        max_num_mixed_tokens=plan.max_num_mixed_tokens,
        max_model_len=plan.max_model_len,
        eos_token_ids=loaded.model.config.eos_token_ids,
        num_stages=loaded.model.parts.stage.count,
    )


def open_disk_tier(loaded: Loaded, config: EngineConfig, weights: WeightHash | None) -> Worker | None:
    """Returns the threads of the disk tier, which have not started yet, or None if there is no such tier."""
    if weights is None:
        return None
    choices = {
        "dtype": str(loaded.dtype),
        "quantization": str(loaded.policy),
        "activations": sorted(loaded.int8_kinds),
    }

    def found() -> str:
        return fingerprint(weights.digest(), config, loaded.device, loaded.kernels, loaded.layout, choices)

    return make_worker(config, loaded.layout, found)
