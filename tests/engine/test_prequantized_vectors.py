"""Matrices that the packages themselves have quantised and packed: our loaders read the packages' numbers.

`tests/data/README.md` says which packages wrote the files. Each file has the tensors of one module `m`, the numbers
that the package dequantises them to as `expected`, and the settings as its metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from jamba_server.engine.prequantized.settings import Settings
from jamba_server.engine.prequantized.table import loader_of
from jamba_server.engine.start.quantized_folder import read_tensors
from jamba_server.engine.weight_files import header

FILES = sorted((Path(__file__).parents[1] / "data" / "prequantized").glob("*.safetensors"))
# These matrices are dequantised when they are loaded.
WITHOUT_FORMAT = ("gptq-4d-v1", "bitsandbytes-nf4-across-rows")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_numbers_are_those_of_the_package(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        values = json.loads(file.metadata()["settings"])
    settings = Settings(path, "quantization_config", values)
    loader = loader_of(settings)
    assert loader is not None
    tensors = header(path)
    expected_tensor = tensors.pop("expected")
    layout = loader.layout(settings, tensors)
    found = {read.name: read.loaded for read in read_tensors([path], layout)}
    assert set(found) == {"m.weight", "expected"}
    weight, expected = found["m.weight"], found["expected"]
    assert isinstance(expected, Tensor)
    assert isinstance(weight, Tensor) == (path.stem in WITHOUT_FORMAT)
    numbers = weight if isinstance(weight, Tensor) else weight.dequantized()
    assert tuple(numbers.shape) == expected_tensor.shape
    # Packages round in another order than scale * (number - zero) or scale * number + offset in float32.
    torch.testing.assert_close(numbers, expected, rtol=1e-6, atol=1e-6)


def test_every_method_has_files() -> None:
    assert {path.stem.partition("-")[0] for path in FILES} == {"awq", "bitsandbytes", "compressed", "gptq", "mlx"}
