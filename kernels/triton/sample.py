"""These kernels sample tokens in a few passes over the logits, without a temporary tensor of the logits' size.

Many programs share each pass over a row. For a row with top-k or top-p, one additional program finds the cut by a
search over the scores: a few passes over the row leave at most CANDIDATES tokens. A binary search among these, whose
scores are in registers, finds the cut. So nothing is sorted, and the host never waits. Every sum has a fixed order, so
the results are batch-invariant.

The noise is computed in float32 and differs from that of `kernels/reference/sample.py` by about 1e-6. Probability
masses differ as much. The scores are equal.
"""

# Pyright, a type checker, cannot infer the types inside Triton kernels. The settings below turn off the pyright checks
# that would report false errors there.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportReturnType=false

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from jamba_server.kernels.arguments import require
from jamba_server.kernels.ops import SampleInputs
from jamba_server.kernels.triton.launch import cdiv, follow, jit, next_power_of_2

BLOCK = 4096  # The number of logits that a program of the kernel `best_kernel` or `draw_kernel` reads.
# The number of logits that a program of the kernel `cut_kernel` reads at a time, and its number of warps.
CUT_BLOCK, CUT_WARPS = 4096, 16
CANDIDATES = 2048  # The largest number of tokens among which the kernel `cut_kernel` searches without further passes.
# A number larger than the integer key of every score. The function `key_of` computes the keys.
END = tl.constexpr(0x7F800001)
INFINITE = tl.constexpr(0x7F800000)  # The key of a score of -infinity.
NO_CUT = tl.constexpr(-1)  # Marks a row from which top-k and top-p remove no tokens.
LEAST = tl.constexpr(-3.4e38)  # Replaces the largest logit of a row if all logits of the row are -infinity.


def sample(logits: Tensor, inputs: SampleInputs) -> Tensor:
    """Implements the protocol `Sample`, which is documented in the module `kernels.ops`."""
    rows, size = logits.shape
    require(logits.stride(1) == 1, "logits", logits, "have contiguous rows")
    blocks = cdiv(size, BLOCK)
    best, scores = (logits.new_empty(rows, blocks) for _ in range(2))
    ids = logits.new_empty(rows, blocks, dtype=torch.int32)
    cuts, candidates = (logits.new_empty(rows, columns, dtype=torch.int32) for columns in (3, CANDIDATES))
    tokens = logits.new_empty(rows, dtype=torch.int64)
    many = next_power_of_2(blocks)
    best_kernel[(rows, blocks)](logits, best, size, logits.stride(0), BLOCK=BLOCK)
    cut_kernel[(rows,)](
        *(logits, best, inputs.temperature, inputs.top_p, inputs.top_k, candidates, cuts),
        *(size, logits.stride(0), blocks),
        BLOCK=min(CUT_BLOCK, next_power_of_2(size)),
        BLOCKS=many,
        CANDIDATES=CANDIDATES,
        num_warps=CUT_WARPS,
    )
    least = inputs.min_p.log()
    draw_kernel[(rows, blocks)](
        logits, best, inputs.temperature, least, inputs.keys, cuts, scores, ids, size, logits.stride(0), BLOCK, many
    )
    first_kernel[(rows,)](scores, ids, tokens, blocks, BLOCK=many)
    return tokens


@jit
def best_kernel(
    logits: tl.tensor,
    best: tl.tensor,
    size: tl.tensor,
    row_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the largest logit of each block of a row to `best` [rows, blocks]. The grid is (rows, blocks)."""
    follow()
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * row_stride + i, mask=i < size, other=float("-inf"))
    tl.store(best + row * tl.num_programs(1) + tl.program_id(1), tl.max(x, axis=0))


@jit
def cut_kernel(
    logits: tl.tensor, best: tl.tensor, temperature: tl.tensor, top_p: tl.tensor, top_k: tl.tensor,
    candidates: tl.tensor, cuts: tl.tensor, size: tl.tensor, row_stride: tl.tensor, blocks: tl.tensor,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, CANDIDATES: tl.constexpr,
) -> None:  # fmt: skip
    """Finds which tokens of a row top-k and top-p keep. The grid is (rows).

    The result is three numbers, cuts [rows, 3]: (low, high, last id). The row keeps all tokens with a key below low,
    and the tokens with a key from low to below high whose id is not above last id. The row's logits are overwritten
    with its scores. A row without top-k and top-p keeps its logits, and its first number is NO_CUT. `candidates`
    [rows, CANDIDATES] is scratch memory.
    """
    follow()
    row = tl.program_id(0).to(tl.int64)
    divisor, p, k = tl.load(temperature + row), tl.load(top_p + row), tl.load(top_k + row)
    scores, top = logits + row * row_stride, highest(best + row * blocks, blocks, BLOCKS)
    candidates += row * CANDIDATES
    if (divisor <= 0) | ((k <= 0) & (p >= 1)) | (top == LEAST):
        tl.store(cuts + row * 3, NO_CUT)
        return
    last, finite, total = write_scores(scores, size, top, divisor, BLOCK)
    low, high, ties, wanted = 0, END, size, p.to(tl.float64) * total
    if (k > 0) & (k < size):
        found = search(scores, candidates, size, k.to(tl.float64), last, finite, False, BLOCK, CANDIDATES)
        low, high, before, each = found[0], found[1], found[2], found[5]
        ties = k - before
        if p < 1:
            mass_before = measure(scores, size, low, True, BLOCK)[1]
            wanted = p.to(tl.float64) * (mass_before + each * ties)
    if p < 1:
        p_low, p_high, before, within, mass_before, each = search(
            scores, candidates, size, wanted, last, finite, True, BLOCK, CANDIDATES
        )
        p_ties = tl.ceil((wanted - mass_before) / tl.maximum(each, 1e-45))
        p_ties = tl.minimum(tl.maximum(p_ties, 1.0), within.to(tl.float64)).to(tl.int32)
        # Top-p chooses among the tokens that top-k keeps. Only rounding errors can make the set of top-p the larger
        # set. In this case, the set of top-k is used.
        fewer = (k <= 0) | (before + p_ties < k)
        low, high, ties = tl.where(fewer, p_low, low), tl.where(fewer, p_high, high), tl.where(fewer, p_ties, ties)
    tl.store(cuts + row * 3, low)
    tl.store(cuts + row * 3 + 1, high)
    tl.store(cuts + row * 3 + 2, id_of(scores, size, low, high, ties, BLOCK))


@jit
def write_scores(
    scores: tl.tensor, size: tl.tensor, top: tl.tensor, divisor: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Replaces the logits of a row by scores. Returns the largest key of a score that is not -infinity, the number of
    such scores, and the sum of exp(score) over all tokens in float64."""
    keys, counts = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    masses = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(scores + i, mask=i < size, other=float("-inf"))
        score = tl.div_rn(x - top, divisor)
        tl.store(scores + i, score, mask=i < size)
        inside = (key_of(score) < INFINITE) & (i < size)
        keys = tl.maximum(keys, tl.where(inside, key_of(score), 0))
        counts += inside.to(tl.int32)
        masses += tl.where(inside, tl.exp(score), 0.0)
    tl.debug_barrier()
    return tl.max(keys, axis=0), tl.sum(counts, axis=0), tl.sum(masses, axis=0).to(tl.float64)


@jit
def key_of(score: tl.tensor) -> tl.tensor:
    """Returns an integer key for a score. The score must be at most 0. A higher score has a smaller key."""
    return score.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def measure(
    scores: tl.tensor, size: tl.tensor, bound: tl.tensor, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Returns the number of tokens with a key below `bound`.

    With BY_MASS, the function also returns the sum of exp(score) over these tokens.
    """
    counts, masses = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        score = tl.load(scores + i, mask=i < size, other=float("-inf"))
        inside = (key_of(score) < bound) & (i < size)
        counts += inside.to(tl.int32)
        if BY_MASS:
            masses += tl.where(inside, tl.exp(score), 0.0)
    return tl.sum(counts, axis=0), tl.sum(masses, axis=0).to(tl.float64)


@jit
def search(
    scores: tl.tensor, candidates: tl.tensor, size: tl.tensor, goal: tl.tensor, last: tl.tensor, finite: tl.tensor,
    BY_MASS: tl.constexpr, BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
) -> tuple[tl.tensor, ...]:  # fmt: skip
    """Finds the token at which the tokens, taken from the highest score down, reach `goal`.

    With BY_MASS, `goal` is a sum of exp(score). Without BY_MASS, `goal` is a number of tokens. `last` and `finite` are
    results of `write_scores`. Returns a range of keys [low, high) that contains this token and possibly others with the
    same key, the number of tokens with a key below low, the number of tokens in the range, the sum of exp(score) of the
    tokens with a key below low (with BY_MASS only), and exp(score) of the tokens in the range.
    """
    low, high, before, count, mass, steps = last * 0, last + 1, finite * 0, finite, goal * 0, last * 0
    if goal > finite:  # Only tokens with a score of -infinity are left.
        low, high, before, count = INFINITE, END, finite, size
    while (high - low > 1) & (count - before > CANDIDATES):
        middle = between(low, high, steps)
        middle_count, middle_mass = measure(scores, size, middle, BY_MASS, BLOCK)
        reached = middle_mass >= goal if BY_MASS else middle_count >= goal
        low, high = tl.where(reached, low, middle), tl.where(reached, middle, high)
        before, count = tl.where(reached, before, middle_count), tl.where(reached, middle_count, count)
        mass = tl.where(reached, mass, middle_mass)
        steps += 1
    gather(scores, candidates, size, low, high, BLOCK, CANDIDATES)
    slot = tl.arange(0, CANDIDATES)
    key = tl.load(candidates + slot, mask=slot < count - before, other=INFINITE)
    weight = tl.exp(-key.to(tl.float32, bitcast=True))
    first_count, first_mass = before, mass
    while (high - low > 1) & (count - before > 1):
        middle = low + (high - low) // 2
        middle_count = first_count + tl.sum((key < middle).to(tl.int32), axis=0)
        middle_mass = first_mass + tl.sum(tl.where(key < middle, weight, 0.0), axis=0).to(tl.float64)
        reached = middle_mass >= goal if BY_MASS else middle_count >= goal
        low, high = tl.where(reached, low, middle), tl.where(reached, middle, high)
        before, count = tl.where(reached, before, middle_count), tl.where(reached, middle_count, count)
        mass = tl.where(reached, mass, middle_mass)
    found = tl.min(tl.where(key >= low, key, END), axis=0)  # Every token in the range has this key.
    found = tl.where(high - low > 1, found, low)
    each = tl.exp(-tl.minimum(found, INFINITE).to(tl.float32, bitcast=True)).to(tl.float64)
    return low, high, before, count - before, mass, each


@jit
def between(low: tl.tensor, high: tl.tensor, steps: tl.tensor) -> tl.tensor:
    """Returns a key above `low` and below `high`. In even steps, it is that of the score in the middle, which soon
    leaves few tokens of most rows. In odd steps it is the middle of the keys, so that the steps are bounded."""
    score = low.to(tl.float32, bitcast=True) * 0.5 + high.to(tl.float32, bitcast=True) * 0.5
    middle = tl.where(steps % 2 == 0, score.to(tl.int32, bitcast=True), low + (high - low) // 2)
    return tl.minimum(tl.maximum(middle, low + 1), high - 1)


@jit
def gather(
    scores: tl.tensor, candidates: tl.tensor, size: tl.tensor, low: tl.tensor, high: tl.tensor,
    BLOCK: tl.constexpr, CANDIDATES: tl.constexpr,
) -> None:  # fmt: skip
    """Writes the keys from low to below high to `candidates`, in the order of the tokens, but at most CANDIDATES."""
    tl.debug_barrier()  # Earlier reads of the candidates have ended.
    seen = 0
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = key_of(tl.load(scores + i, mask=i < size, other=0.0))
        inside = ((key >= low) & (key < high) & (i < size)).to(tl.int32)
        place = seen + tl.cumsum(inside, 0) - 1
        tl.store(candidates + place, key, mask=(inside > 0) & (place < CANDIDATES))
        seen += tl.sum(inside, axis=0)
    tl.debug_barrier()


@jit
def id_of(
    scores: tl.tensor, size: tl.tensor, low: tl.tensor, high: tl.tensor, number: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Returns the `number`-th lowest token id (counted from 1) among the tokens with a key in [low, high).

    Returns `size` if there are fewer such tokens.
    """
    seen, found = 0, size
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = key_of(tl.load(scores + i, mask=i < size, other=0.0))
        inside = (key >= low) & (key < high) & (i < size)
        rank = seen + tl.cumsum(inside.to(tl.int32), 0)
        found = tl.minimum(found, tl.min(tl.where(inside & (rank == number), i, size), axis=0))
        seen += tl.sum(inside.to(tl.int32), axis=0)
    return found


@jit
def highest(best: tl.tensor, blocks: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """Returns a row's largest logit, or LEAST if all its logits are -infinity.

    Scores are relative to the largest logit, so that a small temperature cannot cause an overflow.
    """
    block = tl.arange(0, BLOCKS)
    return tl.maximum(tl.max(tl.load(best + block, mask=block < blocks, other=float("-inf")), axis=0), LEAST)


@jit
def draw_kernel(
    logits: tl.tensor, best: tl.tensor, temperature: tl.tensor, least: tl.tensor, keys: tl.tensor, cuts: tl.tensor,
    scores: tl.tensor, ids: tl.tensor, size: tl.tensor, row_stride: tl.tensor,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
) -> None:  # fmt: skip
    """Finds, in each block of tokens, the token with the largest noisy score. The grid is (rows, blocks).

    The results are scores and ids [rows, blocks]. `least` is log(min_p).
    """
    follow()
    row, blocks = tl.program_id(0).to(tl.int64), tl.num_programs(1)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(logits + row * row_stride + i, mask=i < size, other=float("-inf"))
    divisor, low = tl.load(temperature + row), tl.load(cuts + row * 3)
    if divisor > 0:
        if low == NO_CUT:
            score = tl.div_rn(score - highest(best + row * blocks, blocks, BLOCKS), divisor)
        else:
            key = key_of(score)
            tied = (key < tl.load(cuts + row * 3 + 1)) & (i <= tl.load(cuts + row * 3 + 2))
            score = tl.where((key < low) | tied, score, float("-inf"))
        noisy = score + gumbel_noise(tl.load(keys + row), i)
        score = tl.where(score < tl.load(least + row), float("-inf"), noisy)
    tl.store(scores + row * blocks + tl.program_id(1), tl.max(score, axis=0))
    winner = tl.argmax(score, axis=0, tie_break_left=True)
    tl.store(ids + row * blocks + tl.program_id(1), winner + tl.program_id(1) * BLOCK)


@jit
def first_kernel(
    scores: tl.tensor,
    ids: tl.tensor,
    tokens: tl.tensor,
    blocks: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Writes the id of the token with the largest noisy score of a row. Among equal blocks, the first block wins.

    The grid is (rows).
    """
    follow()
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    score = tl.load(scores + row * blocks + block, mask=block < blocks, other=float("-inf"))
    winner = tl.argmax(score, axis=0, tie_break_left=True)
    tl.store(tokens + row, tl.load(ids + row * blocks + winner).to(tl.int64))


@jit
def gumbel_noise(key: tl.tensor, i: tl.tensor) -> tl.tensor:
    """Returns Gumbel noise -log(-log u) for a uniform random number u in (0, 1).

    The number u is made from output i of the random number generator SplitMix64, seeded with `key`.
    """
    bits = (i + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key.to(tl.uint64, bitcast=True)
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    number = ((bits ^ (bits >> 31)) >> 12).to(tl.int64)
    other = (1 << 52) - 1 - number
    # The variable `end` is the smaller of u and 1 - u. If u is close to 1, float32 represents 1 - u more precisely.
    end = (tl.minimum(number, other).to(tl.float32) + 0.5) * 2.0**-52
    # The variable v is 1 - end, rounded. The first-order correction of log(v) for this rounding is (1 - end - v) / v.
    v = 1.0 - end
    upper = tl.log(v) + ((1.0 - v) - end) / v
    return -tl.log(-tl.where(number < other, tl.log(end), upper))
