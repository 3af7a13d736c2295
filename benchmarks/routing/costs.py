"""Computes what a million tokens cost, how many saved states fit on a disk, and what a hand-over of a conversation
sends, from one GPU to 10,000.

    python -m benchmarks.routing.costs --name costs [--price 3.0]

Nothing is measured: the numbers follow from the sizes of the models and from the assumptions that the page names.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.gpu.predict import Ceilings, decode_work, prefill_work
from benchmarks.http.record import table
from benchmarks.http.serving import RESULTS, describe_commit
from benchmarks.shapes import SHAPES, Format
from jamba_server.engine.cache.spec import CacheSpec
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.parallel.shards import Parts, Shard
from jamba_server.engine.weight_sizes import rank_weight_bytes

# The rates and the memory of an H100 of 80 GB that `benchmarks/results/gpu-predictions.md` assumes.
GPU = Ceilings(bandwidth=3.0e12, matmul=650e12)
MEMORY, USED_SHARE = 80e9, 0.92  # bytes of a GPU, and the share of them that the server uses (--gpu-memory-utilization)
ACTIVATIONS = 2e9  # bytes of a GPU that are kept free for activations
MOST_SEQUENCES = 256
# The shares of the limits of the GPU that decode and prefill reach. These are targets, which no measurement has shown
# yet.
DECODE_SHARE, PREFILL_SHARE = 0.7, 0.5
CONTEXT, CHUNK = 8192, 8192  # tokens of a sequence that decodes, and of a prompt and its chunks
NETWORKS = {"25 Gbit/s": 25e9 / 8, "400 Gbit/s": 400e9 / 8}  # bytes a second
LARGE = SHAPES["mini"] | {
    "hidden_size": 8192,
    "intermediate_size": 24576,
    "num_hidden_layers": 72,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "mamba_dt_rank": 512,
}
MODELS = {"3B": SHAPES["3b"], "Mini": SHAPES["mini"], "Large": LARGE}
# Model, format of the weights, and the number of GPUs of a replica.
SHAPE_ROWS = (("3B", "bf16", 1), ("3B", "int8", 1), ("Mini", "int8", 1), ("Mini", "bf16", 2), ("Large", "int8", 8))
FLEETS = (1, 8, 64, 1000, 10_000)


@dataclass(frozen=True, slots=True)
class Replica:
    """A copy of a model on `gpus` GPUs. `sequences` of CONTEXT tokens fit beside the weights, MOST_SEQUENCES at most.
    The rates are tokens a second of the whole replica, at the assumed shares of the limits."""

    model: str
    form: str
    gpus: int
    sequences: int
    decode_rate: float
    prefill_rate: float

    def dollars(self, rate: float, price: float) -> float:
        """Returns the price of a million tokens in dollars, at `price` dollars for a GPU and hour."""
        return price * self.gpus / 3600 / rate * 1e6


def config_of(model: str) -> JambaConfig:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_bytes(msgspec.json.encode(MODELS[model] | {"torch_dtype": "bfloat16"}))
        return load_model_config(Path(folder))


def sizes_of(config: JambaConfig) -> CacheSpec:
    return CacheSpec.of(cache_layout(config, block_size=16, dtype="bfloat16"))


def replica(model: str, form: str, gpus: int) -> Replica:
    config, policy = config_of(model), Format.parse(form).policy
    parts = Parts.of(config, Shard(0, gpus, False), policy)
    spec = CacheSpec.of(cache_layout(config, block_size=16, dtype="bfloat16"))
    free = MEMORY * USED_SHARE - ACTIVATIONS - rank_weight_bytes(config, 2, parts=parts, policy=policy)
    # KV heads and channels of the states are divided among the GPUs; the 3B model, with one KV head, runs on one GPU.
    each = (spec.bytes_per_slot + CONTEXT * spec.kv_bytes_per_token) / gpus
    sequences = min(MOST_SEQUENCES, int(free / each))
    together = Ceilings(GPU.bandwidth * gpus, GPU.matmul * gpus)
    step = decode_work(config, policy, sequences=sequences, context=CONTEXT).seconds(together)
    prefill = prefill_work(config, policy, tokens=CONTEXT, chunk=CHUNK).seconds(together)
    return Replica(model, form, gpus, sequences, DECODE_SHARE * sequences / step, PREFILL_SHARE * CONTEXT / prefill)


def cost_table(replicas: list[Replica], price: float) -> str:
    header = ("model", "weights", "GPUs", "sequences", "output tokens/s", "$ for 1M", "prompt tokens/s", "$ for 1M")
    rows = [
        (
            r.model, r.form, r.gpus, r.sequences,
            f"{r.decode_rate:,.0f}", f"{r.dollars(r.decode_rate, price):.3f}",
            f"{r.prefill_rate:,.0f}", f"{r.dollars(r.prefill_rate, price):.3f}",
        )
        for r in replicas
    ]  # fmt: skip
    return table(header, rows)


def state_table(replicas: list[Replica]) -> str:
    """Sizes of conversations, and the time of sending one beside that of computing it again."""
    rates = {r.model: r.prefill_rate for r in replicas}
    rows: list[tuple[object, ...]] = []
    for model in MODELS:
        spec = sizes_of(config_of(model))
        for tokens in (CONTEXT, 16 * CONTEXT):
            size = spec.bytes_per_saved_state + tokens * spec.kv_bytes_per_token
            times = [f"{1000 * size / rate:,.1f}" for rate in NETWORKS.values()]
            states = f"{1e12 / spec.bytes_per_saved_state:,.0f}"
            again = f"{1000 * tokens / rates[model]:,.0f}"
            rows.append((model, f"{tokens:,}", states, f"{1e12 / size:,.0f}", f"{size / 1e6:,.0f}", *times, again))
    networks = [f"ms at {name}" for name in NETWORKS]
    header = ("model", "tokens", "states in 1 TB", "conversations in 1 TB", "MB of a hand-over", *networks)
    return table((*header, "ms to compute the prompt"), rows)


def fleet_table(replicas: list[Replica], price: float) -> str:
    rows: list[tuple[object, ...]] = []
    for gpus in FLEETS:
        cells: list[str] = []
        for r in replicas:
            count = gpus // r.gpus
            cells.append(f"{count:,}: {count * r.decode_rate * 86400 / 1e9:,.2f}" if count else "-")
        rows.append((f"{gpus:,}", f"{gpus * price:,.0f}", *cells))
    return table(("GPUs", "$ an hour", *(f"{r.model} {r.form}" for r in replicas)), rows)


def to_markdown(name: str, price: float) -> str:
    replicas = [replica(*row) for row in SHAPE_ROWS]
    large = config_of("Large").num_parameters() / 1e9
    return f"""# {name}

Computed by `python -m benchmarks.routing.costs --name {name} --price {price:g}`, commit {describe_commit()}.
**Nothing here was measured.** Assumed are:

* GPUs of {MEMORY / 1e9:g} GB, {GPU.bandwidth / 1e12:g} TB/s and {GPU.matmul / 1e12:g} TFLOP/s in bfloat16, at
  {price:g} dollars an hour each, which are busy all the time;
* {DECODE_SHARE:.0%} of the limit for replies and {PREFILL_SHARE:.0%} for prompts, which are targets and no results;
* no time for exchanges between GPUs;
* {USED_SHARE:.0%} of the memory used, of which {ACTIVATIONS / 1e9:g} GB for activations, and as many sequences of
  {CONTEXT:,} tokens at a time as fit, but {MOST_SEQUENCES} at most.

Large has {large:.0f} billion parameters.

## A million tokens

* Dollars for a million tokens = dollars an hour of a GPU * GPUs / 3600 / tokens a second * 1,000,000.
* Tokens a second = share of the limit * sequences / seconds of a step.
* Seconds of a step = the longer of bytes read / bandwidth and operations / rate.

{cost_table(replicas, price)}
A prompt token that is read from the prefix cache costs nothing of this but the copy of a state. With a hit rate h, the
price of a prompt token is multiplied by 1 - h.

## States and hand-overs

A conversation is one saved state and the keys and values of its tokens, in bfloat16. A hand-over to another machine
sends both. The last column is the time in which the last replica of this model in the first table computes the prompt
again, at its rate for {CONTEXT:,} tokens.

{state_table(replicas)}
## From one GPU to 10,000

Number of replicas, and billions of output tokens a day of all together. This is plain multiplication: it assumes that
every replica is busy, and that prefixes are found as on one ([routing](routing.md) simulates what routing costs).

{fleet_table(replicas, price)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result file, without extension")
    parser.add_argument("--price", type=float, default=3.0, help="dollars for a GPU and hour")
    flags: Any = parser.parse_args()
    page = to_markdown(flags.name, flags.price)
    (RESULTS / f"{flags.name}.md").write_text(page)
    sys.stdout.write(page)


if __name__ == "__main__":
    main()
