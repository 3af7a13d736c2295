"""The three shapes that the CPU is measured with, what a decode step of each must read, and what the machine can do."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.model_config import JambaConfig

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
}
GROUPS = {8: None, 4: 128}  # inputs that share a float32 scale, by bits; None: a whole row


@dataclass(frozen=True, slots=True)
class Format:
    """How weights are stored; `bits` 16 is bf16. Written as on the command line: `bf16`, `int8`, `int4+mamba`."""

    name: str
    bits: int
    mamba: bool

    @classmethod
    def parse(cls, name: str) -> Format:
        kind, _, mamba = name.partition("+")
        bits = {"bf16": 16, "int8": 8, "int4": 4}.get(kind)
        if bits is None or mamba not in ("", "mamba") or (mamba and bits == 16):
            raise SystemExit(f"format {name!r} must be bf16, int8 or int4, of the latter two also with +mamba.")
        return cls(name, bits, bool(mamba))

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of EngineConfig."""
        if self.bits == 16:
            return {"dtype": "bfloat16"}
        return {"dtype": "bfloat16", "quantization": f"int{self.bits}"} | (
            {"quantize_mamba": True} if self.mamba else {}
        )

    @property
    def flags(self) -> list[str]:
        """Those of `jamba serve`."""
        flags = ["--dtype", "bfloat16"]
        if self.bits < 16:
            flags += ["--quantization", f"int{self.bits}"]
        return flags + (["--quantize-mamba"] if self.mamba else [])

    def num_bytes(self, rows: int, inputs: int) -> int:
        """Of a quantised weight [rows, inputs] with its scales, or in bf16."""
        if self.bits == 16:
            return 2 * rows * inputs
        groups = -(-inputs // (GROUPS[self.bits] or inputs))
        return rows * (-(-inputs * self.bits // 8) + 4 * groups)


def write_config(shape: str, folder: Path) -> None:
    """`config.json`, all that dummy weights need."""
    (folder / "config.json").write_text(json.dumps(SHAPES[shape] | {"torch_dtype": "bfloat16"}))


def matrices(config: JambaConfig, num_sequences: int) -> Iterator[tuple[bool, float, int, int]]:
    """(is of a Mamba mixer, how many of them a decode step reads, rows, inputs) of the weights that formats store. Of
    the experts those that some sequence is expected to choose."""
    h, f, z = config.hidden_size, config.intermediate_size, config.head_dim
    attention, mamba = len(config.attention_layers), len(config.mamba_layers)
    moe = sum(config.is_moe(i) for i in range(config.num_hidden_layers))
    missed = (1 - config.num_experts_per_tok / config.num_experts) ** num_sequences
    mlps = config.num_hidden_layers - moe + moe * config.num_experts * (1 - missed)
    yield False, attention, (config.num_attention_heads + 2 * config.num_key_value_heads) * z, h
    yield False, attention, h, config.num_attention_heads * z
    yield False, mlps, 2 * f, h
    yield False, mlps, h, f
    yield False, 1, config.vocab_size, h
    yield True, mamba, 2 * config.d_inner, h
    yield True, mamba, h, config.d_inner


def weights_read(config: JambaConfig, num_sequences: int, stored: Format) -> float:
    """Bytes of weights that a decode step must read; of the embedding nothing to speak of."""
    plain = Format.parse("bf16")
    total = 0.0
    for of_mixer, count, rows, inputs in matrices(config, num_sequences):
        total += count * (stored if stored.mamba or not of_mixer else plain).num_bytes(rows, inputs)
    return total + 2 * _others(config)


def active_parameters(config: JambaConfig) -> float:
    """Multiplied with every prompt token; the head only with the last."""
    products = sum(count * rows * inputs for _, count, rows, inputs in matrices(config, 1))
    return products + _others(config) - config.vocab_size * config.hidden_size


def _others(config: JambaConfig) -> float:
    """Numbers in the norms, routers, convolutions and the small projections of the mixers."""
    all_hit = 1 << 30
    stored = sum(count * rows * inputs for _, count, rows, inputs in matrices(config, all_hit))
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return config.num_parameters() - embedding - stored


def median_seconds(run: Callable[[], object], budget: float) -> float:
    """Of as many runs as take `budget` seconds, at least three; one more warms up."""
    run()
    taken: list[float] = []
    end = time.perf_counter() + budget
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def read_bandwidth() -> float:
    """Bytes a second that all threads of torch read together, from 1 GiB."""
    data = torch.ones(1 << 28)
    return data.nbytes / median_seconds(data.sum, 0.5)


def matmul_rate() -> float:
    """Operations a second of torch's own product of bf16, 512 x 2560 x 8192."""
    x, weight = torch.randn(512, 2560).bfloat16(), torch.randn(8192, 2560).bfloat16()
    return 2 * 512 * 2560 * 8192 / median_seconds(lambda: torch.nn.functional.linear(x, weight), 0.5)


def resident_bytes(pid: int | str = "self") -> int:
    """Of one process, what it shares with others counted in full."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])
