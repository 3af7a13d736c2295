"""Defines the benchmarks' model shapes and weight formats.

It also computes or measures the upper bounds that memory bandwidth and the rate of matrix products set on a CPU.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jamba_server.engine.config import Quantization
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.quantization import FORMATS, QuantizationPolicy
from jamba_server.engine.weight_sizes import step_bytes
from jamba_server.kernels.cpu.library import library
from jamba_server.kernels.cpu.library import read_bandwidth as library_bandwidth
from jamba_server.kernels.cpu.linear import Packer
from jamba_server.kernels.ops import KernelUnavailable
from jamba_server.server.cli.bench import conditions

BANDWIDTH_SECONDS = 0.5

BASE: dict[str, Any] = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_hidden_layers": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 262144,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SHAPES: dict[str, dict[str, Any]] = {
    "small": BASE
    | {"vocab_size": 32768, "hidden_size": 512, "intermediate_size": 1024, "num_experts": 8}
    | {"num_attention_heads": 8, "num_key_value_heads": 2},
    "moe": BASE
    | {"vocab_size": 65536, "hidden_size": 2048, "intermediate_size": 5120, "num_experts": 16}
    | {"num_attention_heads": 16, "num_key_value_heads": 4},
    "3b": BASE
    | {"vocab_size": 65536, "hidden_size": 2560, "intermediate_size": 8192, "num_experts": 1, "num_experts_per_tok": 1}
    | {"num_hidden_layers": 28, "attn_layer_period": 14, "attn_layer_offset": 7, "tie_word_embeddings": True}
    | {"num_attention_heads": 20, "num_key_value_heads": 1, "mamba_dt_rank": 160},
    # This is the shape of all versions of AI21-Jamba-Mini: 51.6 billion parameters, of which a token uses 12.1 billion.
    "mini": BASE
    | {"vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 14336, "num_experts": 16}
    | {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "mamba_dt_rank": 256},
    # The tests of the benchmark programs use this small shape, which no model has.
    "tiny": BASE
    | {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_experts": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
}


@dataclass(frozen=True, slots=True)
class Format:
    """The format in which a model's weights are stored: `bf16`, or a quantised format such as `int8`.

    `+mamba` after a quantised format means that the Mamba layers' matrices are quantised, too.
    """

    name: str
    policy: QuantizationPolicy

    @classmethod
    def parse(cls, name: str) -> Format:
        kind, _, mamba = name.partition("+")
        by_name: Mapping[str, Quantization | None] = {"bf16": None, **{known: known for known in FORMATS}}
        if mamba not in ("", "mamba") or kind not in by_name or (mamba and kind == "bf16"):
            known = ", ".join(FORMATS)
            raise SystemExit(f"Format {name!r} must be bf16 or one of {known}, the latter also followed by +mamba.")
        return cls(name, QuantizationPolicy(by_name[kind], bool(mamba)))

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the fields of the class EngineConfig that select this weight format."""
        quantized = {"quantization": self.policy.quantization, "quantize_mamba": self.policy.mamba}
        return {"dtype": "bfloat16"} | quantized

    @property
    def flags(self) -> list[str]:
        """Returns the options of the command `jamba serve` that select this weight format."""
        quantized = ["--quantization", self.policy.quantization] if self.policy.quantization else []
        return ["--dtype", "bfloat16", *quantized, *(["--quantize-mamba"] if self.policy.mamba else [])]


def write_config(shape: str, folder: Path) -> None:
    """Writes the `config.json` of a model shape to `folder`. A model with dummy weights needs no other file."""
    (folder / "config.json").write_text(json.dumps(SHAPES[shape] | {"torch_dtype": "bfloat16"}))


def weights_read(config: JambaConfig, num_sequences: int, stored: Format) -> int:
    """Returns the size in bytes of the weights that a decode step must read.

    The embedding is left out, because a step reads only one row of it per sequence.
    """
    return step_bytes(config, 2, num_sequences=num_sequences, policy=stored.policy)


def active_parameters(config: JambaConfig) -> float:
    """Returns the number of parameters that the computation of one prompt token uses.

    The output head is left out, because only the last token of a prompt needs logits.
    """
    return step_bytes(config, 4) / 4 - config.vocab_size * config.hidden_size


def median_seconds(run: Callable[[], object], budget: float) -> float:
    """Returns the median time of a call of the function `run` in seconds.

    After one call to warm up, `run` is called for `budget` seconds, and at least three times.
    """
    run()
    taken: list[float] = []
    end = time.perf_counter() + budget
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def read_bandwidth() -> float:
    """Measures the memory bandwidth for reads in bytes per second, with as many threads as torch uses.

    The compiled library reads memory that the caches do not hold, and prefetches at several distances. The best
    distance gives the result. Without the library, numpy reads the memory.
    """
    try:
        native, memory = library(), Packer().memory(conditions.uncached_size())
    except KernelUnavailable:
        return conditions.read_bandwidth(torch.get_num_threads())
    return library_bandwidth(native, memory.fill_(1), BANDWIDTH_SECONDS)


def matmul_rate() -> float:
    """Measures the matmul rate in operations per second: torch's bfloat16 product of [512, 2560] and [2560, 8192]."""
    x, weight = torch.randn(512, 2560).bfloat16(), torch.randn(8192, 2560).bfloat16()
    return 2 * 512 * 2560 * 8192 / median_seconds(lambda: torch.nn.functional.linear(x, weight), 0.5)


def resident_bytes(pid: int | str = "self") -> int:
    """Returns the size of a process's resident memory in bytes. Memory shared with other processes counts in full."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])
