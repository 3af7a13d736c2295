"""The route POST /v1/decisions: typed questions about one input, answered by the probabilities of labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Scope

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.chat_task import ChatTask, render_task
from jamba_server.server.http.response_task import chat_messages
from jamba_server.server.http.routes.admission import prepared
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.routes.vectors import begin, run_of
from jamba_server.server.http.schemas.base import GenerationBody
from jamba_server.server.http.schemas.vectors.decisions import (
    Answer,
    ChoiceAnswer,
    ChoiceProbability,
    ChoiceQuestion,
    Decision,
    DecisionRequest,
    DecisionUsage,
    InputDetails,
    Predicate,
    PredicateAnswer,
    ScoreAnswer,
    ScoreProbability,
    ScoreQuestion,
)
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.sse import until_disconnect
from jamba_server.server.http.vectors.arithmetic import softmax
from jamba_server.server.http.vectors.inputs import check_prompt, encode_labels
from jamba_server.server.http.vectors.labels import LabelPrompt, LabelScores, common_beginning, score_labels
from jamba_server.server.text.decision_prompt import (
    DecisionQuestion,
    Option,
    choice_confidence,
    expected_level,
    score_confidence,
    with_question,
)

router = APIRouter(tags=["vectors"])

# The largest size of all prompts of a request together, in bytes of text. Each question repeats the input, and each
# prompt is tokenised.
MAX_PROMPT_BYTES = 32 * 1024**2


@router.post("/v1/decisions", response_model=Decision, responses=ERRORS)
async def create_decision(body: DecisionRequest, request: Request, services: ServicesOf) -> Response:
    """Answers questions about an input with probabilities. The input is computed once for all questions."""
    model = await begin(body, request, services, kind="score")
    run = run_of(body, request, services, prefix="decision", name="decisions")
    questions = [_question(question) for question in body.questions]
    prompts = await prepared(request, _prompts(body, questions, services, request.scope))
    scores = await until_disconnect(request.receive, score_labels(run, prompts))
    answers = [
        _answer(question, softmax(logprobs)) for question, logprobs in zip(body.questions, scores.logprobs, strict=True)
    ]
    return json_response(Decision(model=model, answers=answers, usage=_usage(scores)))


async def _prompts(
    body: DecisionRequest, questions: Sequence[DecisionQuestion], services: Services, scope: Scope
) -> list[LabelPrompt]:
    """Returns the prompt of each question: the input, then the question, as a conversation."""
    messages: Sequence[Mapping[str, object]] = (
        [{"role": "user", "content": body.input}]
        if isinstance(body.input, str)
        else chat_messages(None, [item.to_item() for item in body.input])
    )
    size = len(str(messages).encode()) * len(questions)
    if size > MAX_PROMPT_BYTES:
        raise RequestRejected(
            f"The input has about {size // len(questions)} bytes, and {len(questions)} questions repeat it: {size} "
            f"bytes together. The limit is {MAX_PROMPT_BYTES}; send fewer questions at a time.",
            param="questions",
        )
    rendered = [await _render(messages, question.text, services, scope) for question in questions]
    saves: tuple[int, ...] = ()
    if len(rendered) == 1:  # another question shows where the input ends, so that its state is saved for later requests
        other = await _render(messages, "?", services, scope)
        saves = (common_beginning([rendered[0].token_ids, other.token_ids]),)
    prompts: list[LabelPrompt] = []
    for position, (question, chat) in enumerate(zip(questions, rendered, strict=True)):
        begin = " " if chat.strip_leading_space else ""
        labels = await encode_labels(services, [begin + label for label in question.labels], param="questions")
        check_prompt(services, [*chat.token_ids, *max(labels, key=len)], param=f"questions.{position}")
        prompts.append(LabelPrompt(chat.token_ids, labels, saves))
    return prompts


@dataclass(frozen=True, slots=True)
class _Rendered:
    token_ids: list[int]
    strip_leading_space: bool


async def _render(
    messages: Sequence[Mapping[str, object]], question: str, services: Services, scope: Scope
) -> _Rendered:
    task = ChatTask(
        messages=tuple(with_question(messages, question)),
        body=GenerationBody(),
        reasoning_effort="none",  # the answer is read at the beginning of the reply, before any thoughts
    )
    try:
        chat = await render_task(task, services, scope)
    except RequestRejected as error:
        if error.param == "messages":
            error.param = "input"
        raise
    return _Rendered(chat.prompt_ids, chat.strip_leading_space)


def _question(question: Predicate | ChoiceQuestion | ScoreQuestion) -> DecisionQuestion:
    match question:
        case Predicate():
            return DecisionQuestion("predicate", question.text)
        case ChoiceQuestion():
            options = tuple(Option(_name(each.value), each.description or "") for each in question.choices)
            return DecisionQuestion("choice", question.text, options)
        case ScoreQuestion():
            levels = tuple(Option(each.label, each.description or "") for each in question.levels)
            return DecisionQuestion("score", question.text, levels)


def _name(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()


def _answer(question: Predicate | ChoiceQuestion | ScoreQuestion, probabilities: list[float]) -> Answer:
    match question:
        case Predicate():
            return PredicateAnswer(name=question.name, probability=probabilities[0])
        case ChoiceQuestion():
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            return ChoiceAnswer(
                name=question.name,
                choice=question.choices[best].value,
                confidence=choice_confidence(probabilities),
                probabilities=[
                    ChoiceProbability(value=choice.value, probability=p)
                    for choice, p in zip(question.choices, probabilities, strict=True)
                ],
            )
        case ScoreQuestion():
            return ScoreAnswer(
                name=question.name,
                score=expected_level(probabilities),
                confidence=score_confidence(probabilities),
                probabilities=[
                    ScoreProbability(value=value, label=level.label, probability=p)
                    for value, (level, p) in enumerate(zip(question.levels, probabilities, strict=True))
                ],
            )


def _usage(scores: LabelScores) -> DecisionUsage:
    return DecisionUsage(
        input_tokens=scores.num_tokens,
        input_tokens_details=InputDetails(
            cached_tokens=scores.num_cached, cache_write_tokens=scores.num_tokens - scores.num_cached
        ),
        total_tokens=scores.num_tokens,
    )
