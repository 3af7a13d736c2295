"""EngineConfig: the options of the engine. The struct `types.EngineInfo` has the sizes that a running engine chose
within the limits that these options set."""

from __future__ import annotations

from typing import Literal

import msgspec

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Quantization = Literal["int8", "int4", "int4-g32", "fp8"]
ActivationQuantization = Literal["none", "int8"]
LoadFormat = Literal["auto", "dummy"]
Numa = Literal["auto", "none", "split"]
KvCacheDtype = Literal["auto", "fp8"]
StateCacheDtype = Literal["auto", "int8"]

# Number of prompt tokens whose log-probabilities are computed at a time. The limit keeps the memory for logits small.
# For 128 tokens and a vocabulary of 65,536 entries, the float32 logits take 32 MiB.
PROMPT_LOGITS_ROWS = 128


DISK_BYTES = 16 << 30  # default of the size of the prefix cache's disk tier


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the engine. An option that is a size is an upper bound: if that size does not fit into memory, the
    engine chooses a smaller one and adds a warning. If an option that is not a size cannot be satisfied, the engine
    does not start.

    `model` is a local folder or a GGUF file. Grammars use the tokenizer in the folder `tokenizer`, or the model's own
    tokenizer if `tokenizer` is None. For a size that is None the engine chooses the value. `kernels` maps an operation
    of `kernels.ops` (or "mamba", "attention", "moe" or "all" for a family) to an implementation in `kernels.table`.

    `activation_quantization` "int8" rounds the inputs of products with weights of 4 or 8 bits to 8 bits, "none" does
    not, and None does so where it is faster and the loss is small (`engine.start.activations`).

    A step computes at most `max_num_batched_tokens` prompt tokens, and at most `max_num_mixed_tokens` beside replies.
    `max_step_ms` limits the time of a step with replies on a CPU. It decides these two numbers where they are None. On
    a GPU, the second number is by default the first.

    `threads` is the number of threads of the CPU kernels, by default one for each processor that this process may use.
    `numa` "split" divides them and the weights among the memory nodes of the machine, "none" does not, and "auto" does
    where there are several (`engine.start.processors`).

    `cpu_memory_bytes` is the memory that weights, activations and caches may take on a CPU; None means all that is
    available. On a GPU it has no effect.

    `gpu_memory_utilization` is the fraction of the GPU's memory that may be in use, by this and all other processes. On
    a CPU the memory plan uses a fixed share. `enforce_eager` turns off graphs of steps. `async_scheduling`
    launches a step before the tokens of the last one are known; None means on a GPU only. It changes no token.

    `batch_invariant` asks for results that do not depend on batch, chunking or cache. None uses batch-invariant kernels
    where they exist, True raises an error where they do not exist, and False uses the fastest kernels. `kernels` takes
    precedence. `kv_cache_dtype` "fp8" stores keys and values as float8_e4m3fn without a scale, "auto" in the model's
    dtype. `state_cache_dtype` "int8" stores saved SSM states in one byte a number with a scale for each channel, so
    that prefix hits are not exact; "auto" stores them as running sequences do.

    `tensor_parallel_size` is the number of ranks, each a process, that divide every layer among each other.
    `tensor_parallel_exact` adds the parts of a sum in an order that is the same for 1, 2, 4 and 8 ranks; None means
    with more than one rank. `threads` is the number of CPU threads of each rank.
    `pipeline_parallel_size` is the number of stages among which the layers are divided, each with as many ranks.
    `device_map` says instead which modules each stage has (`engine.parallel.device_map`). The ranks are divided evenly
    among `nnodes` machines, in their order (`engine.nodes`).

    `state_cache_host_bytes` is the memory of the prefix cache's host tier, and `state_cache_disk_path` the folder of
    its disk tier, in which all servers together have at most `state_cache_disk_bytes`.
    """

    model: str
    tokenizer: str | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    quantize_mamba: bool = False
    activation_quantization: ActivationQuantization | None = None
    load_format: LoadFormat = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_num_mixed_tokens: int | None = None
    max_step_ms: int | None = None
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: KvCacheDtype = "auto"
    state_cache_memory_bytes: int | None = None
    state_cache_dtype: StateCacheDtype = "auto"
    state_cache_host_bytes: int = 0
    state_cache_disk_path: str | None = None
    state_cache_disk_bytes: int = DISK_BYTES
    block_size: int = 16
    gpu_memory_utilization: float = 0.92
    cpu_memory_bytes: int | None = None
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    enable_prefix_caching: bool = True
    enable_priority: bool = False
    tensor_parallel_size: int = 1
    tensor_parallel_exact: bool | None = None
    pipeline_parallel_size: int = 1
    device_map: dict[str, int | str] | None = None
    nnodes: int = 1
    seed: int = 0
    threads: int | None = None
    numa: Numa = "auto"
    batch_invariant: bool | None = None
    kernels: dict[str, str] = msgspec.field(default_factory=dict[str, str])
