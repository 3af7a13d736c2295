"""Writes checkpoints with random weights, for benchmarks that need files: of loading, of conversions, of GGUF files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.http.shapes import write_tokenizer
from benchmarks.shapes import SHAPES, write_config
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.models import build_model
from jamba_server.engine.start.weights import fill_unit
from jamba_server.engine.weight_files import INDEX_FILE
from jamba_server.kernels.table import select

CPU = torch.device("cpu")


def write_checkpoint(shape: str, folder: Path) -> None:
    """Writes a checkpoint in bfloat16 of the model shape `shape` to the empty folder `folder`, with a tokenizer of the
    shape's number of tokens. The numbers are those of `--load-format dummy`. The whole model is in memory meanwhile."""
    write_config(shape, folder)
    write_tokenizer(SHAPES[shape]["vocab_size"], folder)
    model = build_model(load_model_config(folder), select("cpu", {}), dtype=torch.bfloat16, device=CPU)
    files: dict[str, str] = {}
    tensor_map = model.tensor_map()
    for number, unit in enumerate(tensor_map.units):
        fill_unit(unit, 0, CPU, tensor_map.drawn)  # the weights are not packed, because the files have them as they are
        file = f"model-{number:05}.safetensors"
        tensors = {name: destination.tensor.contiguous() for name, destination in unit.destinations.items()}
        save_file(tensors, folder / file)
        files |= dict.fromkeys(unit.destinations, file)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": files}))
