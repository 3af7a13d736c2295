"""Measures how much 8-bit activations and quantised weights change the loss of the demonstration model.

    python -m benchmarks.cpu.activation_loss --name activation-loss --data FOLDER

FOLDER has the file tinystories-subset.txt.xz, whose last 141 stories the demonstration model was not trained on. The
loss is the mean number of bits per byte of these stories, each scored by itself with its end.

Larger models have a few channels that are far larger than all others. The demonstration model has none, so that the
program also measures copies of it in which such outliers were planted: the weights of the norms before the mixer and
the feed-forward layer are 128 times as large in three channels, and the weights that read these channels are 128 times
as small. The factor is a power of two, so that the copy is the same function. The program writes
benchmarks/results/NAME.md and NAME.json.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.cpu.engine import RESULTS
from benchmarks.http.serving import describe_commit
from jamba_server.engine.quantization import FORMATS
from jamba_server.engine.types import SamplingParams
from jamba_server.kernels.cpu.library import library
from jamba_server.llm import LLM
from jamba_server.server.cli.bench.conditions import describe_machine, describe_versions, utc_now
from jamba_server.server.demo import demo_folder

FILE, SEPARATOR, HELD_OUT = "tinystories-subset.txt.xz", "<|endoftext|>", 141
BOS, EOS = "<|startoftext|>", "<|endoftext|>"
CHANNELS, FACTOR = (17, 80, 145), 128.0
ACTIVATIONS = ("none", "int8")
WEIGHTS = (None, *(name for name in FORMATS if name != "fp8"))
# A quantised model is measured with both kinds of activations, a model with plain weights only with its own.
RUNS = [(weights, kind) for weights in WEIGHTS for kind in (ACTIVATIONS if weights else ("none",))]


def read_stories(folder: Path) -> list[str]:
    """Returns the stories that the demonstration model was not trained on."""
    with lzma.open(folder / FILE, "rt", encoding="utf8") as file:
        stories = [story.strip() for story in file.read().split(SEPARATOR)]
    return [story for story in stories if story][-HELD_OUT:]


def plant(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of the same model with large channels behind each norm of its layers."""
    channels = list(CHANNELS)

    def changed(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        if name.endswith(("input_layernorm.weight", "pre_ff_layernorm.weight")):
            tensor[channels] *= FACTOR
        elif name.endswith(tuple(f"{reader}.weight" for reader in READERS)):
            tensor[:, channels] /= FACTOR
        return tensor

    return {name: changed(name, tensor) for name, tensor in tensors.items()}


READERS = (
    *("mamba.in_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *("router", "gate_proj", "up_proj"),
)


def planted_folder(folder: Path) -> Path:
    """Writes the model with outliers to a new folder below `folder`, and returns the new folder."""
    target = folder / "planted"
    shutil.copytree(demo_folder(), target)
    save_file(plant(load_file(target / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


def loss(model: Path, stories: list[str], **settings: Any) -> float:
    """Returns the loss in bits per byte."""
    llm = LLM(model, device="cpu", dtype="bfloat16", max_num_batched_tokens=512, **settings)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    encoded = tokenizer.encode_batch([BOS + story + EOS for story in stories], add_special_tokens=False)
    scored = llm.generate(
        [item.ids for item in encoded],
        SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0),
        progress=False,
    )
    nats = -sum(entry.logprob for reply in scored for entry in reply.prompt_logprobs if entry is not None)
    return nats / math.log(2) / sum(len(story.encode()) for story in stories)


def measure(stories: list[str]) -> dict[str, dict[str, float]]:
    """Returns the loss of each model ("plain" or "planted"), by the format of the weights and of the activations."""
    with TemporaryDirectory() as folder:
        models = {"plain": demo_folder(), "planted": planted_folder(Path(folder))}
        results: dict[str, dict[str, float]] = {name: {} for name in models}
        for weights, kind in RUNS:
            for name, model in models.items():
                settings: dict[str, Any] = {"activation_quantization": kind} if weights else {}
                if weights:
                    settings |= {"quantization": weights, "quantize_mamba": True}
                results[name][f"{weights or 'bfloat16'}, {kind}"] = loss(model, stories, **settings)
                print(name, weights, kind, results[name][f"{weights or 'bfloat16'}, {kind}"], flush=True)
    return results


def table(results: dict[str, dict[str, float]]) -> str:
    """Returns a table with a row for each format of the weights."""
    lines = [
        "| weights | bits per byte | with 8-bit activations | their cost | with outliers: bits per byte "
        "| with 8-bit activations | their cost |",
        "| --- |" + " ---: |" * 6,
    ]
    for weights in WEIGHTS:
        name = weights or "bfloat16"
        cells = [name]
        for losses in results.values():
            plain, rounded = losses[f"{name}, none"], losses.get(f"{name}, int8")
            cells += [f"{plain:.4f}"]
            cells += ["", ""] if rounded is None else [f"{rounded:.4f}", f"{rounded - plain:+.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the result files, without extension")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with the file {FILE}")
    parser.add_argument("--stories", type=int, default=HELD_OUT, help="number of stories to score")
    arguments = parser.parse_args()
    stories = read_stories(arguments.data)[-arguments.stories :]
    results = measure(stories)
    machine, versions = describe_machine(), describe_versions(["torch"])
    conditions = {
        "date": utc_now(),
        "commit": describe_commit(),
        "cpu": machine.cpu,
        "level": library().level(),
        "threads": torch.get_num_threads(),
        "stories": len(stories),
        "versions": versions,
    }
    text = (
        f"# {arguments.name}\n\nBits per byte of the demonstration model on {len(stories)} stories that it was not "
        "trained on, in bfloat16, with all matrix products quantised that can be (`--quantize-mamba`). With outliers: "
        f"three channels behind each norm are {FACTOR:g} times as large, and the weights that read them are "
        f"{FACTOR:g} times as small.\n\n{table(results)}\n\n{conditions['level']}, {conditions['threads']} threads, "
        f"{conditions['cpu']}, {', '.join(f'{name} {version}' for name, version in versions.items())}, "
        f"{conditions['date']}, commit {conditions['commit']}.\n"
    )
    print(text)
    (RESULTS / f"{arguments.name}.md").write_text(text)
    report = {"conditions": conditions, "results": results}
    (RESULTS / f"{arguments.name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
