"""Device maps and stages: what each stage owns, and what is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.model_cache import cache_layout
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.parallel.device_map import check_kind, num_devices, read_device_map, stages_of_map
from jamba_server.engine.parallel.shards import Parts, Shard
from jamba_server.engine.parallel.stages import even_stages
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.start.rank_options import check_ranks, num_ranks, shard_of, stages_of
from jamba_server.engine.weight_sizes import rank_weight_bytes, weight_bytes, weight_matrices
from tests.geometries import write_geometry

LAYERS = 6


@pytest.fixture
def config(tmp_path: Path) -> JambaConfig:
    """Six layers, of which the fifth has attention."""
    return replace(load_model_config(write_geometry(tmp_path, "mini")), num_hidden_layers=LAYERS)


def mapped(*devices: int | str, **others: Any) -> dict[str, int | str]:
    """A map with the devices of the embedding, of each layer, of the last norm and of the head."""
    names = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(LAYERS)), "model.final_layernorm", "lm_head"]
    return dict(zip(names, devices, strict=True)) | others


def without(module: str) -> dict[str, int | str]:
    return {name: device for name, device in mapped(0, 0, 0, 0, 1, 1, 1, 1, 1).items() if name != module}


def test_stages_of_a_map(config: JambaConfig) -> None:
    stages = stages_of_map(mapped("cpu", 0, "cpu:0", 1, 1, "cpu:1", 2, "cpu:2", 2), config)
    assert [list(stage.layers) for stage in stages] == [[0, 1], [2, 3, 4], [5]]
    assert [str(stage) for stage in stages][1:] == ["stage 2 of 3 with layers 2 to 4", "stage 3 of 3 with layer 5"]
    everything: dict[str, int | str] = {"": 0}
    assert [list(stage.layers) for stage in stages_of_map(everything, config)] == [[0, 1, 2, 3, 4, 5]]
    longest = {"model": 0, "model.layers.5": 1, "model.final_layernorm": 1, "lm_head": 1}
    assert [len(stage.layers) for stage in stages_of_map(longest, config)] == [5, 1]
    inside = mapped(0, 0, 0, 0, 1, 1, 1, 1, 1)
    del inside["model.layers.2"]
    for module in ("mamba", "feed_forward", "input_layernorm", "pre_ff_layernorm"):
        inside[f"model.layers.2.{module}"] = 0
    assert [len(stage.layers) for stage in stages_of_map(inside, config)] == [3, 3]


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (mapped(0, 0, 0, 0, 1, 1, 1, 1, 1, **{"model.layers.2.mamba": 1}), "divides model.layers.2: .*mamba on"),
        (mapped(0, 0, 0, 0, 1, 1, 1, 1, 1, **{"model.layers.2.feed_forward.experts.3": 1}), "experts.3 on"),
        (without("model.layers.3"), "no device for model.layers.3"),
        (without("lm_head"), "no device for lm_head"),
        (mapped(0, 0, 1, 0, 1, 1, 1, 1, 1), "puts model.layers.2 on device 0, but model.layers.1, .* on device 1"),
        (mapped(0, 1, 1, 0, 0, 0, 0, 0, 0), "puts model.layers.2 on device 0, but model.layers.1"),
        (mapped(1, 1, 1, 1, 0, 0, 0, 0, 0), "puts model.embed_tokens on device 1; the first module"),
        (mapped(0, 0, 0, 0, 2, 2, 2, 2, 2), "puts model.layers.3 on device 2, but nothing on device 1"),
        (mapped(0, 1, 1, 1, 1, 1, 1, 1, 1), "puts model.embed_tokens on device 0, which has no layer"),
        (mapped(0, 0, 0, 0, 0, 0, 0, 0, 1), "puts lm_head on device 1, but the last layer on device 0"),
        (mapped(0, 0, 0, 0, 0, 0, 0, 1, 1), "puts model.final_layernorm on device 1, but the last layer"),
        (mapped(0, 0, 0, 0, 1, 1, 1, 1, 0), "puts lm_head on device 0, but model.final_layernorm"),
        (mapped(0, 0, 0, 0, 1, 1, 1, 1, 1, **{"model.layers.6": 1}), "'model.layers.6', which is no module"),
        (mapped(0, 0, 0, 0, 1, 1, 1, 1, 1, score=1), "'score', which is no module"),
        (mapped(0, 0, 0, 0, 1, 1, 1, 1, "disk"), "puts lm_head on 'disk'; a device is"),
        (mapped(0, 0, 0, 0, 1, 1, 1, 1, True), "puts lm_head on True; a device is"),
        (mapped(0, 0, 0, 0, "cuda:1", 1, 1, 1, "cpu"), "lm_head on a CPU and model.layers.3 on a GPU"),
    ],
)  # fmt: skip
def test_what_a_map_may_not_say(devices: dict[str, int | str], message: str, config: JambaConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        stages_of_map(devices, config)


def test_a_map_in_a_file(tmp_path: Path, config: JambaConfig) -> None:
    path, devices = tmp_path / "map.json", mapped(0, 0, 0, 0, "cuda:1", 1, 1, 1, 1)
    path.write_text(json.dumps(devices))
    assert read_device_map(path) == devices
    assert num_devices(devices) == 2
    check_kind(devices, "cuda")
    with pytest.raises(ConfigError, match=r"puts model.layers.3 on 'cuda:1', but the server runs on the device 'cpu'"):
        check_kind(devices, "cpu")
    path.write_text('["model"]')
    with pytest.raises(ConfigError, match="holds a JSON list"):
        read_device_map(path)
    with pytest.raises(ConfigError, match="device_map is '/nowhere'; there is no such file"):
        read_device_map(Path("/nowhere"))


def test_ranks_are_numbered_by_stages(tmp_path: Path) -> None:
    folder = str(write_geometry(tmp_path, "mini"))
    options = EngineConfig(model=folder, tensor_parallel_size=2, pipeline_parallel_size=3)
    assert num_ranks(options) == 6
    assert [shard_of(options, rank).rank for rank in range(6)] == [0, 1, 0, 1, 0, 1]
    stages = stages_of(options, load_model_config(tmp_path))
    assert [list(stage.layers) for stage in stages] == [[*range(10)], [*range(10, 21)], [*range(21, 32)]]
    check_ranks(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pipeline_parallel_size": 33}, "size is 33; it must be at least 1 and at most 32, the"),
        ({"pipeline_parallel_size": 0}, "pipeline_parallel_size is 0; it must be at least 1"),
        ({"pipeline_parallel_size": 2, "state_cache_host_bytes": 9}, "does not work with pipeline_parallel_size 2 yet"),
        ({"pipeline_parallel_size": 2, "async_scheduling": True}, "async_scheduling does not work with pipeline"),
        ({"pipeline_parallel_size": 2, "device_map": {"": 0}}, "size is 2, but device_map has 1 devices"),
        ({"device": "cpu", "device_map": {"": "cuda"}}, "the model on 'cuda', but the server runs on"),
    ],
)  # fmt: skip
def test_what_stages_cannot_do(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = EngineConfig(model=str(write_geometry(tmp_path, "mini")))
    with pytest.raises(ConfigError, match=message):
        check_ranks(msgspec.structs.replace(config, **options))


@pytest.mark.parametrize("name", ["mini", "large", "3b"])
@pytest.mark.parametrize(("stages", "size"), [(2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_weights_and_caches_of_stages_add_up(
    name: str, stages: int, size: int, quantization: Any, tmp_path: Path
) -> None:
    """Nothing is counted twice, but a head that is tied to the embedding needs its matrix on both ends."""
    config, policy = load_model_config(write_geometry(tmp_path, name)), QuantizationPolicy(quantization)
    owned = [
        Parts.of(config, Shard(rank, size), policy, stage)
        for stage in even_stages(config.num_hidden_layers, stages)
        for rank in range(size)
    ]
    total = sum(rank_weight_bytes(config, 2, parts=own, policy=policy) for own in owned)
    one = [Parts.of(config, Shard(rank, size), policy) for rank in range(size)]
    whole = sum(rank_weight_bytes(config, 2, parts=own, policy=policy) for own in one)
    copied = config.tie_word_embeddings and quantization is None
    assert total == whole + copied * 2 * config.vocab_size * config.hidden_size
    if size == 1:
        assert whole == weight_bytes(config, 2, policy=policy)
    for unit in ("page", "slot", "saved"):
        layouts = [[cache_layout(config, block_size=16, dtype="bfloat16", parts=p) for p in ps] for ps in (owned, one)]
        divided, together = (sum(layout.num_bytes(unit) for layout in group) for group in layouts)
        assert divided == together


def test_every_tensor_has_one_stage(config: JambaConfig) -> None:
    stages = even_stages(LAYERS, 4)
    names = [name for name, *_ in weight_matrices(config)] + ["model.final_layernorm.weight", "score.bias"]
    for name in names:
        assert sum(not stage.is_elsewhere(name) for stage in stages) == 1, name
    assert not any(stage.is_elsewhere("model.layers.99.mamba.D") or stage.is_elsewhere("other") for stage in stages)
