"""/v1/models, /tokenize, /detokenize, /tokenizer_info and the replies about the server itself."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jamba_server.server.http.schemas.base import Reply, RequestBody, TokenId, invalid
from jamba_server.server.http.schemas.chat import Messages


class ModelCard(Reply):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jamba"
    root: str
    max_model_len: int
    demonstration: bool
    description: str | None


class ModelList(Reply):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeRequest(RequestBody):
    """Either `prompt` or `messages`. `add_special_tokens` is true unless set, but a chat template writes its own."""

    model: Annotated[str, Field(max_length=512)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise invalid("Send either `prompt` or `messages`.", field="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise invalid("The chat template writes the special tokens itself.", field="add_special_tokens")
        if self.prompt is not None and "add_generation_prompt" in self.model_fields_set:
            raise invalid("Only allowed with `messages`.", field="add_generation_prompt")
        return self


class TokenizeReply(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenizerInfoReply(Reply):
    """What vLLM's endpoint of this name tells of tokenizer_config.json, and the ids of the tokens that it names."""

    tokenizer_class: str
    model_max_length: int
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    chat_template: str | None


class DetokenizeRequest(RequestBody):
    model: Annotated[str, Field(max_length=512)] | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class DetokenizeReply(Reply):
    prompt: str


class HealthReply(Reply):
    """`reason` says why it is not well."""

    status: Literal["ok", "dead", "ready", "not ready"]
    reason: str | None = None


class AboutReply(Reply):
    """`models` are the served names; `links` go to what the server has."""

    name: str
    version: str
    models: list[str]
    links: dict[str, str]


class VersionReply(Reply):
    version: str
