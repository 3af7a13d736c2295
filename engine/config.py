"""EngineConfig: what the engine is asked to be. Results (what it became) are in `types.EngineInfo`."""

from __future__ import annotations

from typing import Literal

import msgspec

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Quantization = Literal["int8", "int4", "fp8"]
LoadFormat = Literal["auto", "dummy"]
KvCacheDtype = Literal["auto", "fp8"]
StateCacheDtype = Literal["auto", "int8"]

# Prompt logits are computed in slices of so many rows: [128, V] in float32 is 32 MiB for V = 65,536.
PROMPT_LOGITS_ROWS = 128


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes are upper bounds, shrunk to what fits with one warning; choices that cannot be met are errors.

    `model` is a local folder. None leaves a size to the engine. Bytes are plain numbers. `kernels` maps an op of
    `kernels.ops` (or "mamba", "attention", "moe", "all" for a family) to an implementation of `kernels.table`.

    `gpu_memory_utilization` is the share of a GPU's memory that may be in use, by whomever; what a CPU's share is, the
    memory plan says. `enforce_eager` keeps the engine from recording graphs of its steps. `async_scheduling`
    launches a step before the tokens of the last one are known; None: on a GPU. It changes no token.

    `batch_invariant`: results do not depend on batch, chunking or cache. None: such kernels run where there are any;
    True: it is an error where there are none; False: the fastest run. What `kernels` names runs in any case.
    `kv_cache_dtype`: "fp8" stores keys and values as float8_e4m3fn without a scale, "auto" in the model's dtype.
    `state_cache_dtype`: "int8" keeps saved SSM states in a byte a number with a scale a channel, so that prefix-cache
    hits are not exact; "auto" as running sequences have them.
    """

    model: str
    device: Device = "auto"
    dtype: Dtype = "auto"
    quantization: Quantization | None = None
    quantize_mamba: bool = False
    load_format: LoadFormat = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: KvCacheDtype = "auto"
    state_cache_memory_bytes: int | None = None
    state_cache_dtype: StateCacheDtype = "auto"
    block_size: int = 16
    gpu_memory_utilization: float = 0.92
    enforce_eager: bool = False
    async_scheduling: bool | None = None
    enable_prefix_caching: bool = True
    enable_priority: bool = False
    tensor_parallel_size: int = 1
    seed: int = 0
    threads: int | None = None
    batch_invariant: bool | None = None
    kernels: dict[str, str] = msgspec.field(default_factory=dict[str, str])
