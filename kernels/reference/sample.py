"""Sampling by the Gumbel-max trick, in plain torch: the oracle of `kernels.ops.Sample`.

argmax(scores + Gumbel noise) is a draw from softmax(scores) (Maddison, Tarlow & Minka 2014, "A* Sampling", section 2);
tokens that a filter takes away have score -inf. The noise is counter-based: that of token v comes from output v of the
generator SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"; its finaliser is
Stafford's variant 13) seeded with the row's key, so that nothing but key and token decides it.

On a CPU a row's bits never depend on its batch mates: sums over the vocabulary are cumulative sums, which run in order,
because torch splits a plain sum among threads differently for one row than for many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.ops import SampleInputs

# SplitMix64's increment (2**64 / golden ratio, odd) and multipliers, as signed integers: int64 arithmetic wraps around
GAMMA = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)

CANDIDATES = 1024  # top-k and top-p sort only this many tokens, unless the kept set is larger
ID_MASK = 2**32 - 1


def sample(logits: Tensor, inputs: SampleInputs) -> Tensor:
    """`kernels.ops.Sample`. A greedy batch costs one argmax; ranking is for rows with top_k or top_p."""
    token_ids = logits.argmax(dim=-1)
    rows = inputs.temperature.nonzero().squeeze(-1)
    if len(rows) > 0:
        token_ids[rows] = _sample_noisy(logits[rows], _select(inputs, rows))
    return token_ids


def _select(inputs: SampleInputs, rows: Tensor) -> SampleInputs:
    return SampleInputs(*(field[rows] for field in inputs))


def _sample_noisy(logits: Tensor, inputs: SampleInputs) -> Tensor:
    """`sample` where no row is greedy."""
    # relative to the best token, so that no temperature overflows and the differences that matter keep their bits
    best = logits.max(dim=-1, keepdim=True).values
    scores = (logits - best) / inputs.temperature[:, None]
    token_ids = torch.empty_like(inputs.keys)
    ranked = (inputs.top_k > 0) | (inputs.top_p < 1)
    for chosen, sample_rows in ((~ranked, _sample_all), (ranked, _sample_best)):
        rows = chosen.nonzero().squeeze(-1)
        if len(rows) > 0:
            token_ids[rows] = sample_rows(scores[rows], _select(inputs, rows))
    return token_ids


def _sample_all(scores: Tensor, inputs: SampleInputs) -> Tensor:
    """From the whole vocabulary."""
    return _draw(scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores), inputs)


def _sample_best(scores: Tensor, inputs: SampleInputs, num_candidates: int = CANDIDATES) -> Tensor:
    """From what top-k and top-p leave. Rows that keep more than `num_candidates` tokens rank the whole vocabulary."""
    width = min(num_candidates, scores.shape[1])
    ids = best_ids(scores, width)
    candidates = scores.gather(1, ids)
    kept = num_kept(scores, candidates, inputs)
    candidates.masked_fill_(torch.arange(width, device=scores.device) >= kept[:, None], -torch.inf)
    token_ids = _draw(candidates, ids, inputs)
    rows = (kept > width).nonzero().squeeze(-1)
    if len(rows) > 0:
        token_ids[rows] = _sample_best(scores[rows], _select(inputs, rows), num_candidates=scores.shape[1])
    return token_ids


def num_kept(scores: Tensor, candidates: Tensor, inputs: SampleInputs) -> Tensor:
    """How many of the best tokens top-k leaves, and of those top-p: the fewest whose mass reaches it. int64 [N].

    scores: float32 [N, V], relative to the best; candidates: their best W, in order. A number above W means: unknown,
    more than W.
    """
    size, width = scores.shape[1], candidates.shape[1]
    k = torch.where(inputs.top_k > 0, inputs.top_k.long(), size).clamp_(max=size)
    mass = candidates.exp().cumsum(dim=-1, dtype=torch.float64)  # of the best 1, 2, ... W tokens
    all_mass = scores.exp().cumsum(dim=-1, dtype=torch.float64)[:, -1]
    k_mass = mass.gather(1, k.clamp(max=width)[:, None] - 1).squeeze(1)
    wanted = torch.where(inputs.top_p < 1, inputs.top_p * torch.where(k < size, k_mass, all_mass), torch.inf)
    kept = torch.minimum((mass < wanted[:, None]).sum(dim=-1) + 1, k)
    return torch.where((k > width) & (k < size), width + 1, kept)


def _draw(scores: Tensor, ids: Tensor, inputs: SampleInputs) -> Tensor:
    """Of tokens `ids` (int64 [N, W]) with `scores` relative to the best, after min-p, the winner. Returns int64 [N]."""
    # p >= min_p * (largest p), in logarithms
    noisy = gumbel_noise(inputs.keys, ids).add_(scores)
    noisy.masked_fill_(scores < inputs.min_p.log()[:, None], -torch.inf)
    return ids.gather(1, noisy.argmax(dim=-1, keepdim=True)).squeeze(1)


def best_ids(scores: Tensor, count: int) -> Tensor:
    """The `count` highest scores' positions in each row, best first, ties to the lower one.

    scores: float32 [N, V], at most 0: the magnitudes' bits then order them as integers, which leaves room for the
    position, and makes every key of the selection different. Returns int64 [N, count].
    """
    keys = scores.abs().view(torch.int32).to(torch.int64)
    keys <<= 32
    keys |= torch.arange(scores.shape[1], device=scores.device)
    return keys.topk(count, dim=-1, largest=False, sorted=True).values & ID_MASK


def gumbel_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise of tokens `ids` (int64 [N, W]) in rows with `keys` (int64 [N]). Returns float64 [N, W]:
    a float32 uniform would end the tail at 16.6, which the draws from a large vocabulary reach."""
    return uniform(random_bits(keys, ids)).log_().neg_().log_().neg_()


def uniform(bits: Tensor) -> Tensor:
    """float64 in (0, 1), both ends excluded, from the upper 52 of 64 random bits: with 53 the half would round to 1."""
    return _shift_right(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)


def random_bits(keys: Tensor, ids: Tensor) -> Tensor:
    """int64 [N, W]: outputs number `ids` (int64 [N, W], from 0) of SplitMix64 seeded with `keys` (int64 [N])."""
    bits = (ids + 1).mul_(GAMMA).add_(keys[:, None])
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        bits ^= _shift_right(bits, shift)
        bits *= multiplier
    bits ^= _shift_right(bits, 31)
    return bits


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift of 64 bits; torch's own keeps the sign."""
    return (bits >> count).bitwise_and_(2 ** (64 - count) - 1)
