"""The simulator's fuzz with tiers."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from tests.engine.tiers.fuzz import EVENTS, run

# Where steps run ahead, some events are rare.
CASES = [(False, range(7)), (True, range(20)), pytest.param(False, range(20), marks=pytest.mark.nightly)]


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize(("ahead", "seeds"), CASES, ids=str)
def test_random_work(tmp_path: Path, ahead: bool, seeds: range) -> None:
    total: Counter[str] = Counter()
    for seed in seeds:
        total += run(seed, tmp_path / str(seed), ahead=ahead)
    assert {event for event in EVENTS if not total[event]} == set()
