"""`jamba plan` for a model whose layers are divided among stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.application import app
from tests.geometries import write_geometry
from tests.server.test_cli import invoke

GPU = ("--device", "cuda", "--memory", "141GiB")


def as_json(folder: Path, *flags: str) -> Any:
    return json.loads(invoke("plan", str(folder), *GPU, "--json", *flags))


def test_plan_of_stages(tmp_path: Path) -> None:
    """Mini in three stages of two processes: 10, 11 and 11 layers, of which 1, 2 and 1 have attention."""
    write_geometry(tmp_path, "mini")
    flags = ("--pipeline-parallel-size", "3", "--tensor-parallel-size", "2")
    report = as_json(tmp_path, *flags)
    stages, h, d = report["stages"], 4096, 8192
    assert [(stage["first_layer"], stage["last_layer"]) for stage in stages] == [(0, 9), (10, 20), (21, 31)]
    assert [stage["kv_bytes_per_token"] for stage in stages] == [2048 * layers for layers in (1, 2, 1)]
    state = d // 2 * (16 * 4 + 3 * 2)
    assert [stage["state_bytes_per_sequence"] for stage in stages] == [9 * state, 9 * state, 10 * state]
    assert [stage["bytes_to_next_stage"] for stage in stages] == [2 * h, 2 * h, 0]
    one = as_json(tmp_path, "--tensor-parallel-size", "2")
    assert sum(stage["weight_bytes"] for stage in stages) == one["weight_bytes"]
    assert report["weight_bytes"] == max(stage["weight_bytes"] for stage in stages)
    assert report["kv_bytes_per_token"] == 4096
    assert len({stage["kv_bytes"] // stage["kv_bytes_per_token"] for stage in stages}) == 1, "as many pages everywhere"
    assert len({stage["state_bytes"] // stage["state_bytes_per_sequence"] for stage in stages}) == 1
    assert report["ranks"] == 6
    assert "stage 3                 layers 21 to 31: weights 1" in invoke("plan", str(tmp_path), *flags, *GPU)
    (tmp_path / "map.json").write_text('{"model.embed_tokens": 0, "model.layers.0": 0, "model": 1}')
    with pytest.raises(ConfigError, match="device_map has no device for lm_head"):
        CliRunner().invoke(
            app, ["plan", str(tmp_path), "--device-map", str(tmp_path / "map.json"), *GPU], catch_exceptions=False
        )
    (tmp_path / "map.json").write_text('{"model.embed_tokens": 0, "model.layers.0": 0, "model": 1, "lm_head": 1}')
    report = as_json(tmp_path, "--device-map", str(tmp_path / "map.json"))
    assert [stage["last_layer"] for stage in report["stages"]] == [0, 31]
