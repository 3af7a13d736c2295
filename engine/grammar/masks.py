"""Computes bitmasks, which say for each sequence with a grammar which tokens may come next. Other threads compute the
masks of a step while the forward pass of the step runs."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from jamba_server.engine.grammar.constraint import Constraint
from jamba_server.engine.sampling.row import SamplingRow

logger = logging.getLogger(__name__)

_BITS = 32  # one int32 of a mask has a bit for each of this number of tokens
_MOST_THREADS = 8


class ConstrainedRow(NamedTuple):
    """A row of the sampler whose sequence has a constraint, such as a grammar. `number` is the index of the row in the
    step's logits."""

    number: int
    row: SamplingRow
    constraint: Constraint


class Masks(NamedTuple):
    """The masks of M rows. `rows`, int64 [M], are the indices of the rows. In `masks`, int32 [M, ceil(V / 32)], bit
    v % 32 of masks[i, v // 32] is 1 if token v may come next in row rows[i]."""

    rows: NDArray[np.int64]
    masks: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PendingMasks:
    """Masks that other threads may still be computing."""

    _masks: Masks
    _filled: Future[None] | None

    def read(self) -> Masks:
        """Waits until the masks are computed, and returns them."""
        if self._filled is not None:
            self._filled.result()
        return self._masks


class MaskFiller:
    """Computes the masks of the rows whose sequences have a constraint. The rows of a step are divided among
    `num_threads` threads."""

    def __init__(self, vocab_size: int, eos_token_ids: tuple[int, ...], num_threads: int) -> None:
        self._words, self._eos = -(-vocab_size // _BITS), eos_token_ids
        self._executor = LLExecutor(max(1, min(num_threads, _MOST_THREADS)))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar masks")

    @contextmanager
    def filling(self, rows: Sequence[ConstrainedRow]) -> Generator[PendingMasks | None]:
        """Computes the masks of `rows` in other threads while the `with` block runs, and waits for these threads at the
        end of the block, however the block ends. Yields None if `rows` is empty."""
        if not rows:
            yield None
            return
        numbers = np.array([entry.number for entry in rows], dtype=np.int64)
        masks = Masks(numbers, np.empty((len(rows), self._words), dtype=np.int32))
        filled = None
        if any(_matcher(entry.constraint) is not None for entry in rows):
            filled = self._thread.submit(self._fill, rows, masks.masks)
        else:
            self._fill(rows, masks.masks)
        try:
            yield PendingMasks(masks, filled)
        finally:
            if filled is not None:
                filled.exception()

    def _fill(self, rows: Sequence[ConstrainedRow], masks: NDArray[np.int32]) -> None:
        """Computes the masks of `rows`. An error in one row ends the request of this row only."""
        matchers = [_matcher(entry.constraint) for entry in rows]
        pairs = [(matcher, i) for i, matcher in enumerate(matchers) if matcher is not None]
        try:
            if pairs:
                self._executor.unsafe_compute_mask_ptr(pairs, masks.ctypes.data, self._words * 4, len(masks))
        except BaseException:
            logger.exception("the masks of a step cannot be computed together, so each is computed alone")
            self._fill_one_by_one(rows, masks)
        for (_, row, constraint), mask in zip(rows, masks, strict=True):
            try:
                self._complete(mask, row, constraint)
            except BaseException as error:  # noqa: BLE001 - `break_off` logs the error
                constraint.break_off(error)
                mask.fill(-1)

    def _fill_one_by_one(self, rows: Sequence[ConstrainedRow], masks: NDArray[np.int32]) -> None:
        """Computes the masks of the grammars in `rows` one after the other."""
        for (_, _, constraint), mask in zip(rows, masks, strict=True):
            try:
                if (matcher := _matcher(constraint)) is not None:
                    matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            except BaseException as error:  # noqa: BLE001 - `break_off` logs the error
                constraint.break_off(error)

    def _complete(self, mask: NDArray[np.int32], row: SamplingRow, constraint: Constraint) -> None:
        """Changes the mask of one row, which the row's grammar has filled, so that it allows exactly the tokens that
        may come next. After an error it allows all tokens, because the request then ends."""
        if constraint.forced:
            mask[:] = _only(constraint.forced[:1], len(mask))
        elif constraint.matcher is None or constraint.error:
            mask.fill(-1)
        elif constraint.matcher.is_error():
            constraint.fail()
            mask.fill(-1)
        else:
            self._restrict(mask, row, constraint)

    def _restrict(self, mask: NDArray[np.int32], row: SamplingRow, constraint: Constraint) -> None:
        """Removes from a grammar's mask the tokens that `bad_words`, `allowed_token_ids`, `min_tokens` or `ignore_eos`
        forbid. Where the grammar allows only end tokens, nothing is removed. If every token that the grammar allows is
        forbidden by `bad_words` or `allowed_token_ids`, the request ends with an error."""
        early, bad, allowed = row.early_ends(self._eos), row.ends_of_bad_words(), row.params.allowed_token_ids
        if not (early or bad or allowed):
            return
        if not _without(mask, self._eos).any():
            return  # the grammar allows only end tokens here, so the reply must end
        if (later := _without(mask, early)).any():
            mask[:] = later
        mask[:] = _without(mask, bad)
        if allowed:
            mask &= _only(allowed, len(mask))
        if not mask.any():
            constraint.error = (
                "bad_words or allowed_token_ids forbid every token that the grammar allows at this place of the reply."
            )
            constraint.contradictory = True
            mask.fill(-1)


def _matcher(constraint: Constraint) -> LLMatcher | None:
    """Returns the matcher that must compute a mask, or None if the next token is forced or every token is allowed."""
    return None if constraint.forced or constraint.error else constraint.matcher


def _only(token_ids: Iterable[int], words: int) -> NDArray[np.int32]:
    """Returns a mask of `words` 32-bit words that allows only the tokens `token_ids`."""
    mask = np.zeros(words, dtype=np.uint32)
    np.bitwise_or.at(mask, *_places(token_ids))
    return mask.view(np.int32)


def _without(mask: NDArray[np.int32], token_ids: Iterable[int]) -> NDArray[np.int32]:
    """Returns a copy of `mask` that does not allow the tokens `token_ids`."""
    words, bits = _places(token_ids)
    copy = mask.copy().view(np.uint32)
    np.bitwise_and.at(copy, words, ~bits)
    return copy.view(np.int32)


def _places(token_ids: Iterable[int]) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Returns two arrays for tokens: the index of the mask's 32-bit word that has the token's bit, and a number in
    which only this bit is 1."""
    ids = np.fromiter(token_ids, dtype=np.int64)
    return ids // _BITS, np.left_shift(np.uint32(1), (ids % _BITS).astype(np.uint32))
