"""Exact sums of hidden states, for the mean over the tokens of a prompt.

A sum of floating-point numbers depends on the order of the additions, and the chunks of a prompt would change this
order. Hidden states are therefore rounded to whole multiples of a power of two and added as int64 numbers. Such sums
are the same in every order, so each chunk can be summed on its own, by any kernel.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# The largest magnitude of a hidden state that can be summed. The final norm bounds hidden states by its largest weight
# times the square root of the hidden size, which is below 1,000 for all published models.
LIMIT_BITS: Final = 13
# The number of rows that are converted at a time. The limit keeps the memory for the float64 numbers small.
ROWS: Final = 256

Sums = NDArray[np.int64]


def fraction_bits(max_tokens: int) -> int:
    """Returns n, where hidden states are rounded to multiples of 2**-n, so that a sum over `max_tokens` tokens stays
    below 2**62. For a context of 262,144 tokens n is 31, so an element is rounded by at most 2**-32."""
    return 62 - LIMIT_BITS - max_tokens.bit_length() + (max_tokens & (max_tokens - 1) == 0)


def launch_sums(hidden: Tensor, bits: int) -> Tensor:
    """Returns the sums over the rows of `hidden` [T, H] in units of 2**-bits: int64 [H + 1]. The last element counts
    the numbers that cannot be summed, because they are not finite or their magnitude is above 2**LIMIT_BITS."""
    total = torch.zeros(hidden.shape[1] + 1, dtype=torch.int64, device=hidden.device)
    for rows in hidden.split(ROWS):
        values = rows.double()
        fits = values.abs() <= 2.0**LIMIT_BITS
        total[:-1] += torch.where(fits, values * 2.0**bits, 0).round().long().sum(dim=0)
        total[-1] += (~fits).sum()
    return total


def mean_of(sums: Sums, count: int, bits: int) -> bytes:
    """Returns the means, float32, of the numbers whose sums over `count` rows `launch_sums` has returned. All means are
    NaN if a number could not be summed."""
    if sums[-1]:
        return np.full(len(sums) - 1, np.nan, dtype="<f4").tobytes()
    return (sums[:-1] / (count * 2.0**bits)).astype("<f4").tobytes()
