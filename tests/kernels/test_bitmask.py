"""apply_bitmask against numpy, which unpacks the bits in another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jamba_server.kernels.ops import ApplyBitmask
from tests.kernels.cases import assert_same, each_implementation, random


@each_implementation("apply_bitmask")
@pytest.mark.parametrize("size", [1, 31, 32, 500, 5000, 40_001])
def test_the_tokens_of_the_zeros_are_forbidden(apply_bitmask: ApplyBitmask, size: int) -> None:
    rng = np.random.default_rng(size)
    words = -(-size // 32)
    masks = rng.integers(-(2**31), 2**31, (3, words)).astype(np.int32)
    masks[0, : words // 2] = -1  # whole words of allowed tokens, and of forbidden ones
    masks[2, words // 3 :] = 0
    rows = [4, 0, 2]
    logits = random(5, size)
    logits[2, 0], logits[4, -1] = torch.nan, torch.inf
    expected = logits.clone()
    for row, mask in zip(rows, masks, strict=True):
        bits = np.unpackbits(mask.astype("<i4").view(np.uint8), bitorder="little")[:size]
        expected[row, torch.from_numpy(bits == 0)] = -torch.inf
    apply_bitmask(logits, torch.from_numpy(masks), torch.tensor(rows))
    assert_same(logits, expected)


@each_implementation("apply_bitmask")
def test_masks_and_logits_may_be_parts_of_larger_tensors(apply_bitmask: ApplyBitmask) -> None:
    logits, masks = random(3, 100), torch.zeros(2, 9, dtype=torch.int32)
    masks[:, 2:5] = torch.tensor([[-1, 0, 1], [2, -(2**31), 0]], dtype=torch.int32)
    expected = logits.clone()
    expected[1, 34:102], expected[2, 2:100] = -torch.inf, -torch.inf
    expected[1, 66], expected[2, 3], expected[2, 65] = logits[1, 66], logits[2, 3], logits[2, 65]
    apply_bitmask(logits[:, 2:98], masks[:, 2:5], torch.tensor([1, 2]))
    assert_same(logits, expected.where(torch.arange(100) < 98, logits))
