"""The replies of /v1/messages and the events of its streams."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from jamba_server.server.http.schemas.base import Reply, if_any
from jamba_server.server.http.schemas.cache_report import JambaCache

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class ReplyText(Reply):
    type: Literal["text"] = "text"
    text: str


class ReplyThinking(Reply):
    """A content block with the model's reasoning. The signature is the SHA-256 hash of the reasoning, in base64."""

    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str


class ReplyToolUse(Reply):
    """A content block with a tool call. `input` has the arguments."""

    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


ReplyBlock = ReplyText | ReplyThinking | ReplyToolUse


class OutputTokensDetails(Reply):
    """`thinking_tokens` is the number of generated tokens that belong to the model's reasoning."""

    thinking_tokens: int


class MessageUsage(Reply):
    """The token counts of a request. The sum of the first three numbers is the number of tokens in the prompt.

    `cache_read_input_tokens` counts the prompt tokens that were found in the prefix cache.
    `cache_creation_input_tokens` counts those that were computed, up to the last message boundary at which the model's
    state was saved for later requests; it is 0 if the request has no `cache_control` mark. `input_tokens` counts the
    other prompt tokens.
    """

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class MessageReply(Reply):
    """A reply of the model. In the event `message_start`, it has no content and no stop reason yet."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ReplyBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    jamba_cache: Annotated[JambaCache | None, if_any] = None


class TokensCount(Reply):
    input_tokens: int


class Hello(Reply):
    message: Literal["hello"] = "hello"


class MessageErrorDetail(Reply):
    type: str
    message: str


class MessageErrorReply(Reply):
    type: Literal["error"] = "error"
    error: MessageErrorDetail
    request_id: str


class TextDelta(Reply):
    type: Literal["text_delta"] = "text_delta"
    text: str


class ThinkingDelta(Reply):
    type: Literal["thinking_delta"] = "thinking_delta"
    thinking: str


class SignatureDelta(Reply):
    type: Literal["signature_delta"] = "signature_delta"
    signature: str


class InputJsonDelta(Reply):
    type: Literal["input_json_delta"] = "input_json_delta"
    partial_json: str


BlockDelta = TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class MessageStart(Reply):
    type: Literal["message_start"] = "message_start"
    message: MessageReply


class Ping(Reply):
    type: Literal["ping"] = "ping"


class ContentBlockStart(Reply):
    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: ReplyBlock


class ContentBlockDelta(Reply):
    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: BlockDelta


class ContentBlockStop(Reply):
    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class StopDelta(Reply):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Reply):
    type: Literal["message_delta"] = "message_delta"
    delta: StopDelta
    usage: MessageUsage
    jamba_cache: Annotated[JambaCache | None, if_any] = None


class MessageStop(Reply):
    type: Literal["message_stop"] = "message_stop"


Event = MessageStart | Ping | ContentBlockStart | ContentBlockDelta | ContentBlockStop | MessageDelta | MessageStop
