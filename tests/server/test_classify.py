"""/classify, /pooling, /v1/score and /v1/rerank: a classifier's head, or the probabilities of words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.server.conftest import Bench
from tests.server.test_embeddings import post
from tests.server.vector_server import save_model, serve_model

TEXTS = ["hello the world", "the", "hello hello hello hello in the hell"]
LABELS = [" yes", " no", " hello the", " he"]  # of several tokens and of one; some begin alike
CLASSIFIER = "JambaForSequenceClassification"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, Path]]:
    """Models by their number of labels; 0 is a language model."""
    found: dict[int, tuple[Any, Path]] = {}
    for number in (0, 1, 3):
        folder = tmp_path_factory.mktemp(f"labels{number}")
        kind: dict[str, Any] = {"architecture": CLASSIFIER, "num_labels": number} if number else {}
        found[number] = save_model(folder, **kind), folder
    return found


@pytest.fixture(scope="module")
def classifier(folders: dict[int, tuple[Any, Path]]) -> Bench:
    return serve_model(folders[3][1], template=False)


@pytest.fixture(scope="module")
def scorer(folders: dict[int, tuple[Any, Path]]) -> Bench:
    return serve_model(folders[1][1], template=False)


@pytest.fixture(scope="module")
def language_model(folders: dict[int, tuple[Any, Path]]) -> Bench:
    return serve_model(folders[0][1])


def logits(oracle: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return oracle(torch.tensor([ids])).logits[0]


async def test_classes_equal_transformers(folders: dict[int, tuple[Any, Path]], classifier: Bench) -> None:
    found = await post(classifier, "/classify", input=TEXTS)
    raw = await post(classifier, "/classify", input=TEXTS, use_activation=False)
    pooled = await post(classifier, "/pooling", input=TEXTS)
    assert found["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    for number, request in enumerate(classifier.engine.requests[-3:]):
        expected = logits(folders[3][0], request.prompt)
        item = found["data"][number]
        assert np.abs(np.array(raw["data"][number]["probs"]) - expected.numpy()).max() < 1e-4
        assert np.abs(np.array(item["probs"]) - expected.softmax(-1).numpy()).max() < 1e-4
        assert (item["label"], item["num_classes"]) == (f"LABEL_{int(expected.argmax())}", 3)
        assert pooled["data"][number]["data"] == item["probs"]
    assert found["usage"]["prompt_tokens"] == sum(len(r.prompt) for r in classifier.engine.requests[-3:])


async def test_padding_at_the_end_is_not_read(folders: dict[int, tuple[Any, Path]], classifier: Bench) -> None:
    """As in transformers, whose tokenizers pad batches."""
    tokens = [9, 0, 8, 0, 0]
    padded = await post(classifier, "/classify", input=tokens, use_activation=False)
    assert np.abs(np.array(padded["data"][0]["probs"]) - logits(folders[3][0], tokens).numpy()).max() < 1e-4
    assert padded["data"] == (await post(classifier, "/classify", input=tokens[:3], use_activation=False))["data"]


async def test_scores_and_ranks_equal_transformers(folders: dict[int, tuple[Any, Path]], scorer: Bench) -> None:
    oracle, folder = folders[1]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    encoded = [tokenizer(TEXTS[0], text)["input_ids"] for text in TEXTS]
    expected = [float(logits(oracle, ids)[0].sigmoid()) for ids in encoded]
    found = await post(scorer, "/v1/score", text_1=TEXTS[0], text_2=TEXTS)
    assert [request.prompt for request in scorer.engine.requests[-3:]] == encoded
    scores = [item["score"] for item in found["data"]]
    assert scores == pytest.approx(expected, abs=1e-4)
    pairs = await post(scorer, "/score", text_1=[TEXTS[0], TEXTS[0]], text_2=TEXTS[:2])
    assert [item["score"] for item in pairs["data"]] == scores[:2]
    ranked = await post(scorer, "/v1/rerank", query=TEXTS[0], documents=[*TEXTS[:2], {"text": TEXTS[2]}])
    order = sorted(range(3), key=lambda i: -scores[i])
    assert [(item["index"], item["relevance_score"]) for item in ranked["results"]] == [(i, scores[i]) for i in order]
    assert [item["document"]["text"] for item in ranked["results"]] == [TEXTS[i] for i in order]
    best = await post(scorer, "/rerank", query=TEXTS[0], documents=TEXTS, top_n=1, return_documents=False)
    assert best["results"] == [{"index": order[0], "relevance_score": scores[order[0]]}]
    assert (await post(scorer, "/v2/rerank", query=TEXTS[0], documents=TEXTS))["results"] == ranked["results"]
    classes = await post(scorer, "/classify", input=encoded[0])
    assert classes["data"][0]["probs"] == [scores[0]]
    error = await post(scorer, "/v1/score", 400, text_1=TEXTS, text_2=TEXTS[:2])
    assert error["error"]["param"] == "text_1"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(None, "softmax"), ("multi_label_classification", "sigmoid"), ("regression", "none")],
)
async def test_the_problem_type_decides_what_the_outputs_mean(kind: str | None, expected: str, tmp_path: Path) -> None:
    oracle = save_model(tmp_path, architecture=CLASSIFIER, num_labels=2, problem_type=kind)
    bench = serve_model(tmp_path, template=False)
    probs = (await post(bench, "/classify", input=[5, 6]))["data"][0]["probs"]
    raw = logits(oracle, [5, 6])
    wanted = {"softmax": raw.softmax(-1), "sigmoid": raw.sigmoid(), "none": raw}[expected]
    assert np.abs(np.array(probs) - wanted.numpy()).max() < 1e-4


# Words of a language model --------------------------------------------------------------------------------------------


async def test_labels_equal_the_logprobs_of_completions(language_model: Bench) -> None:
    found = await post(language_model, "/classify", input=TEXTS, labels=LABELS)
    for text, item in zip(TEXTS, found["data"], strict=True):
        for label, logprob in zip(LABELS, item["logprobs"], strict=True):
            prompt = await tokens_of(language_model, text, True)
            words = await tokens_of(language_model, label, False)
            scored = await post(
                language_model, "/v1/completions", prompt=[*prompt, *words], echo=True, max_tokens=0, logprobs=0
            )
            parts = scored["choices"][0]["logprobs"]["token_logprobs"][-len(words) :]
            assert logprob == sum(parts[1:], start=parts[0])
        total = sum(map(math.exp, item["logprobs"]))
        assert item["probs"] == pytest.approx([math.exp(each) / total for each in item["logprobs"]])
        assert item["label"] == LABELS[item["logprobs"].index(max(item["logprobs"]))]
        assert item["num_classes"] == 4


async def tokens_of(bench: Bench, text: str, special: bool) -> list[int]:
    return (await post(bench, "/tokenize", prompt=text, add_special_tokens=special))["tokens"]


async def test_the_prompt_of_labels_is_computed_once(folders: dict[int, tuple[Any, Path]]) -> None:
    bench = serve_model(folders[0][1])
    prompt = [5 + number % 80 for number in range(101)]  # no multiple of a page
    await post(bench, "/classify", input=prompt, labels=LABELS)
    whole, *forks = bench.engine.requests
    stats = bench.engine.stats
    assert len(whole.prompt) == 101
    assert [request.prompt[:101] for request in forks] == [prompt] * len(forks)
    assert {len(request.targets) + 1 for request in forks} > {2}, "some labels have three tokens or more"
    assert stats.prefix_hits_total == 101 * len(forks), "a fork computed a part of the prompt again"


async def test_the_option_gives_labels(folders: dict[int, tuple[Any, Path]], language_model: Bench) -> None:
    bench = serve_model(folders[0][1], classify_labels=" yes, no")
    found = await post(bench, "/classify", input=TEXTS[0])
    assert found["labels"] == [" yes", " no"]
    assert found["data"] == (await post(language_model, "/classify", input=TEXTS[0], labels=[" yes", " no"]))["data"]
    for wrong in (["a", "a"], [""], []):
        await post(language_model, "/classify", 400, input="a", labels=wrong)


# What a model cannot do -----------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "Hi"}]
QUESTION = {"type": "predicate", "instructions": "It is."}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": MESSAGES, "max_tokens": 3, "model": "jamba"}),
        ("/v1/decisions", {"input": "a", "questions": [QUESTION]}),
    ],
)
async def test_a_classifier_writes_no_text(classifier: Bench, path: str, body: dict[str, Any]) -> None:
    error = (await post(classifier, path, 400, **body))["error"]
    assert "classifier" in error["message"]
    assert "/classify" in error["message"]
    assert path == "/v1/messages" or (error["param"], error["code"]) == ("model", "model_not_capable")


@pytest.mark.parametrize("path", ["/v1/score", "/v1/rerank"])
async def test_scores_need_one_label(classifier: Bench, language_model: Bench, path: str) -> None:
    body = {"text_1": "a", "text_2": "b"} if path == "/v1/score" else {"query": "a", "documents": ["b"]}
    for bench, what in ((classifier, "3 labels"), (language_model, "language model")):
        error = (await post(bench, path, 400, **body))["error"]
        assert what in error["message"]
        assert error["code"] == "model_not_capable"


async def test_other_refusals(classifier: Bench, language_model: Bench) -> None:
    for bench, path, body in (
        (language_model, "/classify", {"input": "a"}),
        (language_model, "/pooling", {"input": "a", "task": "classify"}),
        (classifier, "/classify", {"input": "a", "labels": ["b"]}),
        (classifier, "/pooling", {"input": "a", "dimensions": 2}),
    ):
        await post(bench, path, 400, **body)
    embedding = await post(classifier, "/v1/embeddings", input="a")
    assert len(embedding["data"][0]["embedding"]) == 32, "a classifier has hidden states, too"


async def test_what_is_too_long_is_named(language_model: Bench) -> None:
    limit = language_model.app.state.services.engine.info.max_model_len
    for path, body, param, why in (
        ("/v1/embeddings", {"input": [[1], [1] * (limit + 1)]}, "input.1", f"is {limit} tokens; the prompt has"),
        ("/classify", {"input": "a", "labels": ["b", " the" * limit]}, "labels.1", f"at most {limit}"),
        ("/classify", {"input": "a", "labels": ["b", "c" * 3_000_000]}, "labels.1", "3000000 bytes"),
    ):
        error = (await post(language_model, path, 400, **body))["error"]
        assert (error["param"], error["code"]) == (param, "context_length_exceeded"), error
        assert why in error["message"]
    await post(language_model, "/v1/embeddings", input=[1] * limit)
