"""The routes of a server of role `prefill`: POST /v1/prefill computes a prompt for a decode server, which then takes
the segments from GET /v1/prefill/segments/{key}.

Whoever has an API key of this server may name any cache salt, because a decode server speaks for all of its own keys. A
segment has a key that depends on the salt and on all tokens, so only who knows both can ask for it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from jamba_server.engine.disk_tier.folder import SegmentFolder
from jamba_server.engine.disk_tier.format import BadSegment, Header
from jamba_server.engine.disk_tier.prompt_segments import PromptKeys
from jamba_server.engine.disk_tier.transfer import lineage
from jamba_server.engine.errors import Overloaded
from jamba_server.engine.types import SamplingParams, TierStats
from jamba_server.server.http.choice import TextOptions
from jamba_server.server.http.deadlines import time_limit_of
from jamba_server.server.http.errors import NotStored, OtherModel, request_id_of, tenant_of
from jamba_server.server.http.generation import GenerationSpec
from jamba_server.server.http.routes.admission import prepared, wait_for_start
from jamba_server.server.http.routes.replies import ERRORS, json_response
from jamba_server.server.http.sampling import admit_prompt
from jamba_server.server.http.schemas.prefill import PrefillReply, PrefillRequest, SegmentKey, SegmentSize
from jamba_server.server.http.schemas.sessions import SESSION_FILE
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.session_files.disk import contents_of
from jamba_server.server.http.unknown_fields import settle_unknown_fields

router = APIRouter(prefix="/v1/prefill", tags=["prefill"])

_NO_REPLY: Final = SamplingParams(max_tokens=0)
WRITE_SECONDS: Final = 30.0  # how long a request waits until its segments are on the disk
_LOOK_SECONDS: Final = 0.005  # time between two looks for them


@router.post("", response_model=PrefillReply, responses=ERRORS)
async def prefill(body: PrefillRequest, request: Request, services: ServicesOf) -> Response:
    """Computes a prompt, unless the disk tier has it, and returns the list of its segments."""
    services.lifecycle.admit()
    settle_unknown_fields(body, request, services)
    await wait_for_start(request, services)
    folder = await _folder(services)
    if body.fingerprint != folder.fingerprint:
        raise OtherModel(
            f"This server has the fingerprint {folder.fingerprint}, and the request {body.fingerprint}: model, "
            "version, processor or configuration differ."
        )
    return json_response(await prepared(request, _prefill(body, folder, request, services)))


@router.get(
    "/segments/{key}",
    response_class=Response,
    responses={200: {"content": {SESSION_FILE: {"schema": {"type": "string", "format": "binary"}}}}} | ERRORS,
)
async def segment(key: SegmentKey, services: ServicesOf) -> Response:
    """Returns the file of a segment."""
    folder = await _folder(services)
    try:
        header = await anyio.to_thread.run_sync(folder.header, bytes.fromhex(key))
    except BadSegment:
        raise NotStored("segment", key) from None
    return StreamingResponse(
        _contents(folder, header), media_type=SESSION_FILE, headers={"Content-Length": str(header.num_bytes)}
    )


async def _contents(folder: SegmentFolder, header: Header) -> AsyncGenerator[bytes]:
    async with aclosing(contents_of(folder, [header])) as chunks:
        async for chunk in chunks:
            yield chunk


async def _folder(services: Services) -> SegmentFolder:
    try:
        folder = await services.tier.open()
    except OSError as error:
        raise Overloaded(f"The folder of the disk tier cannot be opened: {error.strerror}.", retry_after=60) from None
    if folder is None:
        raise Overloaded("The disk tier is not open yet, because the weights are being hashed.")
    return folder


async def _prefill(body: PrefillRequest, folder: SegmentFolder, request: Request, services: Services) -> PrefillReply:
    keys = await services.in_thread(lambda: PromptKeys(body.prompt, body.cache_salt, folder.layout))
    key, cached = keys.at(len(keys)), len(keys)
    if not (headers := await _lineage(folder, key)):
        before = services.engine.stats.tiers
        cached = await _compute(body, request, services)
        headers = await _written(folder, key, before, services)
    segments = [SegmentSize(end=header.entry.end, num_bytes=header.num_bytes) for header in headers]
    return PrefillReply(segments=segments, cached_tokens=cached)


async def _compute(body: PrefillRequest, request: Request, services: Services) -> int:
    """Returns how many tokens of the prompt were in the prefix cache."""
    prompt = admit_prompt(body.prompt, _NO_REPLY, services.engine, param="prompt", save_positions=body.save_positions)
    spec = GenerationSpec(
        id=f"prefill-{uuid.uuid4().hex}",
        prompts=(prompt,),
        n=1,
        text=TextOptions(),
        priority=body.priority,
        cache_salt=body.cache_salt,
        tenant=tenant_of(request.scope),
        http_request_id=request_id_of(request.scope),
        time_limit=time_limit_of(request.scope),
    )
    generation = services.generation(spec)
    await generation.collect()
    return generation.usage.prompt_tokens_details.cached_tokens


async def _lineage(folder: SegmentFolder, key: bytes) -> list[Header]:
    """Returns the headers of a segment and of all before it, or an empty list if the disk tier has not all of them."""

    def look() -> list[Header]:
        headers = lineage(folder, key) if folder.path_of(key).exists() else []
        folder.touch(header.entry.key for header in reversed(headers))
        return headers

    return await anyio.to_thread.run_sync(look)


async def _written(folder: SegmentFolder, key: bytes, before: TierStats | None, services: Services) -> list[Header]:
    """Waits until the engine has written the segments of a prompt that it has just computed. Raises Overloaded if the
    disk tier does not take them. `before` are the statistics of the time before the prompt was computed."""
    end = asyncio.get_running_loop().time() + WRITE_SECONDS
    while not (headers := await _lineage(folder, key)):
        if _num_lost(services.engine.stats.tiers) > _num_lost(before) or asyncio.get_running_loop().time() > end:
            raise Overloaded("The disk tier has not kept the prompt: its disk is full, or too slow.", retry_after=5)
        await anyio.sleep(_LOOK_SECONDS)
    return headers


def _num_lost(stats: TierStats | None) -> int:
    return 0 if stats is None else stats.dropped_segments_total + stats.failed_writes_total
