"""Measures a GPU's memory bandwidth and matmul rate. Predicts, from this bandwidth and this rate, the time of a decode
step and the time of a prompt's prefill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from benchmarks import shapes
from jamba_server.engine.cache.spec import CacheSpec
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.weight_sizes import step_bytes

DTYPE_BYTES = 2  # size of a bfloat16 number in bytes
# To measure the memory bandwidth, COPIED float32 values (2 GiB) are copied. To measure the matmul rate, two square
# matrices with SIDE rows each are multiplied.
COPIED, SIDE = 1 << 29, 8192


class Ceilings(msgspec.Struct, frozen=True):
    """The measured limits of a device: its memory bandwidth and its rate of matrix multiplication.

    `bandwidth` is in bytes per second, reads and writes added. `matmul` is the rate of a large bfloat16 product in
    operations per second.
    """

    bandwidth: float
    matmul: float


def median_seconds(work: Callable[[], object], device: str, milliseconds: int = 100) -> float:
    """Returns the median number of seconds that a call of the function `work` takes. On a GPU, the L2 cache is cleared
    before each call.

    The time includes the time that Python takes to launch the kernels.
    """
    if device == "cpu":
        return shapes.median_seconds(work, milliseconds / 1e3)
    from triton.testing import do_bench

    timing: Any = do_bench(work, warmup=milliseconds // 4, rep=milliseconds, return_mode="median")
    return timing / 1e3


def measure_ceilings(device: str) -> Ceilings:
    """Measures the memory bandwidth and the rate of matrix multiplication of a device.

    On a GPU these are the rate of a copy of 2 GiB, where reads and writes both count, and of a product of the size
    8192 x 8192 x 8192, both with random numbers. On a CPU these are the rates that `benchmarks.shapes` measures.
    """
    if device == "cpu":
        return Ceilings(shapes.read_bandwidth(), shapes.matmul_rate())
    try:
        return _gpu_ceilings(device)
    finally:
        # returns this process's unused GPU memory to the GPU, because a server in another process may need this memory
        torch.cuda.empty_cache()


def _gpu_ceilings(device: str) -> Ceilings:
    data = torch.randn(COPIED, device=device)
    target = torch.empty_like(data)
    bandwidth = 2 * data.nbytes / median_seconds(lambda: target.copy_(data), device)
    a, b = (torch.randn(SIDE, SIDE, device=device).bfloat16() for _ in range(2))
    return Ceilings(bandwidth, 2 * SIDE**3 / median_seconds(lambda: a @ b, device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The least number of bytes that a computation must read and write, and the number of operations that it must
    do."""

    bytes: float
    operations: float

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.bytes / ceilings.bandwidth, self.operations / ceilings.matmul)

    def bound(self, ceilings: Ceilings) -> str:
        """Returns the limit of the device that determines how long this work takes: "bandwidth" or "matmul rate"."""
        memory = self.bytes / ceilings.bandwidth >= self.operations / ceilings.matmul
        return "bandwidth" if memory else "matmul rate"


def decode_work(config: JambaConfig, policy: QuantizationPolicy, *, sequences: int, context: int) -> Work:
    """Returns the number of bytes that a decode step must read and write, and the number of operations that it must do.

    The step decodes `sequences` sequences, which have `context` tokens each.

    The step reads all weights except those of experts that the router is not expected to choose. The step also reads
    and writes every sequence's Mamba state, and reads the keys and values.
    """
    spec = CacheSpec.of(cache_layout(config, block_size=16, dtype="bfloat16"))
    weights = step_bytes(config, DTYPE_BYTES, num_sequences=sequences, policy=policy)
    head = config.vocab_size * config.hidden_size
    keys = 4 * len(config.attention_layers) * config.num_attention_heads * config.head_dim * context
    return Work(
        bytes=weights + sequences * (2 * spec.bytes_per_slot + context * spec.kv_bytes_per_token),
        operations=sequences * (2 * (shapes.active_parameters(config) + head) + keys),
    )


def prefill_work(config: JambaConfig, policy: QuantizationPolicy, *, tokens: int, chunk: int) -> Work:
    """Returns the number of bytes that the prefill of one prompt must read and write, and the number of operations that
    it must do. The engine computes `chunk` tokens of the prompt in each step.

    Each step reads the weights and the keys and values of earlier tokens, and reads and writes the Mamba state. The
    operations of the selective scan are left out, because the matrix units do not compute the scan.
    """
    spec = CacheSpec.of(cache_layout(config, block_size=16, dtype="bfloat16"))
    steps = -(-tokens // chunk)
    weights = step_bytes(config, DTYPE_BYTES, num_sequences=min(tokens, chunk), policy=policy)
    keys_read = sum(range(chunk, tokens, chunk)) + tokens
    # In causal attention, about tokens**2 / 2 pairs of a query and a key are computed. For each pair, the dot product
    # of the query and the key takes 2 * width operations. Adding the weighted value takes another 2 * width operations.
    width = len(config.attention_layers) * config.num_attention_heads * config.head_dim
    attention = 2 * width * tokens**2
    return Work(
        bytes=steps * (weights + 2 * spec.bytes_per_slot) + keys_read * spec.kv_bytes_per_token,
        operations=2 * shapes.active_parameters(config) * tokens + attention,
    )
