"""The engine on this CPU beside what the CPU can do: bandwidth and matmul rate are measured in the same run.

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.cpu --name cpu-shapes [--shapes small,moe,3b] [--dtype bfloat16]
        [--quantization int8 [--quantize-mamba]]

The variable is what the engine's own process sets: torch's threads would spin on cores that ours want.
Dummy weights, in-process, greedy, prompts of four tokens for decode. The limit of a decode step is the bytes of weights
that it must read, over the bandwidth; of prefill, the matmul rate over two operations per active parameter and token.
Writes benchmarks/results/NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import torch

from engine.llm import LLM
from engine.model_config import JambaConfig, load_model_config, step_bytes
from engine.quantization import FORMATS, QuantizationPolicy
from engine.types import SamplingParams
from server.bench.conditions import describe_machine, describe_versions, read_bandwidth, utc_now
from server.commands.terminal import describe_weights

RESULTS = Path(__file__).parent / "results"
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
CLIENTS = (1, 8, 16, 32)
PREFILL_TOKENS = 512


def best(work: Callable[[], object], times: int) -> float:
    """Seconds of the fastest run."""

    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return min(once() for _ in range(times))


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations a second of torch's own product, 512 x 2560 x 8192."""
    x, weight = torch.randn(512, 2560).to(dtype), torch.randn(8192, 2560).to(dtype)
    return 2 * 512 * 2560 * 8192 / best(lambda: torch.nn.functional.linear(x, weight), 10)


def active_parameters(config: JambaConfig) -> float:
    """Multiplied with every prompt token; the head only with the last."""
    return step_bytes(config, 4) / 4 - config.vocab_size * config.hidden_size


def measure(
    llm: LLM, config: JambaConfig, weights_read: Callable[[int], int], bandwidth: float, rate: float
) -> dict[str, Any]:
    """`weights_read`: bytes that a step of so many sequences reads."""
    random = Random(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[random.randrange(3, config.vocab_size) for _ in range(length)] for _ in range(count)]

    def generate(count: int, length: int, tokens: int) -> float:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        batch = prompts(count, length)
        start = time.perf_counter()
        llm.generate(list(batch), params)
        return time.perf_counter() - start

    generate(1, 4, 4)
    gc.collect()
    gc.freeze()  # as the engine's own process does
    steps = max(8, min(64, int(10 * bandwidth / weights_read(1))))
    decode: dict[str, Any] = {}
    for clients in CLIENTS:
        # the prompts' own step is taken off: a run of one token
        seconds = min(generate(clients, 4, steps + 1) for _ in range(2)) - generate(clients, 4, 1)
        limit = bandwidth / weights_read(clients) * clients
        decode[str(clients)] = {"tok_s": clients * steps / seconds, "limit_tok_s": limit}
    seconds = min(generate(1, PREFILL_TOKENS, 1) for _ in range(2))
    limit = rate / (2 * active_parameters(config))
    return {"decode": decode, "prefill": {"tok_s": PREFILL_TOKENS / seconds, "limit_tok_s": limit}}


def run_shape(shape: str, arguments: argparse.Namespace) -> dict[str, Any]:
    dtype = getattr(torch, arguments.dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(SHAPES[shape] | {"torch_dtype": arguments.dtype}))
        config = load_model_config(folder)
        bandwidth, rate = read_bandwidth(arguments.threads), matmul_rate(dtype)
        quantization = {"quantization": arguments.quantization, "quantize_mamba": arguments.quantize_mamba}
        sizes = {"threads": arguments.threads, "max_model_len": 1024, "max_num_seqs": 32}
        llm = LLM(folder, load_format="dummy", **quantization, **sizes)
        kernels = llm.core.info.kernels
        policy = QuantizationPolicy(arguments.quantization, arguments.quantize_mamba)

        def weights_read(num_sequences: int) -> int:
            return step_bytes(config, dtype.itemsize, num_sequences=num_sequences, policy=policy)

        result = measure(llm, config, weights_read, bandwidth, rate)
    return {
        "shape": shape,
        "parameters": config.num_parameters(),
        "bandwidth_gb_s": bandwidth / 1e9,
        "matmul_tflop_s": rate / 1e12,
        "kernels": kernels,
        **result,
    }


def table(results: list[dict[str, Any]]) -> str:
    head = "| shape | parameters | " + " | ".join(f"decode, {n}" for n in CLIENTS) + " | prefill 512 | read, matmul |"
    lines = [head, "| --- " * (len(CLIENTS) + 4) + "|"]

    def cell(value: dict[str, float]) -> str:
        return f"{value['tok_s']:,.1f} ({value['tok_s'] / value['limit_tok_s']:.0%})"

    for r in results:
        cells = [cell(r["decode"][str(n)]) for n in CLIENTS] + [cell(r["prefill"])]
        measured = f"{r['bandwidth_gb_s']:.0f} GB/s, {r['matmul_tflop_s']:.2f} TFLOP/s"
        lines.append(f"| {r['shape']} | {r['parameters'] / 1e6:,.0f} M | {' | '.join(cells)} | {measured} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the result files")
    parser.add_argument("--shapes", default="small,moe,3b")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--quantization", choices=list(FORMATS))
    parser.add_argument("--quantize-mamba", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: list[dict[str, Any]] = []
    for shape in arguments.shapes.split(","):
        results.append(run_shape(shape, arguments))
        print(table(results[-1:]), flush=True)
    conditions: dict[str, Any] = {
        "date": utc_now(),
        "machine": msgspec.to_builtins(describe_machine()),
        "versions": describe_versions(["torch", "numpy"]),
        "threads": arguments.threads,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "weights": describe_weights(arguments.dtype, arguments.quantization, arguments.quantize_mamba),
    }
    RESULTS.mkdir(exist_ok=True)
    report = {"conditions": conditions, "results": results}
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    text = f"# {arguments.name}\n\nOutput tok/s (share of the limit), {conditions['weights']}, "
    text += f"{arguments.threads} threads, {conditions['machine']['cpu']}, {conditions['date']}.\n\n{table(results)}\n"
    (RESULTS / f"{arguments.name}.md").write_text(text)


if __name__ == "__main__":
    main()
