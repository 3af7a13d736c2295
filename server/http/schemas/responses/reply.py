"""The response of /v1/responses, its output items and the lists of input items."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from jamba_server.server.http.schemas.base import Reply, if_any
from jamba_server.server.http.schemas.cache_report import JambaCache

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class OutputText(Reply):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: tuple[()] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


class OutputMessage(Reply):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus
    content: list[OutputText]


class ReasoningText(Reply):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class OutputReasoning(Reply):
    """The model's reasoning. `encrypted_content` is set only if the request asks for it. It has the same reasoning, for
    clients that send back only this field in their next request."""

    id: str
    type: Literal["reasoning"] = "reasoning"
    summary: tuple[()] = ()
    content: list[ReasoningText]
    encrypted_content: str | None = None
    status: ItemStatus


class OutputFunctionCall(Reply):
    id: str
    type: Literal["function_call"] = "function_call"
    call_id: str
    namespace: str | None = None
    name: str
    arguments: str
    status: ItemStatus


OutputItem = Annotated[OutputMessage | OutputReasoning | OutputFunctionCall, Field(discriminator="type")]


class InputTokensDetails(Reply):
    """`cache_write_tokens` are the tokens of the prompt that were computed and are now in the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(Reply):
    reasoning_tokens: int


class ResponseUsage(Reply):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Reply):
    code: Literal["server_error"] = "server_error"
    message: str


class IncompleteDetails(Reply):
    reason: Literal["max_output_tokens"] | None


class Response(Reply):
    """A response. It repeats the fields of the request that change the reply, with the values that were used.

    `tools` leaves out the tools that were not offered to the model. `store` says whether the response is stored.
    `session` is the session whose last response this one is; it is missing if another request has used the session
    meanwhile.
    """

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: tuple[OutputItem, ...] = ()
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None = None
    user: str | None
    jamba_cache: Annotated[JambaCache | None, if_any] = None
    session: Annotated[str | None, if_any] = None


class DeletedResponse(Reply):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputItemList(Reply):
    """A page of the input items of a response. `has_more` says whether there are items after `last_id`."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


class InputTokens(Reply):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
