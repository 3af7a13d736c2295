"""What a GPU can do, as measured, and what follows from it for a decode step and for a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from benchmarks import shapes
from jamba_server.engine.cache.spec import CacheSpec
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.model_config import JambaConfig, step_bytes
from jamba_server.engine.quantization import QuantizationPolicy

DTYPE_BYTES = 2  # bfloat16
COPIED, SIDE = 1 << 29, 8192  # numbers (2 GiB of float32), rows and columns


class Ceilings(msgspec.Struct, frozen=True):
    """Bytes a second that are read and written together; operations a second of a bfloat16 product."""

    bandwidth: float
    matmul: float


def median_seconds(work: Callable[[], object], device: str, milliseconds: int = 100) -> float:
    """Of many runs, on a GPU each from a cold L2 cache. Launches from Python are part of it."""
    if device == "cpu":
        return shapes.median_seconds(work, milliseconds / 1e3)
    from triton.testing import do_bench

    timing: Any = do_bench(work, warmup=milliseconds // 4, rep=milliseconds, return_mode="median")
    return timing / 1e3


def measure_ceilings(device: str) -> Ceilings:
    """A copy of 2 GiB, in which what is read and what is written both count, and a product of 8192 x 8192 x 8192, both
    of random numbers. On a CPU what `shapes` measures."""
    if device == "cpu":
        return Ceilings(shapes.read_bandwidth(), shapes.matmul_rate())
    try:
        return _gpu_ceilings(device)
    finally:
        torch.cuda.empty_cache()  # a server in another process wants this memory


def _gpu_ceilings(device: str) -> Ceilings:
    data = torch.randn(COPIED, device=device)
    target = torch.empty_like(data)
    bandwidth = 2 * data.nbytes / median_seconds(lambda: target.copy_(data), device)
    a, b = (torch.randn(SIDE, SIDE, device=device).bfloat16() for _ in range(2))
    return Ceilings(bandwidth, 2 * SIDE**3 / median_seconds(lambda: a @ b, device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The least that must be moved and computed."""

    bytes: float
    operations: float

    def seconds(self, ceilings: Ceilings) -> float:
        return max(self.bytes / ceilings.bandwidth, self.operations / ceilings.matmul)

    def bound(self, ceilings: Ceilings) -> str:
        """The ceiling that it meets first."""
        memory = self.bytes / ceilings.bandwidth >= self.operations / ceilings.matmul
        return "bandwidth" if memory else "matmul rate"


def decode_work(config: JambaConfig, policy: QuantizationPolicy, *, sequences: int, context: int) -> Work:
    """One step of `sequences`, a token each, after `context` tokens: it reads the weights, of the experts those that
    are expected to be chosen; it reads and writes every state; it reads keys and values."""
    spec = CacheSpec.of(cache_layout(config, block_size=16, dtype="bfloat16"))
    weights = step_bytes(config, DTYPE_BYTES, num_sequences=sequences, policy=policy)
    head = config.vocab_size * config.hidden_size
    keys = 4 * len(config.attention_layers) * config.num_attention_heads * config.head_dim * context
    return Work(
        bytes=weights + sequences * (2 * spec.bytes_per_slot + context * spec.kv_bytes_per_token),
        operations=sequences * (2 * (shapes.active_parameters(config) + head) + keys),
    )


def prefill_work(config: JambaConfig, policy: QuantizationPolicy, *, tokens: int, chunk: int) -> Work:
    """One prompt and its first token, `chunk` tokens a step: each step reads the weights, the keys and values before it
    and the state. Of the scan, which no matrix unit does, only the state counts."""
    spec = CacheSpec.of(cache_layout(config, block_size=16, dtype="bfloat16"))
    steps = -(-tokens // chunk)
    weights = step_bytes(config, DTYPE_BYTES, num_sequences=min(tokens, chunk), policy=policy)
    keys_read = sum(range(chunk, tokens, chunk)) + tokens
    # the causal half of all pairs of tokens, a product with the keys and one with the values
    width = len(config.attention_layers) * config.num_attention_heads * config.head_dim
    attention = 2 * width * tokens**2
    return Work(
        bytes=steps * (weights + 2 * spec.bytes_per_slot) + keys_read * spec.kv_bytes_per_token,
        operations=2 * shapes.active_parameters(config) * tokens + attention,
    )
