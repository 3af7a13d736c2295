"""Translates a request to /v1/responses into a `ChatTask`, which does not depend on the API."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from starlette.types import Scope

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.chat_task import ChatTask, Tool, plan_chat
from jamba_server.server.http.generation import GenerationSpec
from jamba_server.server.http.schemas.responses.items import Item, ItemReference
from jamba_server.server.http.schemas.responses.request import LOGPROBS, ResponseRequest
from jamba_server.server.http.schemas.responses.tools import FunctionNames, NamedFunction, allowed_names, joined_name
from jamba_server.server.http.services import Services
from jamba_server.server.http.store.responses import ResponseStore

ChatMessage = dict[str, Any]


async def read_input(body: ResponseRequest, store: ResponseStore, owner: str, *, max_bytes: int) -> list[Item]:
    """Returns the items of the field `input`. Items of the type `item_reference` are replaced by the stored items that
    they name.

    Raises RequestRejected if an item that is referred to is not stored, or if these items have more than `max_bytes`
    bytes together.
    """
    references = [given.id for given in body.items if isinstance(given, ItemReference)]
    stored = await store.items(references, owner, max_bytes=max_bytes) if references else {}
    items: list[Item] = []
    for position, given in enumerate(body.items):
        if not isinstance(given, ItemReference):
            items.append(given.to_item())
        elif (item := stored.get(given.id)) is not None:
            items.append(item)
        else:
            raise RequestRejected(
                f"No item with the id {given.id[:64]!r} is stored, so it cannot be referenced. Send the item itself.",
                param=f"input.{position}.id",
                code="item_not_found",
            )
    return items


def chat_task(body: ResponseRequest, names: FunctionNames, items: Iterable[Item]) -> ChatTask:
    """Returns the task that the model continues a conversation, which is given by its input items. Raises
    RequestRejected if the field `tool_choice` asks for a tool that the request does not have."""
    mode, allowed = allowed_names(body.choice, names)
    return ChatTask(
        messages=tuple(chat_messages(body.instructions, items)),
        body=body,
        logprobs=(body.top_logprobs or 0) if body.includes(LOGPROBS) else None,
        tools=tuple(
            Tool(
                name=name,
                description=function.tool.description or "",
                parameters=function.tool.parameters or {},
                strict=bool(function.tool.strict),
                param=function.param,
            )
            for name, function in names.functions.items()
        ),
        tool_choice=mode,
        allowed_tools=allowed,
        # As in OpenAI's API, a named function is called exactly once.
        parallel_tool_calls=body.parallel_tool_calls is not False and not isinstance(body.choice, NamedFunction),
        output_format=body.output_format,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
    )


def chat_messages(instructions: str | None, items: Iterable[Item]) -> list[ChatMessage]:
    """Turns the input items of a request into the list of messages that chat templates read.

    Items with reasoning, text and tool calls that follow each other become one message of the assistant, because the
    model wrote them in one reply.
    """
    messages: list[ChatMessage] = [] if not instructions else [{"role": "system", "content": instructions}]
    for item in items:
        match item["type"]:
            case "message" if item["role"] == "assistant":
                turn = _assistant(messages, new=_has_text_only(messages))
                turn["content"] += _text(item)
            case "message":
                role = "system" if item["role"] == "developer" else item["role"]
                messages.append({"role": role, "content": _text(item)})
            case "reasoning":
                if text := "".join(part["text"] for part in item["content"]):
                    turn = _assistant(messages, new=_has_text_or_calls(messages))
                    turn["reasoning_content"] = turn.get("reasoning_content", "") + text
            case "function_call":
                _add_call(messages, item, item["arguments"])
            case "custom_tool_call":
                _add_call(messages, item, json.dumps({"input": item["input"]}, ensure_ascii=False))
            case _:
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
    return messages


def _text(item: Item) -> str:
    return "\n".join(part["text"] for part in item["content"])


def _add_call(messages: list[ChatMessage], item: Item, arguments: str) -> None:
    name = joined_name(item.get("namespace"), item["name"])
    call = {"id": item["call_id"], "type": "function", "function": {"name": name, "arguments": arguments}}
    _assistant(messages, new=False).setdefault("tool_calls", []).append(call)


def _assistant(messages: list[ChatMessage], *, new: bool) -> ChatMessage:
    """Returns the assistant's message to which the next item belongs. That is the last message if it is the assistant's
    and `new` is false; otherwise a new message is appended."""
    if new or not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _has_text_only(messages: Sequence[ChatMessage]) -> bool:
    return bool(messages and messages[-1]["content"] and "tool_calls" not in messages[-1])


def _has_text_or_calls(messages: Sequence[ChatMessage]) -> bool:
    return bool(messages and (messages[-1]["content"] or "tool_calls" in messages[-1]))


async def plan_response(
    task: ChatTask, services: Services, *, truncate: bool, id_: str, scope: Scope
) -> tuple[GenerationSpec, int]:
    """Returns the data that the engine needs for a task, and how many messages of the conversation were left out.

    If `truncate` is set and the conversation is too long for the context, the oldest messages are left out, but not the
    system messages at the beginning. The rest begins with a message of the user, so that no result of a tool loses its
    call. As few messages as possible are left out. Raises RequestRejected if the
    conversation is too long even so, or if it is empty.
    """
    if not task.messages:
        raise RequestRejected("input has no text that the model could read.", param="input")
    try:
        return await _plan(task, services, id_, scope), 0
    except RequestRejected as error:
        if not truncate or error.code != "context_length_exceeded":
            raise
        too_long = error
    messages = task.messages
    head = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    starts = [i for i, message in enumerate(messages) if message["role"] == "user" and i > head]
    found: tuple[GenerationSpec, int] | None = None
    # Binary search: cutting at an index below `low` leaves too many tokens, and cutting at `high` or above leaves few
    # enough.
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        shorter = replace(task, messages=messages[:head] + messages[starts[middle] :])
        try:
            found = await _plan(shorter, services, id_, scope), starts[middle] - head
            high = middle
        except RequestRejected as error:
            if error.code != "context_length_exceeded":
                raise
            low = middle + 1
    if found is None:
        raise too_long
    return found


async def _plan(task: ChatTask, services: Services, id_: str, scope: Scope) -> GenerationSpec:
    """Calls `plan_chat`. If its error names the field `messages`, the error gets the name `input` instead, which is the
    field that the client has sent."""
    try:
        return await plan_chat(task, services, id_=id_, scope=scope)
    except RequestRejected as error:
        if error.param == "messages":
            error.param = "input"
        raise
