"""The routes of /v1/responses: create, retrieve, delete, cancel and list the input items."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import Response as HttpResponse

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.deadlines import set_timeout
from jamba_server.server.http.errors import StreamNotFound, is_background, tenant_of
from jamba_server.server.http.generation import GenerationSpec
from jamba_server.server.http.response_task import chat_task, plan_response, read_input
from jamba_server.server.http.routes.admission import prepared, require, wait_for_start
from jamba_server.server.http.routes.replies import ERRORS, STREAM, json_response
from jamba_server.server.http.schemas.responses.items import Item, Reasoning, new_id
from jamba_server.server.http.schemas.responses.reply import DeletedResponse, InputItemList, InputTokens, Response
from jamba_server.server.http.schemas.responses.request import ENCRYPTED_REASONING, LOGPROBS, ResponseRequest
from jamba_server.server.http.schemas.responses.tools import FunctionNames, FunctionTool, NamespaceTool
from jamba_server.server.http.services import Services, ServicesOf
from jamba_server.server.http.sse import answer
from jamba_server.server.http.store.database import StoredResponse
from jamba_server.server.http.store.responses import input_items
from jamba_server.server.http.store.sessions import Sessions
from jamba_server.server.http.streams.reply import StreamReply
from jamba_server.server.http.unknown_fields import settle_unknown_fields, warn
from jamba_server.server.http.writers.responses import ResponseOptions, ResponseWriter, Save, Saved

router = APIRouter(tags=["responses"])

MAX_PAGE = 100  # maximum number of input items in one page
DEFAULT_PAGE = 20


@router.post("/v1/responses", response_model=Response, responses=STREAM | ERRORS)
async def create_response(body: ResponseRequest, request: Request, services: ServicesOf) -> HttpResponse:
    """Returns the model's response to a text or to a conversation. With `stream`, it is sent as events."""
    services.lifecycle.admit()
    set_timeout(request.scope, body.timeout)
    store, owner = services.responses, tenant_of(request.scope)
    if body.store and not store.enabled:
        why = "store is true, but this server stores no responses (--max-stored-responses)."
        raise RequestRejected(why, param="store")
    plan = await _plan(body, request, services, owner)
    # Lines of batches are stored only on demand, because there are so many of them that all others would be deleted.
    wanted = body.store is True if is_background(request.scope) else body.store is not False
    stores = store.enabled and wanted
    writer = ResponseWriter(
        services.generation(plan.spec),
        services.tokenizer,
        _begun(plan, body, services, stores=stores),
        ResponseOptions(
            names=plan.names,
            with_logprobs=body.includes(LOGPROBS),
            with_encoded_reasoning=body.includes(ENCRYPTED_REASONING),
            caches=services.config.enable_prefix_caching and plan.spec.cache.write,
        ),
        _save(services, owner, plan.items, body.session) if stores else None,
    )
    return await answer(request, writer, services, stream=bool(body.stream))


@router.post("/v1/responses/input_tokens", response_model=InputTokens, responses=ERRORS)
async def count_input_tokens(body: ResponseRequest, request: Request, services: ServicesOf) -> HttpResponse:
    """Returns the number of tokens of the prompt that the same request to /v1/responses would have."""
    plan = await _plan(body, request, services, tenant_of(request.scope))
    return json_response(InputTokens(input_tokens=len(plan.spec.prompts[0].token_ids)))


@router.get("/v1/responses/{response_id}", response_model=Response, responses=ERRORS)
async def retrieve_response(
    response_id: str,
    request: Request,
    services: ServicesOf,
    stream: Annotated[
        bool, Query(description="Send the response's events. They must be kept (`X-On-Disconnect: continue`).")
    ] = False,
    starting_after: Annotated[
        int, Query(ge=-1, le=10**15, description="With `stream`: the number of the last event that the client has.")
    ] = -1,
) -> HttpResponse:
    """Returns a stored response, or the events of a response whose stream is kept."""
    owner = tenant_of(request.scope)
    if stream:
        try:
            kept = services.streams.find(response_id, owner)
        except StreamNotFound as error:
            raise RequestRejected(f"stream is true, but there are no events. {error}", param="stream") from None
        return StreamReply(kept, services.streams, starting_after + 1, services.config.send_timeout)
    stored = await services.responses.get(response_id, owner)
    return HttpResponse(stored.response, media_type="application/json")


@router.delete("/v1/responses/{response_id}", response_model=DeletedResponse, responses=ERRORS)
async def delete_response(response_id: str, request: Request, services: ServicesOf) -> HttpResponse:
    """Deletes a stored response. Later responses of the same conversation can then no longer be continued."""
    await services.responses.delete(response_id, tenant_of(request.scope))
    return json_response(DeletedResponse(id=response_id))


@router.post("/v1/responses/{response_id}/cancel", response_model=Response, responses=ERRORS)
async def cancel_response(response_id: str, request: Request, services: ServicesOf) -> HttpResponse:
    """Answers with an error, because only a background response can be cancelled and this server makes none. A client
    cancels a response by closing the connection."""
    await services.responses.get(response_id, tenant_of(request.scope))
    raise RequestRejected(
        "Only a background response can be cancelled, and this one was not made in the background. A running response "
        "is cancelled by closing its connection.",
        param="response_id",
    )


@router.get("/v1/responses/{response_id}/input_items", response_model=InputItemList, responses=ERRORS)
async def list_input_items(
    response_id: str,
    request: Request,
    services: ServicesOf,
    after: Annotated[str | None, Query(description="The id of the item after which the page begins.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="The number of items in the page.")] = DEFAULT_PAGE,
    order: Annotated[
        Literal["asc", "desc"], Query(description="Whether the oldest or the newest item comes first.")
    ] = "desc",
) -> HttpResponse:
    """Lists the input items of the request that made a response. The items of earlier responses in the conversation are
    not included."""
    items = input_items(await services.responses.get(response_id, tenant_of(request.scope)))
    if order == "desc":
        items.reverse()
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise RequestRejected(f"The response has no input item with the id {after[:64]!r}.", param="after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    ends = (page[0]["id"], page[-1]["id"]) if page else ("", "")
    return json_response(InputItemList(data=page, first_id=ends[0], last_id=ends[1], has_more=len(items) > limit))


class _Plan(NamedTuple):
    """The data of a request before its generation begins: the model's name, the functions, the input items, the data
    for the engine, and the id of the response that the new one continues."""

    model: str
    names: FunctionNames
    items: list[Item]
    spec: GenerationSpec
    previous_id: str | None


async def _plan(body: ResponseRequest, request: Request, services: Services, owner: str) -> _Plan:
    settle_unknown_fields(body, request, services)
    await wait_for_start(request, services)
    require(services, "generate")
    model = services.model(body.model)
    names = FunctionNames.of(body.declared_tools)
    limit = services.config.max_body_bytes
    items = await read_input(body, services.responses, owner, max_bytes=limit)
    history: list[Item] = []
    previous_id = await _previous_response(body, services, owner)
    if previous_id is not None:
        history = await services.responses.conversation(previous_id, owner, max_bytes=limit)
    task = chat_task(body, names, history + items)
    planning = plan_response(
        task, services, truncate=body.truncation == "auto", id_=new_id("resp"), scope=request.scope
    )
    spec, num_left_out = await prepared(request, planning)
    _warn(request, body, names, num_left_out)
    return _Plan(model, names, items, spec, previous_id)


async def _previous_response(body: ResponseRequest, services: Services, owner: str) -> str | None:
    """Returns the id of the response that a request continues, or None if it begins a conversation."""
    if (name := body.session) is None:
        return body.previous_response_id
    session = await services.responses.sessions(lambda table: table.get(name, owner))
    return session.response_id if session is not None else None


def _warn(request: Request, body: ResponseRequest, names: FunctionNames, num_left_out: int) -> None:
    """If tools, messages or reasoning of the request do not reach the model, adds the header X-Warning, which says so,
    to the reply."""
    scope = request.scope
    if names.skipped:
        warn(f"the model does not see the tools of these types: {', '.join(names.skipped)}", scope)
    if any(isinstance(item, Reasoning) and item.encrypted_content and item.text is None for item in body.items):
        warn("the model does not see reasoning that another server has encrypted", scope)
    if num_left_out:
        warn(f"the oldest {num_left_out} messages were left out, because the conversation is too long", scope)


def _begun(plan: _Plan, body: ResponseRequest, services: Services, *, stores: bool) -> Response:
    """Returns the response object as it is before the first token: its status is "in_progress" and its output is
    empty."""
    defaults = services.defaults
    return Response(
        id=plan.spec.id,
        created_at=int(time.time()),
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=plan.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=plan.previous_id,
        prompt_cache_key=body.prompt_cache_key,
        reasoning={"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        safety_identifier=body.safety_identifier,
        store=stores,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        text={"format": {"type": "text"}} | (_dump(body.text) if body.text else {}),
        tool_choice=body.choice if isinstance(body.choice, str) else _dump(body.choice),
        tools=_offered_tools(body),
        top_logprobs=body.top_logprobs or 0,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        truncation=body.truncation or "disabled",
        user=body.user,
    )


def _dump(part: Any) -> dict[str, Any]:
    return part.model_dump(by_alias=True, exclude_unset=True, exclude_none=True)


def _offered_tools(body: ResponseRequest) -> list[dict[str, Any]]:
    """Returns the declarations of those tools that are shown to the model."""
    tools: list[dict[str, Any]] = []
    for tool in body.declared_tools:
        if isinstance(tool, FunctionTool):
            tools.append(_dump(tool))
        elif isinstance(tool, NamespaceTool):
            functions = [_dump(member) for member in tool.tools if isinstance(member, FunctionTool)]
            tools.append(_dump(tool) | {"description": tool.description or "", "tools": functions})
    return tools


def _save(services: Services, owner: str, items: list[Item], session: str | None) -> Save:
    """Returns a function that stores a finished response together with the input items of its request. The response
    becomes the last one of `session`."""

    async def save(response: Response) -> Saved:
        stored = StoredResponse(
            id=response.id,
            owner=owner,
            previous_id=response.previous_response_id,
            input=msgspec.json.encode(items),
            response=(await services.in_thread(response.model_dump_json)).encode(),
        )
        ids = [item["id"] for item in items] + [item.id for item in response.output]
        if not await services.responses.put(stored, ids):
            return Saved(stored=False, session=None)
        if session is None:
            return Saved(stored=True, session=None)

        def move(table: Sessions) -> bool:
            table.add(session, owner, None, response.created_at)
            return table.move(session, owner, response.previous_response_id, response.id)

        moved = await services.responses.sessions(move)
        return Saved(stored=True, session=session if moved else None)

    return save
