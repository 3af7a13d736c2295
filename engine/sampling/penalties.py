"""Changes logits before the temperature is applied, for requests that set a logit bias, penalties or forbidden tokens.

The changes are made in the same order as in transformers and vLLM: logit_bias, repetition penalty, frequency and
presence penalty. Tokens are forbidden last, so that no bias can allow them again. The host computes changes only for
requests that ask for them. The time for one request is linear in the number of the request's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jamba_server.engine.sampling.row import SamplingRow
from jamba_server.engine.staging import upload
from jamba_server.engine.types import SamplingParams


class Edit(NamedTuple):
    """A change to the logits of one row. The array `token_ids`, int64 [n], has the tokens whose logits change. The
    array `values`, float32 [n], has one number for each of these tokens: a number to add to the token's logit, or the
    repetition penalty of the token."""

    row: int
    token_ids: NDArray[np.int64]
    values: NDArray[np.float32]


def adjust_logits(
    logits: Tensor,
    rows: Sequence[SamplingRow],
    eos_token_ids: tuple[int, ...],
    masked: AbstractSet[int] = frozenset(),
) -> None:
    """Changes `logits` (float32 [N, V]) in place. Row n is changed only if the request of `rows[n]` sets a bias, a
    penalty or forbidden tokens. In the rows whose indices are in `masked` this function forbids no tokens, because the
    masks of these rows already forbid them."""
    asking = [(n, row) for n, row in enumerate(rows) if _asks(row.params)]
    if not asking:
        return
    _add(logits, [_bias(n, row) for n, row in asking if row.params.logit_bias])
    _repeat(logits, [_repetition(n, row) for n, row in asking if row.params.repetition_penalty != 1])
    _add(logits, [_counts(n, row) for n, row in asking if _penalises_counts(row)])
    asking = [(n, row) for n, row in asking if n not in masked]
    _keep_only(logits, [(n, row.params.allowed_token_ids) for n, row in asking if row.params.allowed_token_ids])
    _add(logits, [_ban(n, token_ids) for n, row in asking if (token_ids := _forbidden(row, eos_token_ids))])


def _asks(p: SamplingParams) -> bool:
    penalises = p.repetition_penalty != 1 or p.frequency_penalty or p.presence_penalty
    return bool(penalises or p.logit_bias or p.min_tokens or p.bad_words or p.allowed_token_ids)


def _bias(n: int, row: SamplingRow) -> Edit:
    bias = row.params.logit_bias
    return Edit(n, np.array(list(bias), dtype=np.int64), np.array(list(bias.values()), dtype=np.float32))


def _repetition(n: int, row: SamplingRow) -> Edit:
    token_ids = np.array(row.tokens, dtype=np.int64)
    return Edit(n, token_ids, np.full(len(token_ids), row.params.repetition_penalty, dtype=np.float32))


def _penalises_counts(row: SamplingRow) -> bool:
    return row.num_generated > 0 and (row.params.frequency_penalty != 0 or row.params.presence_penalty != 0)


def _counts(n: int, row: SamplingRow) -> Edit:
    """Returns the penalties of OpenAI's API: the logit of each generated token decreases by count * frequency_penalty +
    presence_penalty, where count is how often the token was generated. Tokens of the prompt do not count."""
    token_ids, counts = np.unique(np.array(row.tokens[row.num_prompt :], dtype=np.int64), return_counts=True)
    values = -(counts * row.params.frequency_penalty + row.params.presence_penalty)
    return Edit(n, token_ids, values.astype(np.float32))


def _forbidden(row: SamplingRow, eos_token_ids: tuple[int, ...]) -> set[int]:
    """Returns the ids of the tokens that the request's parameters forbid as the next token."""
    return row.ends_of_bad_words() | row.early_ends(eos_token_ids)


def _ban(n: int, token_ids: Iterable[int]) -> Edit:
    ids = np.array(sorted(token_ids), dtype=np.int64)
    return Edit(n, ids, np.full(len(ids), -np.inf, dtype=np.float32))


def _keep_only(logits: Tensor, allowed: list[tuple[int, tuple[int, ...]]]) -> None:
    """Sets the logits of all tokens that are not allowed to minus infinity. The list `allowed` has a pair for each row
    to change: the index of the row, and the token ids that are allowed in this row."""
    if allowed:
        where, _ = _flatten([_ban(n, token_ids) for n, token_ids in allowed], logits.device)
        kept = logits[where]
        for n, _ in allowed:
            logits[n].fill_(-torch.inf)
        logits[where] = kept


def _add(logits: Tensor, edits: list[Edit]) -> None:
    """Adds every value of the edits to the logit of its token. The tokens of one edit must be distinct."""
    if edits:
        where, values = _flatten(edits, logits.device)
        logits[where] += values


def _repeat(logits: Tensor, edits: list[Edit]) -> None:
    """Applies the repetition penalty: divides positive logits by the penalty and multiplies negative logits by it, as
    transformers does (Keskar et al. 2019, CTRL). A token that occurs twice is penalised once, because both occurrences
    write the same number."""
    if edits:
        where, penalties = _flatten(edits, logits.device)
        old = logits[where]
        logits[where] = torch.where(old > 0, old / penalties, old * penalties)


def _flatten(edits: list[Edit], device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Joins the edits of all rows. Returns an index into the logits, (rows, token ids), and the `values` of the edits
    in the same order."""
    rows = np.repeat([edit.row for edit in edits], [len(edit.token_ids) for edit in edits])
    token_ids = np.concatenate([edit.token_ids for edit in edits])
    values = np.concatenate([edit.values for edit in edits])
    row_index, token_index, changes = upload([rows, token_ids, values], device)
    return (row_index, token_index), changes
