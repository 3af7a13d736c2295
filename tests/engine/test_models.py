"""The model against transformers for whole prompts, and against float64 numpy for every way to feed it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jamba_server.engine.model_config import ARCHITECTURES, load_model_config
from jamba_server.engine.models import MODELS, Model, build_model
from jamba_server.engine.start.weights import dummy_weights, load_weights
from jamba_server.kernels.table import select
from tests.engine.feeding import Feed, Feeder
from tests.numpy_jamba import Array, LayerState, NumpyJamba, golden_weights
from tests.tiny import TINY_CONFIGS, oracle_logits, save_tiny

CPU = torch.device("cpu")
GOLDEN_PROMPT = [1, 5, 7, 3, 9, 30, 11]
GOLDEN_CONFIG = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 4,
    "attn_layer_offset": 2,
    "mamba_d_state": 4,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": 2,
}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    model = build_model(load_model_config(folder), select("cpu", {}), dtype=dtype, device=CPU)
    load_weights(model, folder, lambda phase, fraction: None)
    return model


def numpy_model(folder: Path) -> NumpyJamba:
    weights = {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    return NumpyJamba(load_model_config(folder), weights)


def make_ids(length: int, *, seed: int, vocab_size: int = 64) -> list[int]:
    random = Random(seed)
    return [random.randrange(vocab_size) for _ in range(length)]


def assert_logits(actual: torch.Tensor, expected: Array | torch.Tensor) -> None:
    """Checks that logits differ by at most 1e-4 of their spread, because float32 sums have another order."""
    expected = np.asarray(expected, dtype=np.float64)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-4 * expected.std())


def test_every_supported_architecture_has_a_class() -> None:
    assert set(MODELS) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_whole_prompts_equal_transformers(name: str, tmp_path: Path) -> None:
    oracle = save_tiny(tmp_path, **TINY_CONFIGS[name])
    model = load(tmp_path)
    assert model.config.num_parameters() == sum(p.numel() for p in oracle.parameters())
    for length in (1, 2, 3, 70):
        feeder, ids = Feeder(model), make_ids(length, seed=length)
        [logits] = feeder.step([Feed(feeder.new_sequence(), ids)])
        assert_logits(logits, oracle_logits(oracle, ids))


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_any_chunking_and_mixture_equals_numpy(name: str, tmp_path: Path) -> None:
    """Four sequences in random pieces, batched at random: single tokens beside long pieces, first beside last."""
    save_tiny(tmp_path, **TINY_CONFIGS[name])
    model, reference = load(tmp_path), numpy_model(tmp_path)
    texts = [make_ids(length, seed=length) for length in (1, 9, 23, 40)]
    expected = [reference.forward(ids, reference.new_state()) for ids in texts]
    for seed in range(3):
        random, feeder = Random(seed), Feeder(model)
        fed = [feeder.new_sequence() for _ in texts]
        logits: list[list[torch.Tensor]] = [[] for _ in texts]
        decodes_beside_prefills = 0
        while unfinished := [i for i, ids in enumerate(texts) if fed[i].length < len(ids)]:
            chosen = random.sample(unfinished, random.randint(1, len(unfinished)))
            pieces = [texts[i][fed[i].length :][: random.choice((1, 1, 2, 3, 8))] for i in chosen]
            feeds = [Feed(fed[i], piece) for i, piece in zip(chosen, pieces, strict=True)]
            decodes_beside_prefills += 0 < sum(feed.is_decode for feed in feeds) < len(feeds)
            for i, part in zip(chosen, feeder.step(feeds), strict=True):
                logits[i].append(part)
        assert decodes_beside_prefills > 0
        for parts, rows in zip(logits, expected, strict=True):
            assert_logits(torch.cat(parts), rows)


def test_states_saved_inside_a_chunk_continue_as_the_sequence_does(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    feeder, ids, saved_slot = Feeder(load(tmp_path)), make_ids(12, seed=0), 11
    whole = feeder.new_sequence()
    other = feeder.new_sequence()
    feeds = [Feed(other, ids[:5]), Feed(whole, ids[:3]), Feed(whole, ids[3:], saves=[(5, saved_slot)])]
    feeder.step(feeds[:2])
    [rest] = feeder.step(feeds[2:])
    copy = replace(whole, slot=saved_slot, length=8)  # it shares the pages, whose later tokens it writes again
    [again] = feeder.step([Feed(copy, ids[8:])])
    torch.testing.assert_close(again, rest[5:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_classification_equals_transformers(num_labels: int, tmp_path: Path) -> None:
    oracle = save_tiny(tmp_path, architecture="JambaForSequenceClassification", num_labels=num_labels)
    model, ids = load(tmp_path), [1, *make_ids(20, seed=0, vocab_size=60)[1:], 9]
    assert model.config.num_parameters() == sum(p.numel() for p in oracle.parameters())
    feeder = Feeder(model)
    [scores] = feeder.step([Feed(feeder.new_sequence(), ids)])
    expected = oracle(torch.tensor([ids]), use_cache=False).logits.detach()
    assert scores[-1:].shape == (1, num_labels)
    torch.testing.assert_close(scores[-1:], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dense-mqa-tied", "conv3-state8-all-biases"])
def test_half_precision_stays_near_float32(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense: dict[str, Any] = {**TINY_CONFIGS[name], "num_experts": 1}  # rounding may send a token to another expert
    save_tiny(tmp_path, **dense)
    ids, results = make_ids(30, seed=0), list[torch.Tensor]()
    for kind in (torch.float32, dtype):
        feeder = Feeder(load(tmp_path, kind), dtype=kind)
        fed = feeder.new_sequence()
        results.append(torch.cat([feeder.step([Feed(fed, piece)])[0] for piece in (ids[:20], ids[20:21], ids[21:])]))
    exact, rounded = results
    assert rounded.dtype == torch.float32
    relative = (rounded - exact).norm() / exact.norm()
    assert 0 < relative < 12 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_random_weights_give_finite_and_different_logits(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, **TINY_CONFIGS[name])
    model = build_model(load_model_config(tmp_path), select("cpu", {}), dtype=torch.bfloat16, device=CPU)
    dummy_weights(model, seed=1)
    feeder = Feeder(model, dtype=torch.bfloat16)
    [logits] = feeder.step([Feed(feeder.new_sequence(), make_ids(60, seed=3))])
    assert logits.isfinite().all()
    assert logits.abs().max() < 100
    assert len(set(logits.argmax(-1).tolist())) > 10


class TestGoldenNumbers:
    """Compares with numbers of an independent program, which agree with transformers 4.57 and 5.17 to 6e-7."""

    LAST_LOGITS_FIRST = (-0.372165, 0.122657, 0.421965, 0.048665, -0.402207, -0.211965, 0.316147, 0.340324)
    LAST_LOGITS_LAST = (-0.403595, -0.208066, 0.319118, 0.337631, -0.182036)
    ARGMAX = (10, 28, 3, 17, 9, 25, 2)
    SUM, MAX_ABS = 0.335385, 1.612711
    SSM = (-0.107736, 0.279723, -0.347340, 0.323632)
    CONV = (3.665624, -4.120506, -2.596443)
    GREEDY = (2, 11, 20, 29, 15, 1, 10, 19, 14, 14, 0, 18)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(GOLDEN_CONFIG))
        weights = golden_weights(load_model_config(tmp_path))
        assert (len(weights), sum(w.size for w in weights.values())) == (83, 20_430)
        tensors = {name: torch.from_numpy(w.astype(np.float32)) for name, w in weights.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    def check(self, logits: Any, ssm: Any, conv: Any, *, atol: float) -> None:
        def close(actual: Any, expected: Any, atol: float = atol) -> None:
            np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)

        close(logits[-1, :8], self.LAST_LOGITS_FIRST)
        close(logits[-1, -5:], self.LAST_LOGITS_LAST)
        assert tuple(logits.argmax(-1).tolist()) == self.ARGMAX
        close(abs(logits).max(), self.MAX_ABS)
        close(logits.sum(), self.SUM, atol * logits.size)
        close(ssm, self.SSM)
        close(conv, self.CONV)

    @pytest.mark.parametrize("cuts", [[7], [3, 4], [1] * 7])
    def test_numpy(self, cuts: list[int], folder: Path) -> None:
        reference = numpy_model(folder)
        state: list[LayerState] = reference.new_state()
        ends = np.cumsum(cuts)
        logits = np.concatenate(
            [reference.forward(GOLDEN_PROMPT[end - cut : end], state) for cut, end in zip(cuts, ends, strict=True)]
        )
        self.check(logits, state[0].ssm[0], state[0].conv[:, 0], atol=6e-7)

    @pytest.mark.parametrize("cuts", [[7], [3, 4], [1] * 7])
    def test_model(self, cuts: list[int], folder: Path) -> None:
        feeder = Feeder(load(folder))
        fed = feeder.new_sequence()
        parts = [feeder.step([Feed(fed, piece.tolist())])[0] for piece in torch.tensor(GOLDEN_PROMPT).split(cuts)]
        logits, storage = torch.cat(parts).numpy(), feeder.storage
        self.check(logits, storage.ssm[fed.slot, 0, 0].numpy(), storage.conv[fed.slot, 0, :, 0].numpy(), atol=5e-6)
        tokens = [int(logits[-1].argmax())]
        while len(tokens) < len(self.GREEDY):
            [row] = feeder.step([Feed(fed, tokens[-1:])])
            tokens.append(int(row.argmax()))
        assert tuple(tokens) == self.GREEDY
