"""Exact over tiers and restarts: the real engine against one that caches nothing, compared with `==`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.tiers.conversations import TIERS, Cold, Player, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiers") / "model")


@pytest.fixture(scope="module")
def cold(model: Path) -> Cold:
    return Cold(model)


@pytest.mark.parametrize("kind", TIERS)
def test_random_conversations(kind: str, model: Path, cold: Cold, tmp_path: Path) -> None:
    player = Player(model, kind, tmp_path / "disk", seed=TIERS.index(kind))
    player.play(12, cold)
    counts = player.counts
    assert counts["turns"] > 10
    assert kind not in ("host", "both") or counts["host"] > 0
    assert kind not in ("disk", "both") or counts["disk"] > 0
