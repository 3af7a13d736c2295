"""This module samples tokens by the Gumbel-max trick, in plain torch. Tests compare other implementations with it.

argmax(scores + Gumbel noise) is a draw from softmax(scores) (Maddison, Tarlow & Minka 2014, "A* Sampling", section 2).
Tokens that a filter removes have the score -inf. The noise is counter-based: the noise of token v is computed from
output v of the generator SplitMix64, seeded with the row's key, so it depends only on the key and the token.
(SplitMix64 is from Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", with Stafford's
finaliser 13.)

On a CPU the results are batch-invariant. Sums over the vocabulary are therefore cumulative sums, which run in order;
torch splits a plain sum among threads differently for one row than for many.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jamba_server.kernels.ops import SampleInputs

# The constants of the generator SplitMix64. GAMMA is the generator's increment, the odd number next to
# 2**64 / golden ratio. MULTIPLIERS are the generator's two multipliers. These constants are written as signed integers,
# because torch has no uint64 arithmetic. int64 arithmetic gives the same 64 bits.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)

# The number of tokens per row that are sorted at first, for top-k and top-p: the tokens with the largest scores. All
# tokens of a row are sorted only if top-k and top-p keep more than this number of tokens.
CANDIDATES = 1024
ID_MASK = 2**32 - 1


def sample(logits: Tensor, inputs: SampleInputs) -> Tensor:
    """Implements the protocol `kernels.ops.Sample`.

    Greedy rows take the argmax; only rows with top-k or top-p are sorted.
    """
    token_ids = logits.argmax(dim=-1)
    rows = inputs.temperature.nonzero().squeeze(-1)
    if len(rows) > 0:
        token_ids[rows] = _sample_noisy(logits[rows], _select(inputs, rows))
    return token_ids


def _select(inputs: SampleInputs, rows: Tensor) -> SampleInputs:
    return SampleInputs(*(field[rows] for field in inputs))


def _sample_noisy(logits: Tensor, inputs: SampleInputs) -> Tensor:
    """Returns the sampled token ids of N rows whose temperatures are all above 0: int64 [N]."""
    # The row's largest logit is subtracted first, so that division by a small temperature cannot overflow. The most
    # probable tokens then have scores near 0, where float32 is most precise.
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
    """Samples from the whole vocabulary, for rows that have neither top-k nor top-p."""
    return _draw(scores, torch.arange(scores.shape[1], device=scores.device).expand_as(scores), inputs)


def _sample_best(scores: Tensor, inputs: SampleInputs, num_candidates: int = CANDIDATES) -> Tensor:
    """Samples from the tokens that top-k and top-p keep, for rows with top-k or top-p.

    Rows that keep more than `num_candidates` tokens are computed again with a sort of the whole vocabulary.
    """
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
    """Returns how many tokens, from the largest score down, top-k and then top-p keep in each row: int64 [N].

    Of the tokens that top-k keeps, top-p keeps the fewest, from the largest score down, whose probability mass reaches
    top_p. scores: float32 [N, V], relative to the row's largest score; candidates: the W largest scores of each row, in
    descending order. A result above W only says that the row keeps more than W tokens.
    """
    size, width = scores.shape[1], candidates.shape[1]
    k = torch.where(inputs.top_k > 0, inputs.top_k.long(), size).clamp_(max=size)
    # Column i of `mass` is the sum of exp(score) over the i + 1 tokens with the largest scores.
    mass = candidates.exp().cumsum(dim=-1, dtype=torch.float64)
    all_mass = scores.exp().cumsum(dim=-1, dtype=torch.float64)[:, -1]
    k_mass = mass.gather(1, k.clamp(max=width)[:, None] - 1).squeeze(1)
    wanted = torch.where(inputs.top_p < 1, inputs.top_p * torch.where(k < size, k_mass, all_mass), torch.inf)
    kept = torch.minimum((mass < wanted[:, None]).sum(dim=-1) + 1, k)
    return torch.where((k > width) & (k < size), width + 1, kept)


def _draw(scores: Tensor, ids: Tensor, inputs: SampleInputs) -> Tensor:
    """Applies min-p and draws one token id for each row from the row of `ids` (int64 [N, W]): int64 [N].

    `scores` [N, W]: the scores of the tokens `ids`, minus the row's largest score.
    """
    # min-p keeps a token if p >= min_p * (largest p). The logarithm of this condition is score >= log(min_p), because
    # score = log(p / (largest p)).
    noisy = gumbel_noise(inputs.keys, ids).add_(scores)
    noisy.masked_fill_(scores < inputs.min_p.log()[:, None], -torch.inf)
    return ids.gather(1, noisy.argmax(dim=-1, keepdim=True)).squeeze(1)


def best_ids(scores: Tensor, count: int) -> Tensor:
    """Returns the positions of the `count` highest scores of each row, the highest first: int64 [N, count].

    Of equal scores, the one with the lower position comes first. scores: float32 [N, V], none above 0. The bits of the
    magnitude of a float32 number, read as an integer, have the order of the magnitudes. The sort keys are int64: the
    upper 32 bits are the bits of the score's magnitude, the lower 32 bits its position, so that all keys differ.
    """
    keys = scores.abs().view(torch.int32).to(torch.int64)
    keys <<= 32
    keys |= torch.arange(scores.shape[1], device=scores.device)
    return keys.topk(count, dim=-1, largest=False, sorted=True).values & ID_MASK


def gumbel_noise(keys: Tensor, ids: Tensor) -> Tensor:
    """Returns standard Gumbel noise of tokens `ids` (int64 [N, W]) in rows with `keys` (int64 [N]): float64 [N, W].

    In float32 the noise could not exceed 16.6, which is too little: in a large vocabulary some tokens have more noise.
    """
    return uniform(random_bits(keys, ids)).log_().neg_().log_().neg_()


def uniform(bits: Tensor) -> Tensor:
    """Returns uniform float64 numbers in (0, 1), both ends excluded, from the upper 52 of 64 random bits.

    With 53 bits, the addition of 0.5 would be rounded, and the largest result would be 1.
    """
    return _shift_right(bits, 12).to(torch.float64).add_(0.5).mul_(2.0**-52)


def random_bits(keys: Tensor, ids: Tensor) -> Tensor:
    """Returns SplitMix64's outputs at the positions `ids` (int64 [N, W], counted from 0): random int64 [N, W].

    Each row has its own generator, seeded with its element of `keys` (int64 [N]).
    """
    bits = (ids + 1).mul_(GAMMA).add_(keys[:, None])
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        bits ^= _shift_right(bits, shift)
        bits *= multiplier
    bits ^= _shift_right(bits, 31)
    return bits


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Shifts int64 numbers to the right by `count` bits and fills with zeros. torch's own shift copies the sign bit."""
    return (bits >> count).bitwise_and_(2 ** (64 - count) - 1)
