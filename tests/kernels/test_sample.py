"""kernels.reference.sample against numpy: float64 scores, numpy's own uint64 arithmetic for the noise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from jamba_server.kernels.ops import Sample, SampleInputs
from jamba_server.kernels.reference import sample as module
from jamba_server.kernels.reference.sample import CANDIDATES, gumbel_noise, random_bits, sample, uniform
from jamba_server.kernels.reference.sample import sample as reference_sample
from tests.kernels.cases import each_implementation

Floats = NDArray[np.float64]


def make_inputs(
    num_rows: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    first_key: int = 0,
) -> SampleInputs:
    return SampleInputs(
        temperature=torch.full((num_rows,), float(temperature)),
        top_p=torch.full((num_rows,), float(top_p)),
        min_p=torch.full((num_rows,), float(min_p)),
        top_k=torch.full((num_rows,), top_k, dtype=torch.int32),
        keys=torch.arange(first_key, first_key + num_rows) * 0x2545F4914F6CDD1D,
    )


def mixed_inputs(num_rows: int, seed: int) -> SampleInputs:
    """Returns greedy and noisy rows with every combination of filters, in a random order."""
    rng = np.random.default_rng(seed)
    return SampleInputs(
        temperature=torch.from_numpy(rng.choice([0.0, 0.3, 1.0, 2.0], num_rows).astype(np.float32)),
        top_p=torch.from_numpy(rng.choice([0.05, 0.5, 0.93, 1.0], num_rows).astype(np.float32)),
        min_p=torch.from_numpy(rng.choice([0.0, 0.01, 0.3], num_rows).astype(np.float32)),
        top_k=torch.from_numpy(rng.choice([0, 1, 7, CANDIDATES, CANDIDATES + 300], num_rows).astype(np.int32)),
        keys=torch.from_numpy(rng.integers(-(2**63), 2**63, num_rows)),
    )


def allowed_tokens(logits: Floats, temperature: float, top_k: int, top_p: float, min_p: float) -> list[int]:
    """Returns the tokens that the filters leave, best first, computed from the definitions over sorted
    probabilities."""
    order = np.lexsort((np.arange(len(logits)), -logits))
    p = np.exp((logits - logits.max()) / temperature)
    kept = list(order[:top_k] if top_k else order)
    if top_p < 1:
        mass = np.cumsum(p[kept] / p[kept].sum())
        kept = kept[: int(np.argmax(mass >= top_p)) + 1]
    return [int(t) for t in kept if p[t] >= min_p * p.max()]


def splitmix64(key: int, size: int) -> NDArray[np.uint64]:
    """Vigna's splitmix64.c."""
    with np.errstate(over="ignore"):
        z = np.uint64(key % 2**64) + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def oracle(logits: Tensor, inputs: SampleInputs) -> list[int]:
    tokens: list[int] = []
    for x, temperature, top_p, min_p, top_k, key in zip(
        logits.double().numpy(), *map(Tensor.tolist, inputs), strict=True
    ):
        if temperature == 0:
            tokens.append(int(np.argmax(x)))
            continue
        u = ((splitmix64(key, len(x)) >> np.uint64(12)).astype(np.float64) + 0.5) / 2.0**52
        allowed = allowed_tokens(x, temperature, top_k, top_p, min_p)
        score = x[allowed] / temperature - np.log(-np.log(u[allowed]))
        tokens.append(allowed[int(np.argmax(score))])
    return tokens


def random_logits(num_rows: int, size: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * scale


def test_bits_are_those_of_the_published_generator() -> None:
    """First outputs of splitmix64 for the seeds 0 and 1234567, as every port of it quotes them."""
    published = [
        [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B],
        [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821],
    ]
    bits = random_bits(torch.tensor([0, 1234567]), torch.arange(5).expand(2, 5))
    assert (bits.numpy().view(np.uint64) == np.array(published, dtype=np.uint64)).all()


def test_uniforms_never_reach_the_ends() -> None:
    bits = torch.tensor([0, -1, 1, 2**63 - 1, -(2**63)])
    u = uniform(bits)
    assert u.tolist() == [2.0**-53, 1 - 2.0**-53, 2.0**-53, 0.5 - 2.0**-53, 0.5 + 2.0**-53]
    assert (-(-u.log()).log()).isfinite().all()


def test_uniforms_are_uniform_and_neighbours_unrelated() -> None:
    """64 bins of 262,144 numbers: chi-square has mean 63 and deviation 11.2. Neighbours in both directions: a
    correlation of n independent pairs has deviation 1 / sqrt(n)."""
    keys, size = torch.arange(64), 4096
    u = uniform(random_bits(keys, torch.arange(size).expand(64, size))).numpy()
    counts = np.bincount((u * 64).astype(np.int64).ravel(), minlength=64)
    expected = u.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * 11.2
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / np.sqrt(a.size)


def test_noise_is_gumbel() -> None:
    """Mean is Euler's constant, variance pi**2 / 6; the tail goes beyond what float32 uniforms could give."""
    g = gumbel_noise(torch.arange(100), torch.arange(10_000).expand(100, 10_000)).numpy()
    assert g.mean() == pytest.approx(0.5772156649, abs=5 * np.sqrt(np.pi**2 / 6 / g.size))
    assert g.var() == pytest.approx(np.pi**2 / 6, rel=0.01)
    assert uniform(torch.tensor([-1])).log().neg().log().neg().item() > 36


@pytest.mark.parametrize("size", [1, 2, 37, 1500, 5000])
def test_equals_the_oracle(size: int) -> None:
    """5000 tokens, many of them kept: the ranking of candidates does not suffice, and the whole one is made."""
    logits, inputs = random_logits(96, size, seed=size, scale=1.5), mixed_inputs(96, seed=size)
    assert sample(logits.clone(), inputs).tolist() == oracle(logits, inputs)


def test_equals_the_oracle_with_ties() -> None:
    """bfloat16 logits of a large vocabulary are full of ties; top-k keeps the lower ids of them."""
    logits = random_logits(64, 2000, seed=3, scale=0.5).bfloat16().float()
    inputs = mixed_inputs(64, seed=3)._replace(top_p=torch.ones(64))
    assert sample(logits.clone(), inputs).tolist() == oracle(logits, inputs)


@pytest.mark.parametrize(("size", "scale"), [(300, 4.0), (3000, 1.0), (9001, 8.0)])
def test_equals_the_oracle_with_ties_and_masks(size: int, scale: float) -> None:
    """A third of the tokens banned, fewer left than some top-k; bfloat16's ties at the cut of top-p as well."""
    logits = random_logits(128, size, seed=size, scale=scale).bfloat16().float()
    logits[random_logits(128, size, seed=1) > 1.3] = -torch.inf
    logits[:16, 5:] = -torch.inf
    logits[:, 4] = 0
    inputs = mixed_inputs(128, seed=size + 1)
    assert sample(logits.clone(), inputs).tolist() == oracle(logits, inputs)


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (0, 1.0, 0.35), (6, 0.7, 0.2), (1, 1.0, 0.0), (0, 1e-6, 0.0)],
)
def test_draws_exactly_what_the_filters_leave(top_k: int, top_p: float, min_p: float) -> None:
    """Every allowed token is drawn, no other is, and as often as softmax says (chi-square, fixed keys)."""
    num_draws, temperature = 8000, 0.7
    logits = random_logits(1, 12, seed=1, scale=0.6)
    inputs = make_inputs(num_draws, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens = sample(logits.repeat(num_draws, 1), inputs)
    x = logits[0].double().numpy()
    allowed = allowed_tokens(x, temperature, top_k, top_p, min_p)
    counts = np.bincount(tokens.numpy(), minlength=12)
    assert set(counts.nonzero()[0].tolist()) == set(allowed)
    p = np.exp(x[allowed] / temperature)
    expected = p / p.sum() * num_draws
    freedom = len(allowed) - 1
    assert ((counts[allowed] - expected) ** 2 / expected).sum() <= freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [50, 4001, 65_537])
def test_a_row_does_not_depend_on_its_batch(size: int) -> None:
    num_rows = 24 if size < 10_000 else 6
    logits, inputs = random_logits(num_rows, size, seed=5), mixed_inputs(num_rows, seed=size)
    together = sample(logits.clone(), inputs)
    alone = [sample(logits[n : n + 1].clone(), SampleInputs(*(f[n : n + 1] for f in inputs))) for n in range(num_rows)]
    assert torch.equal(torch.cat(alone), together)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits[order], SampleInputs(*(f[order] for f in inputs))), together[order])


@each_implementation("sample", but="reference")
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize(("size", "scale"), [(2, 1.0), (300, 4.0), (3000, 1.0), (5000, 0.5)])
def test_every_implementation_cuts_where_the_reference_does(sample: Sample, size: int, scale: float) -> None:
    """bfloat16's ties at the cuts, banned tokens, fewer tokens than top-k, and rows without any."""
    num_rows = 32
    logits = random_logits(num_rows, size, seed=size, scale=scale).bfloat16().float()
    logits[random_logits(num_rows, size, seed=1) > 1.3] = -torch.inf
    logits[:6, 5:] = -torch.inf
    logits[6] = -torch.inf
    logits[7, 0] = 3e38
    inputs = mixed_inputs(num_rows, seed=size)
    tokens = sample(logits.clone(), inputs)
    assert tokens.tolist() == reference_sample(logits, inputs).tolist()
    some = slice(3, 12)
    assert torch.equal(sample(logits[some].clone(), SampleInputs(*(f[some] for f in inputs))), tokens[some])


@each_implementation("sample", but="reference")
def test_every_implementation_cuts_equal_tokens_at_the_same_id(sample: Sample) -> None:
    """The mass of half of them is exactly half."""
    cuts = [(5, 1.0), (0, 0.5), (0, 0.51), (40, 0.5), (64, 0.25), (3, 0.9)]
    inputs = make_inputs(4 * len(cuts))._replace(
        top_k=torch.tensor([k for k, _ in cuts], dtype=torch.int32).repeat(4),
        top_p=torch.tensor([p for _, p in cuts]).repeat(4),
    )
    tokens = sample(torch.zeros(4 * len(cuts), 64), inputs)
    assert tokens.tolist() == reference_sample(torch.zeros(4 * len(cuts), 64), inputs).tolist()


def test_greedy_takes_the_first_of_the_best_whatever_the_filters() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [-1.0, -3.0, -1.0, -1.0]])
    for top_k, top_p, min_p in itertools.product([0, 1, 3], [1.0, 0.1], [0.0, 1.0]):
        inputs = make_inputs(2, temperature=0, top_k=top_k, top_p=top_p, min_p=min_p)
        assert sample(logits.clone(), inputs).tolist() == [1, 0]


def test_top_k_1_and_tiny_top_p_are_greedy() -> None:
    logits = random_logits(200, 300, seed=9).bfloat16().float()
    for inputs in (make_inputs(200, top_k=1), make_inputs(200, top_p=1e-7)):
        assert torch.equal(sample(logits.clone(), inputs), logits.argmax(dim=-1))


def test_min_p_1_leaves_all_that_tie_for_the_best() -> None:
    logits = torch.tensor([[3.0, 1.0, 3.0, 2.9999]]).repeat(100, 1)
    assert set(sample(logits, make_inputs(100, min_p=1)).tolist()) == {0, 2}


def test_top_p_stops_where_the_mass_is_reached() -> None:
    """Two of four equal tokens have exactly half of the mass; of equal tokens the lower ids count first."""
    assert set(sample(torch.zeros(100, 4), make_inputs(100, top_p=0.5)).tolist()) == {0, 1}
    assert set(sample(torch.zeros(100, 4), make_inputs(100, top_p=0.51)).tolist()) == {0, 1, 2}


def test_top_p_is_a_share_of_what_top_k_leaves_also_beyond_the_candidates() -> None:
    tokens = sample(torch.zeros(400, 3 * CANDIDATES), make_inputs(400, top_k=2 * CANDIDATES, top_p=0.5))
    assert CANDIDATES * 0.95 < tokens.max() < CANDIDATES


def test_filters_see_the_tempered_distribution() -> None:
    """At temperature 1 the best token has 88 % of the mass, at temperature 10 it has 55 %."""
    logits = torch.tensor([[2.0, 0.0]]).repeat(200, 1)
    assert set(sample(logits.clone(), make_inputs(200, temperature=1, top_p=0.8)).tolist()) == {0}
    assert set(sample(logits.clone(), make_inputs(200, temperature=10, top_p=0.8)).tolist()) == {0, 1}


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 2.0])
def test_extreme_logits_overflow_nothing(temperature: float) -> None:
    logits = torch.tensor([[3e38, -3e38, 1e30, -torch.inf]]).repeat(50, 1)
    for inputs in (make_inputs(50, temperature=temperature), make_inputs(50, temperature=temperature, top_p=0.9)):
        assert set(sample(logits.clone(), inputs).tolist()) == {0}


def test_banned_tokens_are_never_drawn() -> None:
    logits = torch.zeros(2000, 8)
    logits[:, ::2] = -torch.inf
    for inputs in (make_inputs(2000, temperature=2), make_inputs(2000, top_k=6), make_inputs(2000, top_p=0.99)):
        assert set(sample(logits.clone(), inputs).tolist()) == {1, 3, 5, 7}


def test_a_row_without_any_token_left_gives_a_valid_id() -> None:
    logits = torch.full((3, 5), -torch.inf)
    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.5)):
        assert sample(logits.clone(), make_inputs(3, temperature=temperature, top_p=top_p)).tolist() == [0, 0, 0]


def test_nobody_pays_for_what_nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("not asked for")

    logits = random_logits(4, 50, seed=2)
    monkeypatch.setattr(module, "best_ids", refuse)
    sample(logits.clone(), make_inputs(4, temperature=1, min_p=0.1))
    monkeypatch.setattr(module, "gumbel_noise", refuse)
    sample(logits.clone(), make_inputs(4, temperature=0, top_k=5, top_p=0.5))
