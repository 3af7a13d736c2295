"""A model whose layers are divided among stages: the same bits as the whole model, and only its own weights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jamba_server.engine.batch import ForwardBatch
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.in_file import InFile
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.model_config import load_model_config
from jamba_server.engine.models import Model, build_model
from jamba_server.engine.parallel.shards import Parts
from jamba_server.engine.parallel.stages import Stage, even_stages
from jamba_server.engine.start.weights import dummy_weights, load_weights
from jamba_server.engine.weight_sizes import policy_of, rank_weight_bytes
from jamba_server.kernels.table import select
from tests.engine.feeding import BLOCK_SIZE, Feed, Feeder
from tests.engine.parallel.ranks import CPU
from tests.tiny import TINY_CONFIGS, oracle_logits, save_tiny

IDS = [(7 * i * i + 3 * i + 1) % 64 for i in range(24)]
FED_AT_ONCE = 19
PREQUANTIZED = Path(__file__).parents[2] / "data" / "prequantized"


class Chain:
    """The models of several stages, which hand hidden states to each other in this process. It takes the place of a
    whole model. The caches of stages are made when the cache of the whole model is first seen."""

    def __init__(self, models: list[Model], dtype: torch.dtype) -> None:
        self.config, self.dtype, self.parts = models[0].config, dtype, Parts.of(models[0].config)
        self.models, self._storages = models, list[CacheStorage]()

    def forward(self, batch: ForwardBatch, storage: CacheStorage) -> Tensor:
        sizes: dict[str, Any] = {"num_pages": len(storage.kv), "num_slots": storage.num_slots, "device": CPU}
        name = str(self.dtype).removeprefix("torch.")
        for model in self.models[len(self._storages) :]:
            layout = cache_layout(self.config, block_size=BLOCK_SIZE, dtype=name, parts=model.parts)
            self._storages.append(CacheStorage(layout, **sizes))
        hidden: Tensor | None = None
        for model, own in zip(self.models, self._storages, strict=True):
            hidden = model.forward(batch, own, hidden)
        assert hidden is not None
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.models[-1].logits(hidden)


def loaded(folder: Path, stage: Stage | None, dtype: torch.dtype = torch.float32, **settings: Any) -> Model:
    config, engine = load_model_config(folder), EngineConfig(model=str(folder), **settings)
    policy = policy_of(engine, config)
    model = build_model(config, select("cpu", {}), dtype=dtype, device=CPU, policy=policy, stage=stage)
    if engine.load_format == "dummy":
        dummy_weights(model, 0)
    else:
        load_weights(model, folder, lambda phase, fraction: None)
    return model


def logits(model: Any) -> Tensor:
    """The logits of a prompt and of some single tokens after it."""
    feeder = Feeder(model, dtype=model.dtype)
    sequence = feeder.new_sequence()
    first = feeder.step([Feed(sequence, IDS[:FED_AT_ONCE])])
    return torch.cat([*first, *(feeder.step([Feed(sequence, [token])])[0] for token in IDS[FED_AT_ONCE:])])


def staged(folder: Path, count: int, dtype: torch.dtype = torch.float32, **settings: Any) -> Tensor:
    stages = even_stages(load_model_config(folder).num_hidden_layers, count)
    return logits(Chain([loaded(folder, stage, dtype, **settings) for stage in stages], dtype))


@pytest.mark.parametrize("name", ["moe-gqa", "dense-mqa-tied", "moe-mha-top1-odd-periods", "conv2-dt-rank-auto"])
def test_stages_compute_the_bits_of_one(name: str, tmp_path: Path) -> None:
    oracle = save_tiny(tmp_path, **TINY_CONFIGS[name])
    one = logits(loaded(tmp_path, None))
    for count in (2, 3, 4):
        assert (staged(tmp_path, count) == one).all()
    expected = oracle_logits(oracle, IDS)
    assert (one - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("settings", [{}, {"quantization": "int8"}], ids=["plain", "int8"])
@pytest.mark.parametrize("name", ["moe-gqa", "dense-mqa-tied"])
def test_half_precision_and_quantised_weights(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(tmp_path, **TINY_CONFIGS[name])
    one = logits(loaded(tmp_path, None, torch.bfloat16, **settings))
    assert (staged(tmp_path, 2, torch.bfloat16, **settings) == one).all()
    dummies = {**settings, "load_format": "dummy"}
    one = logits(loaded(tmp_path, None, torch.bfloat16, **dummies))
    assert (staged(tmp_path, 3, torch.bfloat16, **dummies) == one).all()


def test_a_classifier(tmp_path: Path) -> None:
    save_tiny(tmp_path, architecture="JambaForSequenceClassification", num_labels=3)
    one = logits(loaded(tmp_path, None))
    assert one.shape == (len(IDS), 3)
    assert (staged(tmp_path, 2) == one).all()


@pytest.mark.parametrize("name", ["moe-gqa", "dense-mqa-tied"])
def test_a_stage_has_only_its_own_weights(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path, **TINY_CONFIGS[name])
    config = load_model_config(tmp_path)
    read: list[int] = []
    for kind in InFile.__subclasses__():
        for method in ("read", "read_into"):
            monkeypatch.setattr(kind, method, counted(getattr(kind, method), read))
    for stage in even_stages(config.num_hidden_layers, 3):
        read.clear()
        model = loaded(tmp_path, stage)
        assert 4 * sum(read) == rank_weight_bytes(config, 4, parts=model.parts)
    assert sum(read) < 0.6 * config.num_parameters(), "the last stage has two of four layers"


def counted(real: Any, read: list[int]) -> Any:
    """Returns a method that also counts the numbers that it has read."""

    def wrapped(self: InFile, *arguments: Any) -> Any:
        result = real(self, *arguments)
        read.append(torch.Size(self.shape).numel() if result is not False else 0)
        return result

    return wrapped


def test_a_tensor_of_no_stage_is_refused(tmp_path: Path) -> None:
    """Each stage refuses what is unknown of its own layers, and of the model outside of layers."""
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    first, last = even_stages(4, 2)
    for name, stages in (("model.layers.0.other.weight", [first]), ("model.layers.7.mamba.D", [first, last])):
        save_file(tensors | {name: torch.zeros(2)}, tmp_path / "model.safetensors")
        for stage in stages:
            with pytest.raises(CheckpointError, match=f"tensor {name} .* has no place in the model"):
                loaded(tmp_path, stage)


def test_stages_of_checkpoints_in_other_formats() -> None:
    """Matrices that other tools have quantised are read by the stage that has them."""
    folders = [path.parent for path in sorted(PREQUANTIZED.glob("*/config.json"))]
    assert folders
    for folder in folders[:: len(folders) // 2]:
        one = logits(loaded(folder, None))
        assert (staged(folder, 2) == one).all(), folder.name


def test_stages_follow_each_other() -> None:
    for count in range(1, 8):
        stages = even_stages(7, count)
        assert [layer for stage in stages for layer in stage.layers] == list(range(7))
        assert all(one.layers.stop == other.layers.start for one, other in pairwise(stages))
        assert max(len(s.layers) for s in stages) - min(len(s.layers) for s in stages) <= 1
