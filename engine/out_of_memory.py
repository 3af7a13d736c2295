"""Lets work that has run out of a GPU's memory be tried once more. The second attempt must not read anything that the
first attempt has written. The callers know when that holds."""

from __future__ import annotations

import gc
import logging
from collections.abc import Generator
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)


@contextmanager
def first_attempt(what: str, *, is_last: bool = False) -> Generator[None]:
    """Context manager for the first attempt at some work. The block must end with a `return`, and the code after the
    block must be the second attempt.

    If the block raises torch.OutOfMemoryError, the error is logged as a warning, in which `what` names the work. Unused
    memory is given back, and the code after the block runs. If `is_last`, the error is raised instead."""
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
