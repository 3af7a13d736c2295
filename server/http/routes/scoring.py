"""The routes POST /v1/score and POST /v1/rerank, for classifiers with one label: they score pairs of texts."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from jamba_server.engine.errors import ModelCannot
from jamba_server.server.http.routes.admission import prepared
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.routes.vectors import begin, run_all, run_of, usage
from jamba_server.server.http.schemas.vectors.fields import VectorUsage
from jamba_server.server.http.schemas.vectors.scoring import (
    Ranked,
    RankedText,
    Ranking,
    RerankRequest,
    Score,
    ScoreList,
    ScoreRequest,
)
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.sse import until_disconnect
from jamba_server.server.http.vectors.arithmetic import probabilities
from jamba_server.server.http.vectors.inputs import encode_pairs
from jamba_server.server.http.vectors.run import VectorPrompt, VectorRun

router = APIRouter(tags=["vectors"])


@router.post("/score", include_in_schema=False)
@router.post("/v1/score", response_model=ScoreList, responses=ERRORS)
async def score(body: ScoreRequest, request: Request, services: ServicesOf) -> Response:
    """Returns the score of each pair of texts."""
    model, run = await _begin(body, request, services, prefix="score")
    scores, counts = await _scores(run, body, body.pairs, request, services, param="text_2")
    data = [Score(index=index, score=each) for index, each in enumerate(scores)]
    return json_response(ScoreList(id=run.id, created=int(time.time()), model=model, data=data, usage=counts))


@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
@router.post("/v1/rerank", response_model=Ranking, responses=ERRORS)
async def rerank(body: RerankRequest, request: Request, services: ServicesOf) -> Response:
    """Returns documents in the order of their scores with a query, the best first."""
    model, run = await _begin(body, request, services, prefix="rerank")
    texts = body.texts
    pairs = [(body.query, text) for text in texts]
    scores, counts = await _scores(run, body, pairs, request, services, param="documents")
    best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: body.top_n or None]
    results = [
        Ranked(
            index=index,
            document=RankedText(text=texts[index]) if body.return_documents else None,
            relevance_score=scores[index],
        )
        for index in best
    ]
    return json_response(Ranking(id=run.id, model=model, results=results, usage=counts))


async def _begin(
    body: ScoreRequest | RerankRequest, request: Request, services: Services, *, prefix: str
) -> tuple[str, VectorRun]:
    model = await begin(body, request, services, kind=None)
    info = services.engine.info
    if len(info.labels) != 1:
        what = f"a classifier with {len(info.labels)} labels" if info.labels else "a language model"
        raise ModelCannot(f"Scores need a classifier with one label; this model is {what} ({info.architecture}).")
    return model, run_of(body, request, services, prefix=prefix, name=prefix)


async def _scores(
    run: VectorRun,
    body: ScoreRequest | RerankRequest,
    pairs: list[tuple[str, str]],
    request: Request,
    services: Services,
    *,
    param: str,
) -> tuple[list[float], VectorUsage]:
    tokens = await prepared(request, encode_pairs(services, pairs, param=param))
    prompts = [VectorPrompt(ids, "classify") for ids in tokens]
    vectors = await until_disconnect(request.receive, run_all(run, prompts))
    kind = services.engine.info.problem_type if body.use_activation else "regression"
    return [probabilities(each.numbers, kind)[0] for each in vectors], usage(prompts, vectors)
