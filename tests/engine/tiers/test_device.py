"""What the tiers take from the device, for which model it holds, and which options they refuse."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from jamba_server.engine.cache.layout import CacheLayout, attention_cache, mamba_cache
from jamba_server.engine.cache.storage import CacheStorage
from jamba_server.engine.cache.tiers.segment import Entry, Segment, SegmentLayout
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.segment_mover import DeviceMover
from jamba_server.engine.start.fingerprint import WeightHash, fingerprint
from jamba_server.engine.start.tier_sizes import check_tiers, with_host_tier
from jamba_server.engine.start.tiers import check_folder
from jamba_server.kernels.table import select

LAYOUT = CacheLayout(
    4,
    (
        attention_cache(block_size=4, num_kv_heads=2, head_dim=3, dtype="bfloat16"),
        mamba_cache(d_inner=5, d_state=2, d_conv=4, dtype="bfloat16", compressed=False),
    ),
)
CPU = torch.device("cpu")


def storage() -> CacheStorage:
    found = CacheStorage(LAYOUT, num_pages=6, num_slots=4, device=CPU)
    for i, tensor in enumerate((found.kv, found.conv, found.ssm)):
        tensor.copy_(torch.arange(tensor.numel()).add(i + 1).view(tensor.shape))
    return found


def test_there_and_back() -> None:
    one, other = storage(), CacheStorage(LAYOUT, num_pages=6, num_slots=4, device=CPU)
    tensors = DeviceMover(one).read([4, 2], 7, 3)
    sizes = {name: data.nbytes for name, data in tensors.items()}
    assert sizes["kv"] + sizes["conv"] + sizes["ssm"] + 7 * 4 == SegmentLayout.of(LAYOUT).num_bytes(0, 7)
    segment = Segment(Entry(b"", b"", b"", b"", 0, 7, 0), array("q"), tensors)
    DeviceMover(other).write([(segment, [(1, 5), (0, 1)])], 2)
    assert torch.equal(other.kv[1], one.kv[4])
    assert torch.equal(other.kv[5, :, :, :3], one.kv[2, :, :, :3])
    assert torch.equal(other.conv[2], one.conv[3])
    assert torch.equal(other.ssm[2], one.ssm[3])
    assert not other.kv[[0, 2, 3, 4]].any(), "only these pages are written"


def test_what_a_page_had_of_another_text_is_not_kept() -> None:
    found = storage()
    before = found.kv.clone()
    kv = torch.frombuffer(DeviceMover(found).read([1, 2], 5, 0)["kv"], dtype=torch.bfloat16).view(2, 1, 2, 4, 2, 3)
    assert not kv[1, :, :, 1:].any()
    assert kv[1, :, :, :1].all()
    assert torch.equal(found.kv, before), "the device keeps what it has"


def test_a_segment_is_a_copy() -> None:
    found = storage()
    tensors = DeviceMover(found).read([1], 4, 1)
    before = {name: bytes(data) for name, data in tensors.items()}
    for tensor in (found.kv, found.conv, found.ssm):
        tensor.zero_()
    assert {name: bytes(data) for name, data in tensors.items()} == before


def test_the_fingerprint_changes_with_all_that_decides_the_bits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "jamba"}))
    weights = tmp_path / "model.safetensors"

    def found(levels: dict[str, str] | None = None, dtype: str = "bfloat16", **options: Any) -> str:
        config = EngineConfig(model=str(tmp_path), kernels=levels or {}, **options)
        kernels = select("cpu", config.kernels, None)
        return fingerprint(WeightHash(config).digest(), config, CPU, kernels, LAYOUT, {"dtype": dtype})

    weights.write_bytes(bytes(1000))
    first = found()
    assert found(max_num_seqs=3, threads=1, seed=5) == first, "these change no bit of a checkpoint's results"
    others = {found(dtype="float32"), found({"all": "reference"}), found({"linear": "cpu:portable"})}
    weights.write_bytes(bytes(999) + b"\1")
    others.add(found())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "jamba", "rms_norm_eps": 1e-5}))
    others |= {found(), found(load_format="dummy"), found(load_format="dummy", seed=1)}
    assert len(others - {first}) == 7


def test_weights_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be hashed"):
        WeightHash(EngineConfig(model=str(tmp_path))).digest()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"enable_prefix_caching": False, "state_cache_host_bytes": 1}, "needs enable_prefix_caching"),
        ({"state_cache_dtype": "int8", "state_cache_disk_path": "x"}, "state_cache_dtype 'int8' exclude each other"),
        ({"state_cache_host_bytes": -1}, "state_cache_host_bytes is -1"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        check_tiers(EngineConfig(model="", **options))


def test_a_host_tier_that_does_not_fit_is_shrunk() -> None:
    config, warnings = with_host_tier(EngineConfig(model="", state_cache_host_bytes=1000), 1200)
    assert config.state_cache_host_bytes == 600
    assert len(warnings) == 1
    assert with_host_tier(config, 1200) == (config, ())


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file cannot be made a folder"):
        check_folder(EngineConfig(model="", state_cache_disk_path=str(tmp_path / "file")))
