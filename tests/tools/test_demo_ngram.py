"""The n-gram model: its probabilities add up to 1, and those of a tiny text are the ones computed by hand."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "demo"


@pytest.fixture
def ngram(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("ngram")
    sys.modules.pop("ngram", None)


def test_probabilities_of_all_next_tokens_sum_to_one(ngram: ModuleType) -> None:
    random_ = random.Random(5)
    documents = [[0, *random_.choices(range(1, 9), weights=range(8, 0, -1), k=40)] for _ in range(30)]
    model = ngram.NGram(documents, order=5, vocab_size=12)
    contexts = [[0], [0, 3], documents[4][:9], documents[7][:30], [0, 11, 11, 11, 11], [0, 1, 2, 11, 1, 2]]
    for context in contexts:
        total = sum(float(model.probabilities([*context, token])[-1]) for token in range(12))
        assert total == pytest.approx(1, abs=1e-12)


def test_bigrams_by_hand(ngram: ModuleType) -> None:
    """After 0: 1 twice, 2 once. After 1: 2 twice. After 2: nothing."""
    model = ngram.NGram([[0, 1, 2], [0, 1, 2], [0, 2]], order=2, vocab_size=4)
    # Bigrams (0, 1), (0, 2), (1, 2) were seen 2, 1 and 2 times: once 1, twice 2, discount 1 / (1 + 2 * 2).
    # Before 1 stands one kind of token, before 2 two: counts 1 and 2, discount 1 / (1 + 2 * 1).
    third, fifth = 1 / 3, 1 / 5
    one, two = (1 - third) / 3 + third * 2 / 3 / 4, (2 - third) / 3 + third * 2 / 3 / 4
    assert model.probabilities([0, 1])[0] == pytest.approx((2 - fifth) / 3 + fifth * 2 / 3 * one)
    assert model.probabilities([0, 2])[0] == pytest.approx((1 - fifth) / 3 + fifth * 2 / 3 * two)
    assert model.probabilities([0, 2, 1])[1] == pytest.approx(one), "nothing is known after 2"
    assert model.probabilities([0, 3])[0] == pytest.approx(fifth * 2 / 3 * third * 2 / 3 / 4), "never seen"


def test_more_context_predicts_a_repeated_text_better(ngram: ModuleType) -> None:
    random_ = random.Random(6)
    period = random_.choices(range(1, 6), k=60)
    documents = [[0, *period[start:], *period[:start]] for start in range(0, 60, 3)]
    losses = [ngram.NGram(documents, order=order, vocab_size=6).nats([[0, *period]]) for order in (1, 3, 5)]
    assert losses[0] > losses[1] > losses[2]
