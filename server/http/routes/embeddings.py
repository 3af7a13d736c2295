"""The routes POST /v1/embeddings and POST /pooling."""

from __future__ import annotations

import base64
import time

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from jamba_server.engine.errors import RequestRejected
from jamba_server.engine.types import Pooling, RequestKind
from jamba_server.server.http.routes.admission import prepared, require
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.routes.vectors import begin, run_all, run_of, usage
from jamba_server.server.http.schemas.vectors.embeddings import (
    Embedding,
    EmbeddingList,
    EmbeddingRequest,
    Pooled,
    PooledList,
    PoolingRequest,
)
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.sse import until_disconnect
from jamba_server.server.http.vectors.arithmetic import Numbers, probabilities, unit_vector
from jamba_server.server.http.vectors.inputs import encode_inputs, without_padding
from jamba_server.server.http.vectors.run import Vector, VectorPrompt

router = APIRouter(tags=["vectors"])


@router.post("/v1/embeddings", response_model=EmbeddingList, responses=ERRORS)
async def create_embeddings(body: EmbeddingRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the model's last hidden states of texts. The model was not trained for embeddings."""
    model = await begin(body, request, services, kind="embed")
    run = run_of(body, request, services, prefix="embd", name="embeddings")
    _check_dimensions(body, services)
    prompts = await prepared(request, _hidden_states(body, services))
    vectors = await until_disconnect(request.receive, run_all(run, prompts))

    def reply() -> Response:
        data = [Embedding(index=i, embedding=_written(_cut(each, body), body)) for i, each in enumerate(vectors)]
        return json_response(EmbeddingList(data=data, model=model, usage=usage(prompts, vectors)))

    return await services.in_thread(reply)


@router.post("/pooling", response_model=PooledList, responses=ERRORS)
async def create_pooling(body: PoolingRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the output of whatever the model ends with: its hidden states, or the outputs of a classifier's head."""
    model = await begin(body, request, services, kind="embed")
    info = services.engine.info
    task = body.task or ("classify" if info.labels else "embed")
    require(services, task)
    run = run_of(body, request, services, prefix="pool", name="pooling")
    if task == "classify":
        for name in ("pooling", "dimensions"):
            if getattr(body, name) is not None:
                raise RequestRejected(f'{name} is only allowed for hidden states (`task`: "embed").', param=name)
        prompts = await prepared(request, class_prompts(body, services))
    else:
        _check_dimensions(body, services)
        prompts = await prepared(request, _hidden_states(body, services))
    vectors = await until_disconnect(request.receive, run_all(run, prompts))

    def values(vector: Vector) -> Numbers:
        if task == "embed":
            return _cut(vector, body)
        return np.array(probabilities(vector.numbers, info.problem_type)) if body.use_activation else vector.numbers

    def reply() -> Response:
        data = [Pooled(index=i, data=_written(values(each), body)) for i, each in enumerate(vectors)]
        counts = usage(prompts, vectors)
        return json_response(PooledList(id=run.id, created=int(time.time()), model=model, data=data, usage=counts))

    return await services.in_thread(reply)


async def _hidden_states(body: EmbeddingRequest | PoolingRequest, services: Services) -> list[VectorPrompt]:
    kind: RequestKind = "embed"
    pooling: Pooling = body.pooling or services.config.embedding_pooling
    tokens = await encode_inputs(services, body.inputs, param="input", add_special_tokens=body.add_special_tokens)
    return [VectorPrompt(ids, kind, pooling=pooling) for ids in tokens]


async def class_prompts(body: PoolingRequest, services: Services) -> list[VectorPrompt]:
    tokens = await encode_inputs(services, body.inputs, param="input", add_special_tokens=body.add_special_tokens)
    return [VectorPrompt(without_padding(services, ids), "classify") for ids in tokens]


def _check_dimensions(body: EmbeddingRequest | PoolingRequest, services: Services) -> None:
    size = services.engine.info.hidden_size
    if body.dimensions is not None and body.dimensions > size:
        raise RequestRejected(
            f"dimensions is {body.dimensions}; the vectors of this model have {size} dimensions.", param="dimensions"
        )


def _cut(vector: Vector, body: EmbeddingRequest | PoolingRequest) -> Numbers:
    return unit_vector(vector.numbers, body.dimensions) if body.use_activation else vector.numbers[: body.dimensions]


def _written(numbers: Numbers, body: EmbeddingRequest | PoolingRequest) -> list[float] | str:
    if body.encoding_format == "float":
        return numbers.tolist()
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode()
