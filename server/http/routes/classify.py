"""The route POST /classify. A classifier answers with its head, a language model with the probabilities of words."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.routes.admission import prepared, require
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.routes.vectors import begin, run_all, run_of, usage
from jamba_server.server.http.schemas.vectors.classify import Class, ClassifyRequest, ClassList
from jamba_server.server.http.schemas.vectors.fields import usage_of
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.sse import until_disconnect
from jamba_server.server.http.vectors.arithmetic import probabilities, softmax
from jamba_server.server.http.vectors.inputs import check_labels_fit, encode_inputs, encode_labels, without_padding
from jamba_server.server.http.vectors.labels import LabelPrompt, score_labels
from jamba_server.server.http.vectors.run import VectorPrompt

router = APIRouter(tags=["vectors"])


@router.post("/classify", response_model=ClassList, responses=ERRORS)
async def classify(body: ClassifyRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the class of each text with the probabilities of all classes."""
    model = await begin(body, request, services, kind=None)
    run = run_of(body, request, services, prefix="classify", name="classify")
    labels = body.labels or list(services.config.label_words)
    if services.engine.info.labels:
        if body.labels is not None:
            raise RequestRejected(
                "labels is only for language models; the labels of this classifier are fixed.", param="labels"
            )
        labels = list(services.engine.info.labels)
    elif not labels:
        require(services, "classify")
    if services.engine.info.labels:
        prompts = await prepared(request, _prompts(body, services))
        vectors = await until_disconnect(request.receive, run_all(run, prompts))
        kind = services.engine.info.problem_type
        data = [
            _class(
                index,
                labels,
                probabilities(each.numbers, kind) if body.use_activation else each.numbers.tolist(),
            )
            for index, each in enumerate(vectors)
        ]
        counts = usage(prompts, vectors)
    else:
        items = await prepared(request, _label_prompts(body, labels, services))
        scores = await until_disconnect(request.receive, score_labels(run, items))
        data = [
            _class(index, labels, softmax(each) if body.use_activation else each, each)
            for index, each in enumerate(scores.logprobs)
        ]
        counts = usage_of(scores.num_tokens, scores.num_cached)
    return json_response(
        ClassList(id=run.id, created=int(time.time()), model=model, labels=labels, data=data, usage=counts)
    )


async def _prompts(body: ClassifyRequest, services: Services) -> list[VectorPrompt]:
    tokens = await encode_inputs(services, body.inputs, param="input", add_special_tokens=body.add_special_tokens)
    return [VectorPrompt(without_padding(services, ids), "classify") for ids in tokens]


async def _label_prompts(body: ClassifyRequest, labels: list[str], services: Services) -> list[LabelPrompt]:
    ids = await encode_labels(services, labels, param="labels")
    tokens = await encode_inputs(services, body.inputs, param="input", add_special_tokens=body.add_special_tokens)
    check_labels_fit(services, tokens, ids)
    return [LabelPrompt(prompt, ids) for prompt in tokens]


def _class(index: int, labels: list[str], probs: list[float], logprobs: list[float] | None = None) -> Class:
    best = max(range(len(probs)), key=probs.__getitem__)
    return Class(index=index, label=labels[best], probs=probs, num_classes=len(probs), logprobs=logprobs)
