"""/v1/decisions on a real engine: the official client, the probabilities, and the input computed once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types import Decision

from jamba_server.server.text.decision_prompt import (
    DecisionQuestion,
    Option,
    choice_confidence,
    expected_level,
    score_confidence,
    with_question,
)
from tests.conformance.strict import check
from tests.server.conftest import Bench
from tests.server.test_embeddings import post
from tests.server.vector_server import save_model, serve_model

STATE = "hello the world in the hell " * 12
PREDICATE = {"type": "predicate", "name": "hot", "instructions": "It is hot."}
CHOICE = {
    "type": "choice",
    "instructions": "Who speaks?",
    "choices": [{"value": "he", "description": "a man"}, {"value": True}, {"value": "true"}],
}
SCORE = {"type": "score", "name": "heat", "instructions": "How hot?", "levels": [{"label": x} for x in "abcd"]}
QUESTIONS: list[Any] = [PREDICATE, CHOICE, SCORE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("decisions")
    save_model(path)
    return path


@pytest.fixture(scope="module")
def served(folder: Path) -> Bench:
    return serve_model(folder)


async def test_the_official_client(served: Bench) -> None:
    async with served.openai() as client:
        raw = await client.decisions.with_raw_response.create(model="jamba", input=STATE, questions=QUESTIONS)
        check(Decision, raw.text)
        decision = raw.parse()
        predicate, choice, score = decision.answers
        assert predicate.type == "predicate"
        assert choice.type == "choice"
        assert score.type == "score"
        assert (predicate.name, choice.name, score.name) == ("hot", None, "heat")
        assert [p.value for p in choice.probabilities] == ["he", True, "true"]
        assert [p.label for p in score.probabilities] == list("abcd")
        for answer in (choice, score):
            assert sum(p.probability for p in answer.probabilities) == pytest.approx(1)
        best = max(choice.probabilities, key=lambda p: p.probability)
        assert choice.choice == best.value
        assert choice.confidence == pytest.approx((best.probability - 1 / 3) / (1 - 1 / 3))
        assert score.score == pytest.approx(sum(p.value * p.probability for p in score.probabilities))
        assert decision.usage.total_tokens == decision.usage.input_tokens
        with pytest.raises(openai.BadRequestError):
            await client.decisions.create(model="jamba", input=STATE, questions=[])


async def test_probabilities_equal_those_of_completions(served: Bench) -> None:
    number = len(served.engine.requests)
    found = await post(served, "/v1/decisions", input=STATE, questions=[PREDICATE])
    prompt = served.engine.requests[number].prompt
    assert "".join(STATE.split()) in await text_of(served, prompt)
    chances: list[float] = []
    for label in (" Yes", " No"):  # in the tests' vocabulary these are several tokens
        ids = await tokens_of(served, label)
        scored = await post(served, "/v1/completions", prompt=[*prompt, *ids], echo=True, max_tokens=0, logprobs=0)
        chances.append(math.exp(sum(scored["choices"][0]["logprobs"]["token_logprobs"][-len(ids) :])))
    assert found["answers"][0]["probability"] == pytest.approx(chances[0] / sum(chances))


async def text_of(bench: Bench, tokens: list[int]) -> str:
    text = (await post(bench, "/detokenize", tokens=tokens))["prompt"]
    return "".join(text.split())


async def tokens_of(bench: Bench, text: str) -> list[int]:
    return (await post(bench, "/tokenize", prompt=text, add_special_tokens=False))["tokens"]


async def test_the_input_is_computed_once(folder: Path) -> None:
    bench = serve_model(folder)
    questions = [{"type": "predicate", "instructions": f"It is {word}."} for word in "abcdefgh"]
    first = await post(bench, "/v1/decisions", input=STATE, questions=questions)
    shared, *others = bench.engine.requests
    wholes = [request for request in others if request.targets and request.id.count("-") == 2]
    assert len(wholes) == 8
    assert all(request.prompt[: len(shared.prompt)] == shared.prompt for request in others)
    stats = bench.engine.stats
    computed = stats.prefix_queries_total - stats.prefix_hits_total
    own = sum(len(request.prompt) - len(shared.prompt) for request in wholes)
    assert first["usage"]["input_tokens"] == len(shared.prompt) + own
    labels = sum(len(request.targets) for request in others if request not in wholes)
    assert computed == len(shared.prompt) + own + labels, "something was computed twice"
    again = await post(bench, "/v1/decisions", input=STATE, questions=questions)
    assert again["answers"] == first["answers"]
    assert again["usage"]["input_tokens_details"]["cached_tokens"] > 0.9 * len(shared.prompt)


async def test_one_question_saves_the_state_after_the_input(folder: Path) -> None:
    bench = serve_model(folder)
    await post(bench, "/v1/decisions", input=STATE, questions=[PREDICATE])
    [end] = bench.engine.requests[0].save_positions
    assert end > 100
    other = await post(bench, "/v1/decisions", input=STATE, questions=[{**PREDICATE, "instructions": "No?"}])
    assert other["usage"]["input_tokens_details"]["cached_tokens"] == end - end % 16


async def test_messages_and_tool_calls_are_an_input(served: Bench) -> None:
    items = [
        {"role": "developer", "content": "hello"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "the"}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "in"},
        {"role": "user", "content": [{"type": "input_json", "data": {"key": [1, 2]}}]},
    ]
    found = await post(served, "/v1/decisions", input=items, questions=[SCORE])
    assert found["answers"][0]["type"] == "score"
    text = await text_of(served, served.engine.requests[-1].prompt)
    assert '{"key":[1,2]}' in text
    assert "Howhot?" in text


IMAGE = [{"role": "user", "content": [{"type": "input_image", "image_url": "https://x"}]}]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": IMAGE}, "input.0.content.0"),
        ({"input": ""}, "input"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}]}]}, "questions.0.choices"),
        ({"questions": [{**CHOICE, "choices": [{"value": "a"}, {"value": "a"}]}]}, "questions.0.choices"),
        ({"questions": [{"type": "guess", "instructions": "a"}]}, "questions.0"),
        ({"questions": [PREDICATE] * 401}, "questions"),
        ({"state": "a"}, "state"),
        ({"input": [{"role": "user", "content": [{"type": "input_json", "data": {"a": "b" * 262_144}}]}]}, None),
        ({"input": "a" * 200_000, "questions": [PREDICATE] * 200}, "questions"),
    ],
)
async def test_what_is_refused(served: Bench, body: dict[str, Any], param: str | None) -> None:
    error = (await post(served, "/v1/decisions", 400, **{"input": STATE, "questions": QUESTIONS} | body))["error"]
    assert param is None or error["param"] == param, error


async def test_a_model_without_a_template_answers_nothing(folder: Path) -> None:
    error = await post(serve_model(folder, template=False), "/v1/decisions", 400, input="a", questions=QUESTIONS)
    assert "chat template" in error["error"]["message"]


# The text of questions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 26, 27, 255])
def test_no_label_begins_another_one(count: int) -> None:
    question = DecisionQuestion("choice", "?", tuple(Option(str(i)) for i in range(count)))
    assert len(set(question.labels)) == count
    assert not [(a, b) for a in question.labels for b in question.labels if a != b and b.startswith(a)]
    assert all(f"\n{label}. {i}" in question.text for i, label in enumerate(question.labels))


def test_confidence_equals_that_of_transformers() -> None:
    from transformers.decision.template_utils import Question

    for probabilities in ([0.5, 0.5], [0.1, 0.2, 0.7], [0.25] * 4, [0.0, 1.0, 0.0], [0.4, 0.1, 0.1, 0.4]):
        names = [str(i) for i in range(len(probabilities))]
        choice, score = (
            Question("q", kind, "", names, names, names).answer(probabilities) for kind in ("choice", "score")
        )
        assert choice_confidence(probabilities) == pytest.approx(choice["confidence"])
        assert score_confidence(probabilities) == pytest.approx(score["confidence"])
        assert expected_level(probabilities) == pytest.approx(score["score"])


def test_the_question_follows_the_users_last_message() -> None:
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    assert with_question([user], "?") == [{"role": "user", "content": "a\n\n?"}]
    assert with_question([user, assistant], "?") == [user, assistant, {"role": "user", "content": "?"}]
    assert json.dumps(user) == '{"role": "user", "content": "a"}', "the input is not changed"
