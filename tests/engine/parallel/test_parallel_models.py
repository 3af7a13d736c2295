"""A model on 1, 2 and 4 ranks: the same bits in exact mode, and what transformers computes in both modes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.models import build_model
from jamba_server.engine.parallel.group import Group
from jamba_server.engine.parallel.shards import Shard
from jamba_server.engine.start.weights import dummy_weights, load_weights
from jamba_server.engine.weight_sizes import policy_of
from jamba_server.kernels.table import select
from tests.engine.feeding import Feed, Feeder
from tests.engine.parallel.ranks import CPU, on_ranks
from tests.engine.test_exact import CONFIG
from tests.tiny import TINY_CONFIGS, oracle_logits, save_tiny

# With these tokens, no router has two experts with nearly equal logits, of which another order of summation may choose
# the other one.
IDS = [(9 * i * i + 5 * i + 2) % 64 for i in range(24)]
FED_AT_ONCE = 19


def logits(folder: Path, group: Group, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Tensor:
    """The logits of a prompt and of some single tokens after it."""
    config = EngineConfig(model=str(folder), **settings)
    model_config = load_model_config(folder)
    model = build_model(
        model_config, select("cpu", config.kernels), dtype=dtype, device=CPU, policy=policy_of(config, model_config),
        group=group,
    )  # fmt: skip
    if config.load_format == "dummy":
        dummy_weights(model, 0)
    else:
        load_weights(model, folder, lambda phase, fraction: None)
    feeder = Feeder(model, dtype=dtype)
    sequence = feeder.new_sequence()
    first = feeder.step([Feed(sequence, IDS[:FED_AT_ONCE])])
    return torch.cat([*first, *(feeder.step([Feed(sequence, [token])])[0] for token in IDS[FED_AT_ONCE:])])


def on_all(size: int, folder: Path, *, exact: bool = True, **settings: Any) -> Tensor:
    """The logits of `size` ranks, which must be equal."""
    first, *others = on_ranks(size, lambda group: logits(folder, group, **settings), exact=exact)
    assert all((other == first).all() for other in others)
    return first


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_ranks_compute_the_bits_of_one(name: str, tmp_path: Path) -> None:
    oracle = save_tiny(tmp_path, **TINY_CONFIGS[name])
    one = on_all(1, tmp_path)
    for size in (2, 4):
        assert (on_all(size, tmp_path) == one).all()
    expected = oracle_logits(oracle, IDS)
    for found in (one, on_all(2, tmp_path, exact=False)):
        assert (found - expected).abs().max() <= 1e-4 * expected.std()


def test_eight_ranks(tmp_path: Path) -> None:
    save_tiny(tmp_path, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=3)
    assert (on_all(8, tmp_path) == on_all(1, tmp_path)).all()


FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float16": {"dtype": torch.float16},
    "reference": {"kernels": {"all": "reference"}},
    "amx": {"kernels": {"linear": "cpu:amx-emulated"}},
    "int8": {"quantization": "int8", "quantize_mamba": True},
    "int4-g32": {"quantization": "int4-g32", "quantize_mamba": True},
    "fp8": {"quantization": "fp8"},
}


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str, tmp_path: Path) -> None:
    """The sizes are multiples of no power of two, or have groups of 32 that eight sections cannot share evenly."""
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 5, "head_dim": 32}))
    settings: dict[str, Any] = {"load_format": "dummy", "dtype": torch.bfloat16, **FORMATS[form]}
    one, two = (on_all(size, tmp_path, **settings) for size in (1, 2))
    assert (one == two).all()
    plain = on_ranks(1, lambda group: logits(tmp_path, group, **settings), exact=False)[0]
    # Where two experts are nearly equal, the last bits may choose the other one, so that single tokens differ more.
    assert 0 < (one - plain).abs().median() <= 0.02 * plain.std()
    if "quantization" in settings:  # the numbers of the weights are the same, as float32 shows
        settings["dtype"] = torch.float32
        found, expected = (
            on_ranks(1, lambda group: logits(tmp_path, group, **settings), exact=exact)[0] for exact in (True, False)
        )
        assert (found - expected).abs().max() <= 1e-4 * expected.std()


def test_many_rows_are_added_by_all_ranks(tmp_path: Path) -> None:
    """Sums of many rows are exchanged in another way than sums of few rows, with the same result."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.randn(8, 301, 192, generator=generator)
    expected = sums[0]
    for part in sums[1:]:
        expected = expected + part

    def add(group: Group) -> Tensor:
        each = 8 // group.shard.size
        own = sums[group.shard.rank * each : (group.shard.rank + 1) * each]
        whole = group.add_sections(own.contiguous(), torch.bfloat16)
        few = torch.cat([group.add_sections(rows.contiguous(), torch.bfloat16) for rows in own.split(100, dim=1)])
        assert (whole == few).all()
        return whole

    for size in (1, 2, 4):
        assert all((found == expected.bfloat16()).all() for found in on_ranks(size, add))


@pytest.mark.parametrize("fused", [False, True])
def test_a_rank_reads_its_part_of_a_checkpoint(fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a checkpoint that stores the experts of a layer in two tensors."""
    save_tiny(tmp_path, num_experts=4)
    if fused:
        _fuse_experts(tmp_path)
    whole = on_all(1, tmp_path)
    read = list[int]()
    real = torch.Tensor.copy_

    def copy(self: Tensor, source: Tensor, *args: Any) -> Tensor:
        read.append(source.numel())
        return real(self, source, *args)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    config = load_model_config(tmp_path)
    group = Group(Shard(0, 4, exact=True), object())  # loading plain weights exchanges nothing
    model = build_model(config, select("cpu", {}), dtype=torch.float32, device=CPU, group=group)
    load_weights(model, tmp_path, lambda phase, fraction: None)
    assert sum(read) < config.num_parameters() / 3
    monkeypatch.undo()
    assert (on_all(2, tmp_path) == whole).all()


def _fuse_experts(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    prefixes = {name.split("experts.")[0] + "experts." for name in tensors if ".experts." in name}
    for prefix in prefixes:
        parts = {
            kind: torch.stack([tensors.pop(f"{prefix}{e}.{kind}_proj.weight") for e in range(4)])
            for kind in ("gate", "up", "down")
        }
        tensors[f"{prefix}gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        tensors[f"{prefix}down_proj"] = parts["down"]
    save_file(tensors, folder / "model.safetensors")
