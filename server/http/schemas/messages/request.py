"""The requests for /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.base import (
    MAX_STOPS,
    CacheOptions,
    RequestBody,
    StopString,
    Temperature,
    TopP,
    invalid,
    within,
)
from jamba_server.server.http.schemas.messages.content import CacheControl, InputMessage, Texts
from jamba_server.server.http.schemas.messages.tools import (
    MAX_TOOLS,
    JsonFormat,
    OutputConfig,
    Thinking,
    ToolChoice,
    ToolDefinition,
)
from jamba_server.server.http.schemas.peer_fields import PeerField, PeerFields

# Fields of other APIs that would change the reply. Requests to /v1/messages that have them are refused.
_PEERS: PeerFields = MappingProxyType(
    {
        **peer_fields.CHAT,
        **{
            name: PeerField("/v1/chat/completions", neutral)
            for name, neutral in {
                "n": (1,),
                "seed": (),
                "min_p": (0,),
                "repetition_penalty": (1,),
                "presence_penalty": (0,),
                "frequency_penalty": (0,),
                "logit_bias": ({},),
                "logprobs": (False,),
                "top_logprobs": (0,),
                "stop_token_ids": ([],),
                "ignore_eos": (False,),
                "min_tokens": (0,),
                "bad_words": ([],),
                "allowed_token_ids": ([],),
                "functions": ([],),
                "documents": ([],),
                "chat_template": ("",),
                "chat_template_kwargs": ({},),
            }.items()
        },
        "stop": PeerField("/v1/chat/completions", ([], ""), instead="stop_sequences"),
        "max_completion_tokens": PeerField("/v1/chat/completions", instead="max_tokens"),
        "response_format": PeerField("/v1/chat/completions", ({"type": "text"},), instead="output_config.format"),
        "reasoning_effort": PeerField("/v1/chat/completions", instead="output_config.effort"),
        "parallel_tool_calls": PeerField(
            "/v1/chat/completions", (True,), instead="tool_choice.disable_parallel_tool_use"
        ),
        "container": PeerField("Anthropic"),
        "mcp_servers": PeerField("Anthropic", ([],)),
        "thread": PeerField("Anthropic"),
    }
)


class Conversation(RequestBody):
    """The request fields from which the prompt is made. The endpoints /v1/messages and /v1/messages/count_tokens both
    have them."""

    peers = _PEERS

    model: Annotated[
        Annotated[str, Field(max_length=512)] | None,
        Field(description="One of the names that /v1/models lists. Default: the first of them."),
    ] = None
    messages: Annotated[
        Annotated[list[InputMessage], Field(min_length=1, fail_fast=True)],
        Field(description="The conversation so far. The reply continues a last message with the role `assistant`."),
    ]
    system: Annotated[Texts | None, Field(description="The system message: a text, or a list of text blocks.")] = None
    tools: Annotated[
        Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)] | None,
        Field(description="Functions that the model may call. Anthropic's own tools, such as web search, are skipped."),
    ] = None
    tool_choice: Annotated[
        ToolChoice | None,
        Field(description="Whether the model must call a tool, and `disable_parallel_tool_use` for at most one call."),
    ] = None
    thinking: Annotated[
        Thinking | None,
        Field(description="Whether the model reasons first, and with how many tokens. Default: it does not."),
    ] = None
    output_config: Annotated[
        OutputConfig | None,
        Field(description="The JSON schema of the reply (`format`) and the `effort` of reasoning."),
    ] = None
    output_format: Annotated[
        JsonFormat | None, Field(description="The older name of `output_config.format`. Send only one of the two.")
    ] = None
    cache_control: Annotated[
        CacheControl | None, Field(description="Save the model's state at the end of the last message.")
    ] = None
    speed: Annotated[str | None, Field(description="It has no effect: this server has one speed.")] = None

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        choice, tools = self.tool_choice, self.tools or []
        all_names = [tool.name for tool in tools]
        if len(all_names) != len(set(all_names)):
            twice = next(name for name in all_names if all_names.count(name) > 1)
            raise invalid(f"has the tool {twice!r} twice", field="tools")
        if choice is not None and choice.type in ("any", "tool"):
            names = {tool.name for tool in tools if tool.is_custom}
            if not names:
                raise invalid(f"has the type {choice.type!r}, but `tools` has no custom tool", field="tool_choice")
            if choice.name is not None and choice.name not in names:
                why = f"names the tool {choice.name[:64]!r}, which is not a custom tool in `tools`"
                raise invalid(why, field="tool_choice")
        if self.output_format is not None and self.output_config is not None and self.output_config.format is not None:
            raise invalid("is another name of `output_config.format`; send one of them", field="output_format")
        return self

    @property
    def json_schema(self) -> dict[str, Any] | None:
        """Returns the JSON schema that the reply must match, or None if the reply may be any text."""
        format_ = self.output_format or (self.output_config and self.output_config.format)
        return format_.json_schema if format_ else None


class CountTokensRequest(Conversation):
    """A request for the number of prompt tokens that a conversation would have."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "Tell me a story."}]}]}
    )


class MessagesRequest(Conversation):
    """A request for the next message of a conversation."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"max_tokens": 64, "messages": [{"role": "user", "content": "Tell me a story."}]}]
        }
    )

    max_tokens: Annotated[
        int, within("max_tokens"), Field(description="Maximum tokens of the reply. 0 only fills the prefix cache.")
    ]
    stream: Annotated[bool | None, Field(description="Send the reply as server-sent events while it is generated.")] = (
        None
    )
    stop_sequences: Annotated[
        Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None,
        Field(description=f"Up to {MAX_STOPS} strings that end the reply."),
    ] = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: Annotated[
        Annotated[int, within("top_k")] | None,
        Field(description="Sample from this number of the most likely tokens. 0 means all tokens."),
    ] = None
    cache: Annotated[
        CacheOptions | None,
        Field(description="How the request uses the prefix cache: `explain`, `read`, `write` and `pin`."),
    ] = None
    metadata: Annotated[
        dict[str, Any] | None, Field(description="The client's name for its user. It has no effect.")
    ] = None
    service_tier: Annotated[str | None, Field(description="It has no effect: this server has one tier.")] = None
    inference_geo: Annotated[str | None, Field(description="It has no effect: the server does not choose a place.")] = (
        None
    )
    diagnostics: Annotated[
        dict[str, Any] | None, Field(description="A wish for a report on cache misses. It has no effect.")
    ] = None
