"""Tries work again that has run out of a GPU's memory. Nothing that the work has written may be read by its repetition:
the callers say when that holds."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)

T = TypeVar("T")


def retried(work: Callable[[], T], what: str) -> T:
    """Calls `work`, and once more if it raises torch.OutOfMemoryError, after unused memory was given back. `what` names
    the work in a warning. The second error is raised."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        logger.warning("%s has run out of memory and is tried once more: %s", what, error)
    # The error's traceback has held the tensors of the failed work until here.
    gc.collect()
    torch.cuda.empty_cache()  # does nothing if CUDA is not in use
    return work()
