"""Keys, penalties, log-probabilities and the sampler, against numpy in float64."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import cast

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import NoBadWordsLogitsProcessor

from jamba_server.engine.sampling.keys import row_key
from jamba_server.engine.sampling.logprobs import PendingLogprobs
from jamba_server.engine.sampling.penalties import adjust_logits
from jamba_server.engine.sampling.sampler import SampledToken, Sampler, SamplingRow
from jamba_server.engine.types import SamplingParams, TokenLogprob
from jamba_server.kernels.ops import Kernels
from jamba_server.kernels.reference.sample import sample

VOCAB = 211
EOS = (2, 5)
RICH = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    top_k=40,
    min_p=0.01,
    repetition_penalty=1.3,
    presence_penalty=0.4,
    frequency_penalty=0.7,
    logit_bias={3: 4.0, 9: -100.0},
    min_tokens=50,
    max_tokens=60,
    stop_token_ids=(11,),
    seed=7,
    logprobs=5,
)


def make_row(
    params: SamplingParams, *, prompt: tuple[int, ...] = (1, 4, 4), generated: tuple[int, ...] = (), choice: int = 0
) -> SamplingRow:
    return SamplingRow(params=params, tokens=[*prompt, *generated], num_prompt=len(prompt), choice=choice)


def make_sampler(vocab_size: int = VOCAB) -> Sampler:
    return Sampler(cast(Kernels, SimpleNamespace(sample=sample)), vocab_size, EOS)


def random_logits(num_rows: int, seed: int = 0, size: int = VOCAB) -> Tensor:
    return torch.randn(num_rows, size, generator=torch.Generator().manual_seed(seed)) * 3


def mixed_rows(num_rows: int) -> list[SamplingRow]:
    rng = np.random.default_rng(0)
    rows: list[SamplingRow] = []
    for n in range(num_rows):
        params = msgspec.structs.replace(
            RICH,
            temperature=(0.0, 0.5, 1.5)[n % 3],
            top_p=(1.0, 0.9)[n % 2],
            repetition_penalty=(1.0, 1.3)[n // 2 % 2],
            logit_bias=({}, {n: 3.0})[n // 3 % 2],
            min_tokens=(0, 4)[n // 5 % 2],
            bad_words=((), ((7,), (1, 8), (n, n)))[n // 2 % 2],
            allowed_token_ids=((), tuple(range(20 + n)))[n // 7 % 2],
            logprobs=(None, 0, 3, 20)[n % 4],
            seed=n // 4,
        )
        tokens = rng.integers(0, VOCAB, 3 + n % 7).tolist()
        rows.append(SamplingRow(params=params, tokens=tokens, num_prompt=2, choice=n % 3))
    return rows


# Keys ---------------------------------------------------------------------------------------------------------------


def test_keys_are_signed_64_bit_and_all_different() -> None:
    seeds = (0, 1, 2, -1, 2**63 - 1, -(2**63))
    keys = [row_key(s, c, p) for s in seeds for c in range(8) for p in range(200)]
    assert len(set(keys)) == len(keys)
    assert min(keys) < 0 < max(keys)
    assert torch.tensor(keys, dtype=torch.int64).tolist() == keys


def test_keys_stay_what_they_are() -> None:
    """A seed gives the same reply in every process and after every upgrade. 0xE220A8397B1DCDAF is the published first
    output of splitmix64 seeded with 0; the rest chains the same step, written out in numpy."""

    def step(word: int) -> int:
        with np.errstate(over="ignore"):
            z = np.uint64(word) + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int(z ^ (z >> np.uint64(31)))

    assert step(0) == 0xE220A8397B1DCDAF
    assert row_key(0, 0, 0) % 2**64 == step(step(step(0)))
    assert row_key(-3, 2, 77) % 2**64 == step(step(step(2**64 - 3) ^ 2) ^ 77)


# Penalties ----------------------------------------------------------------------------------------------------------


def adjusted(x: NDArray[np.float64], row: SamplingRow) -> NDArray[np.float64]:
    """Returns adjusted logits, computed token by token from the definitions of the parameters."""
    x, params = x.copy(), row.params
    generated = Counter(row.tokens[row.num_prompt :])
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in set(row.tokens):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token, count in generated.items():
        x[token] -= params.frequency_penalty * count + params.presence_penalty
    if generated.total() < params.min_tokens:
        x[list({*EOS, *params.stop_token_ids})] = -np.inf
    for word in params.bad_words:  # would the reply contain it if its last token came next?
        reply = [*row.tokens[row.num_prompt :], word[-1]]
        if tuple(reply[-len(word) :]) == word:
            x[word[-1]] = -np.inf
    for token in range(len(x)):
        if params.allowed_token_ids and token not in params.allowed_token_ids:
            x[token] = -np.inf
    return x


PENALTIES: list[dict[str, object]] = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"presence_penalty": 1.5},
    {"presence_penalty": -2.0, "frequency_penalty": -0.5},
    {"frequency_penalty": 0.9},
    {"logit_bias": {0: 1.5, 17: -100.0, 210: 100.0}},
    {"min_tokens": 9, "stop_token_ids": (17, 5, 40)},
    {"min_tokens": 8, "stop_token_ids": (17,)},
    {"min_tokens": 9, "ignore_eos": True},
    {"min_tokens": 9, "logit_bias": {2: 100.0}},
    {"bad_words": ((33,), (8, 60), (60, 4), (60, 7), (3, 1, 8, 60, 9), (17, 17, 17, 8, 3, 1, 8, 60, 5), (4, 17))},
    {"bad_words": ((1, 4, 4, 17), (4, 9), (210,))},
    {"allowed_token_ids": (4, 17, 210, 17)},
    {"allowed_token_ids": (4, 17, 2), "bad_words": ((60, 4), (8, 60, 17), (4,)), "logit_bias": {9: 100.0, 17: 2.0}},
    {"logit_bias": {17: 2.0, 3: 1.0}, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.25},
]


@pytest.mark.parametrize("fields", PENALTIES, ids=str)
def test_penalties_equal_the_oracle_and_leave_other_rows_alone(fields: dict[str, object]) -> None:
    plain = SamplingParams(temperature=0.3, top_k=5, seed=3)
    asking = msgspec.structs.replace(plain, **fields)
    generated = (17, 17, 17, 8, 3, 1, 8, 60)
    rows = [
        make_row(plain, generated=generated),
        make_row(asking, generated=generated),
        make_row(plain),
        make_row(asking),
    ]
    before = random_logits(4, seed=1)
    after = before.clone()
    adjust_logits(after, rows, EOS)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    for n in (1, 3):
        np.testing.assert_allclose(
            after[n].numpy(), adjusted(before[n].double().numpy(), rows[n]), rtol=1e-6, atol=1e-5
        )
    assert not torch.equal(after[[1, 3]], before[[1, 3]])


def test_tokens_of_the_prompt_count_for_repetition_only() -> None:
    before = random_logits(1).abs() + 1
    for fields, changed in (({"repetition_penalty": 2.0}, {1, 4}), ({"frequency_penalty": 2.0}, set[int]())):
        after = before.clone()
        adjust_logits(after, [make_row(msgspec.structs.replace(SamplingParams(), **fields))], EOS)
        assert set((after != before)[0].nonzero().flatten().tolist()) == changed
    after = before.clone()
    adjust_logits(after, [make_row(SamplingParams(repetition_penalty=2.0))], EOS)
    assert after[0, 4] == before[0, 4] / 2  # it stands in the prompt twice


def test_bad_words_are_those_of_transformers() -> None:
    """transformers looks at the prompt too, so there is none."""
    words = [[7], [1, 2], [2, 1], [1, 1, 2], [2, 2, 2, 2], [0, 1, 2, 0]]
    oracle = NoBadWordsLogitsProcessor(words)
    params = SamplingParams(bad_words=tuple(map(tuple, words)))
    replies = np.random.default_rng(2).integers(0, 3, (300, 5))
    before = random_logits(len(replies))
    after = before.clone()
    adjust_logits(after, [make_row(params, prompt=(), generated=tuple(reply)) for reply in replies.tolist()], EOS)
    assert torch.equal(after, oracle(cast(torch.LongTensor, torch.from_numpy(replies)), before))
    assert len({tuple(row.isneginf().nonzero().flatten().tolist()) for row in after}) > 3


def test_min_tokens_ends_when_they_are_there() -> None:
    params = SamplingParams(min_tokens=2, max_tokens=5, stop_token_ids=(30,))
    logits = torch.zeros(3, VOCAB)
    adjust_logits(logits, [make_row(params, generated=(8,) * n) for n in range(3)], EOS)
    assert logits.isneginf().sum(dim=-1).tolist() == [3, 3, 0]
    assert logits[0].isneginf().nonzero().flatten().tolist() == [2, 5, 30]


# Log-probabilities --------------------------------------------------------------------------------------------------


def token_logprobs(logits: Tensor, token_ids: list[int], counts: list[int]) -> list[TokenLogprob]:
    return PendingLogprobs(logits, token_ids, counts).read()


def test_logprobs_equal_the_oracle() -> None:
    logits = random_logits(6, seed=4)
    chosen, counts = [0, 210, 33, 4, 100, 7], [0, 1, 5, 20, 0, 3]
    for x, token, count, result in zip(
        logits.double().numpy(), chosen, counts, token_logprobs(logits, chosen, counts), strict=True
    ):
        logprobs = x - x.max() - np.log(np.exp(x - x.max()).sum())
        assert result.token_id == token
        assert result.logprob == pytest.approx(logprobs[token], abs=1e-5)
        assert [i for i, _ in result.top] == np.argsort(-x)[:count].tolist()
        assert [p for _, p in result.top] == pytest.approx(np.sort(logprobs)[::-1][:count].tolist(), abs=1e-5)


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [50, 150, 100]] = 1.0
    (result,) = token_logprobs(logits, [7], [20])
    assert [i for i, _ in result.top] == [50, 100, 150, *range(17)]
    assert len({p for _, p in result.top}) == 2


def test_a_certain_token_has_logprob_zero() -> None:
    logits = torch.full((1, VOCAB), -1e4)
    logits[0, 9] = 1e4
    (result,) = token_logprobs(logits, [9], [2])
    assert result == TokenLogprob(9, 0.0, ((9, 0.0), (0, -2e4)))


@pytest.mark.parametrize("size", [211, 40_001])
def test_logprobs_of_a_row_do_not_depend_on_the_others(size: int) -> None:
    logits = random_logits(8, size=size).bfloat16().float()
    chosen, counts = [3, 1, 4, 1, 5, 9, 2, 6], [0, 20, 1, 5, 20, 0, 7, 2]
    together = token_logprobs(logits, chosen, counts)
    assert [token_logprobs(logits[n : n + 1], chosen[n : n + 1], counts[n : n + 1])[0] for n in range(8)] == together
    assert (
        token_logprobs(logits[:3], chosen[:3], counts[:3]) + token_logprobs(logits[3:], chosen[3:], counts[3:])
        == together
    )
    assert [result.top[:2] for result in token_logprobs(logits, chosen, [2] * 8)][4] == together[4].top[:2]


def test_a_small_vocabulary_gives_all_it_has() -> None:
    (result,) = token_logprobs(torch.tensor([[1.0, 3.0, 2.0]]), [0], [20])
    assert [i for i, _ in result.top] == [1, 2, 0]
    (token,) = make_sampler(8).sample(torch.zeros(1, 8), [make_row(SamplingParams(logprobs=20))])
    assert token.logprob is not None
    assert [i for i, _ in token.logprob.top] == list(range(8))


# Sampler ------------------------------------------------------------------------------------------------------------


def test_a_row_gives_the_same_token_and_logprobs_alone_and_in_any_batch() -> None:
    logits, rows = random_logits(60, seed=8), mixed_rows(60)
    sampler = make_sampler()
    together = sampler.sample(logits.clone(), rows)
    assert [sampler.sample(logits[n : n + 1].clone(), [row])[0] for n, row in enumerate(rows)] == together
    order = np.random.default_rng(1).permutation(60).tolist()
    assert sampler.sample(logits[order], [rows[n] for n in order]) == [together[n] for n in order]
    assert make_sampler().sample(logits.clone(), rows) == together


def test_rows_and_their_tokens_are_not_changed() -> None:
    rows = mixed_rows(12)
    tokens = [list(row.tokens) for row in rows]
    make_sampler().sample(random_logits(12), rows)
    assert [row.tokens for row in rows] == tokens


def test_logprobs_are_raw() -> None:
    logits = random_logits(1, seed=2)
    greedy = msgspec.structs.replace(RICH, temperature=0.0, logit_bias={77: 100.0})
    for params in (RICH, greedy):
        (token,) = make_sampler().sample(logits.clone(), [make_row(params, generated=(8, 8))])
        assert token.logprob == token_logprobs(logits, [token.token_id], [5])[0]
    (token,) = make_sampler().sample(logits.clone(), [make_row(greedy, generated=(8, 8))])
    assert token.token_id == 77


def test_logprobs_come_to_those_who_ask() -> None:
    rows = [make_row(SamplingParams(logprobs=k)) for k in (None, 0, 20, None, 3)]
    tokens = make_sampler().sample(random_logits(5), rows)
    assert [None if t.logprob is None else len(t.logprob.top) for t in tokens] == [None, 0, 20, None, 3]
    assert all(t.logprob is None or t.logprob.token_id == t.token_id for t in tokens)
    assert tokens[0] == SampledToken(tokens[0].token_id)


def stream(params: SamplingParams, *, choice: int = 0, num_prompt: int = 3, steps: int = 60) -> list[int]:
    """Returns a reply of a model that gives the same flat logits at every position."""
    logits, sampler, tokens = random_logits(1, seed=6) * 0.2, make_sampler(), [1] * num_prompt
    for _ in range(steps):
        row = SamplingRow(params=params, tokens=tokens, num_prompt=num_prompt, choice=choice)
        tokens.append(sampler.sample(logits.clone(), [row])[0].token_id)
    return tokens[num_prompt:]


def test_seed_choice_and_position_each_give_their_own_stream() -> None:
    params = SamplingParams(seed=5)
    first = stream(params)
    assert stream(params) == first
    assert len(set(first)) > 30  # positions differ
    for other in (stream(SamplingParams(seed=6)), stream(params, choice=1)):
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 8
    assert stream(params, num_prompt=13)[:50] == first[10:]  # the position is absolute


def test_replayed_tokens_continue_the_stream() -> None:
    """After a restart the generated tokens arrive with the request; penalties and min_tokens follow from them."""
    logits, sampler = random_logits(20, seed=12) * 0.3, make_sampler()
    params = msgspec.structs.replace(RICH, min_tokens=10)
    tokens = [1, 4, 4]
    for n in range(20):
        tokens.append(
            sampler.sample(logits[n : n + 1].clone(), [make_row(params, generated=tuple(tokens[3:]))])[0].token_id
        )
    resumed = tokens[:12]
    for n in range(9, 20):
        row = SamplingRow(params=params, tokens=resumed, num_prompt=3, choice=0)
        resumed.append(make_sampler().sample(logits[n : n + 1].clone(), [row])[0].token_id)
    assert resumed == tokens


def test_frequencies_over_seeds_are_the_softmax() -> None:
    """Chi-square with VOCAB - 1 degrees of freedom, over fixed seeds."""
    num_draws = 20_000
    logits = random_logits(1, seed=13, size=40) * 0.3
    rows = [make_row(SamplingParams(seed=seed, temperature=1.5)) for seed in range(num_draws)]
    tokens = make_sampler(40).sample(logits.repeat(num_draws, 1), rows)
    p = np.exp(logits[0].double().numpy() / 1.5)
    expected = p / p.sum() * num_draws
    counts = np.bincount([token.token_id for token in tokens], minlength=40)
    assert ((counts - expected) ** 2 / expected).sum() < 39 + 5 * np.sqrt(2 * 39)


def test_temperature_zero_with_everything_disabled_is_argmax() -> None:
    logits = random_logits(30, seed=14).bfloat16().float()
    off = SamplingParams(temperature=0.0)
    asked = [
        off,
        msgspec.structs.replace(off, top_k=3),
        msgspec.structs.replace(off, top_k=10**6, top_p=0.5, min_p=0.5),
        msgspec.structs.replace(off, seed=99, max_tokens=4, ignore_eos=True, stop_token_ids=(1,)),
        msgspec.structs.replace(off, logit_bias={}, repetition_penalty=1.0, min_tokens=0),
    ]
    for params in asked:
        tokens = make_sampler().sample(logits.clone(), [make_row(params, generated=(7, 7))] * 30)
        assert [token.token_id for token in tokens] == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-6}], ids=str)
def test_each_filter_reaches_the_kernel(fields: dict[str, object]) -> None:
    logits = random_logits(40, seed=16)
    rows = [make_row(msgspec.structs.replace(SamplingParams(seed=n, temperature=1.5), **fields)) for n in range(40)]
    tokens = make_sampler().sample(logits.clone(), rows)
    assert [token.token_id for token in tokens] == logits.argmax(dim=-1).tolist()


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    logits = random_logits(200, seed=15)
    for top_k in (VOCAB, 2**31 - 1):
        rows = [make_row(SamplingParams(seed=n, top_k=top_k)) for n in range(200)]
        everything = [make_row(SamplingParams(seed=n)) for n in range(200)]
        assert make_sampler().sample(logits.clone(), rows) == make_sampler().sample(logits.clone(), everything)


def test_no_end_token_before_min_tokens() -> None:
    logits = torch.full((300, VOCAB), -10.0)
    logits[:, [2, 5, 30]] = 10.0
    params = SamplingParams(min_tokens=1, stop_token_ids=(30,), top_p=0.9)
    rows = [make_row(msgspec.structs.replace(params, seed=n)) for n in range(300)]
    assert not {token.token_id for token in make_sampler().sample(logits.clone(), rows)} & {2, 5, 30}
    later = [make_row(row.params, generated=(8,)) for row in rows]
    assert {token.token_id for token in make_sampler().sample(logits, later)} == {2, 5, 30}
