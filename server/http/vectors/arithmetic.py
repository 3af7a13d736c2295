"""Turns the model's numbers into embeddings and probabilities. All functions compute in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]


def unit_vector(numbers: Numbers, size: int | None = None) -> Numbers:
    """Returns the first `size` numbers (None: all), divided by their Euclidean length: float32. A vector of zeros is
    returned unchanged."""
    cut = numbers[:size].astype(np.float64)
    length = np.sqrt(np.sum(cut * cut))
    return (cut / length if length > 0 else cut).astype("<f4")


def softmax(numbers: Sequence[float] | Numbers) -> list[float]:
    """Returns the probabilities that are proportional to the exponentials of `numbers`."""
    values = np.asarray(numbers, dtype=np.float64)
    weights = np.exp(values - values.max())
    return (weights / weights.sum()).tolist()


def sigmoid(numbers: Numbers) -> list[float]:
    values = numbers.astype(np.float64)
    # Both forms are equal. The exponential of a large number would overflow, so each form is used on one side of 0.
    small = np.exp(-np.abs(values))
    return np.where(values >= 0, 1 / (1 + small), small / (1 + small)).tolist()


def probabilities(numbers: Numbers, problem_type: str) -> list[float]:
    """Returns what transformers' pipelines make of a classifier's outputs. The outputs of a regression stay as they
    are. One output, and outputs of which several may apply, become probabilities of their own (sigmoid). Otherwise the
    probabilities add up to 1 (softmax)."""
    if problem_type == "regression":
        return numbers.astype(np.float64).tolist()
    if len(numbers) == 1 or problem_type == "multi_label_classification":
        return sigmoid(numbers)
    return softmax(numbers)
