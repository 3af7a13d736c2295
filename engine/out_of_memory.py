"""Helps to try work again that has run out of a GPU's memory. Nothing that the work has written may be read by its
repetition: the callers say when that holds."""

from __future__ import annotations

import gc
import logging
from collections.abc import Generator
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)


@contextmanager
def first_attempt(what: str, *, is_last: bool = False) -> Generator[None]:
    """Context manager for work that returns a result out of the block. If the block raises torch.OutOfMemoryError,
    what follows the block runs, which is the second attempt: a warning names the work `what`, and unused memory was
    given back. If `is_last`, there is no second attempt, and the error is raised."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if is_last:
            raise
        logger.warning("%s has run out of memory and is tried once more: %s", what, error)
        # The frames of the failed work hold its tensors until the traceback is dropped.
        error.__traceback__ = None
    else:
        return
    gc.collect()
    torch.cuda.empty_cache()  # This call does nothing if CUDA is not in use.
