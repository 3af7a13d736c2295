"""The replies of /v1/chat/completions: a single JSON object, or the events of a stream."""

from __future__ import annotations

from typing import Annotated, Literal, Required

from typing_extensions import TypedDict  # pydantic cannot use typing.TypedDict before Python 3.12

from jamba_server.server.http.schemas.base import FinishReason, PromptLogprobs, Reply, Timings, Usage, if_any
from jamba_server.server.http.schemas.cache_report import JambaCache


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Reply):
    """The log-probabilities of all generated tokens, including those of reasoning, tags and tool calls."""

    content: list[TokenLogprob]


class FunctionReply(Reply):
    name: str
    arguments: str


class ToolCallReply(Reply):
    """A tool call of a reply. `arguments` is the JSON text of an object, as the model wrote it."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionReply


class ReplyMessage(TypedDict, total=False):
    """The message of a choice. `content` is null if the message has tool calls and no text. If the model has written
    reasoning, the fields `reasoning` and `reasoning_content` both have this text."""

    role: Required[Literal["assistant"]]
    content: Required[str | None]
    refusal: Required[None]
    reasoning: str
    reasoning_content: str
    tool_calls: list[ToolCallReply]


class ChatChoice(Reply):
    """One choice of a reply. `stop_reason` is the stop string, or the id in `stop_token_ids`, that ended the choice.
    `token_ids` is sent only with `return_token_ids`."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    token_ids: Annotated[list[int] | None, if_any] = None


class ChatCompletion(Reply):
    """The whole reply. `prompt_logprobs`, `prompt_token_ids` and `timings` are sent only if the request asks for
    them."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: Annotated[PromptLogprobs | None, if_any] = None
    prompt_token_ids: Annotated[list[int] | None, if_any] = None
    timings: Annotated[Timings | None, if_any] = None
    jamba_cache: Annotated[JambaCache | None, if_any] = None


class FunctionDelta(TypedDict, total=False):
    name: str
    arguments: Required[str]


class ToolCallDelta(TypedDict, total=False):
    """The part of a tool call that one event adds. The first event of a call has `id`, `type` and the function's name,
    with empty arguments. Later events add to the arguments."""

    index: Required[int]
    id: str
    type: Literal["function"]
    function: Required[FunctionDelta]


class Delta(TypedDict, total=False):
    """The part of a message that one event adds. The first delta of a choice has `role`. The last delta comes with the
    finish reason and is empty. Each delta between these two has content, reasoning or a part of a tool call."""

    role: Literal["assistant"]
    content: str
    reasoning: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class ChunkChoice(Reply):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    token_ids: Annotated[list[int] | None, if_any] = None


class ChatCompletionChunk(Reply):
    """One event of a stream. It has `usage` only with `stream_options.include_usage`; then the last event has the token
    counts, and in all earlier events `usage` is null unless `continuous_usage_stats` is set. With `return_token_ids`,
    the first event has `prompt_token_ids`, and the events with new tokens have `token_ids`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: Annotated[list[int] | None, if_any] = None
    timings: Annotated[Timings | None, if_any] = None
    jamba_cache: Annotated[JambaCache | None, if_any] = None
