"""The request fields that affect how the chat template makes the prompt, such as tools, documents and variables of the
template."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from jamba_server.server.http.schemas.base import RequestBody, invalid
from jamba_server.server.http.schemas.tools import MAX_TOOLS, Tools

MAX_DOCUMENTS = 256
MAX_TEMPLATE_VARIABLES = 64
MAX_TEMPLATE_CHARS = 1 << 20

ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Document = Annotated[dict[str, Any], Field(min_length=1)]


class TemplateFields(RequestBody):
    """The fields of a request that change the prompt which the chat template makes from the messages."""

    add_generation_prompt: Annotated[
        bool, Field(description="End the prompt with the beginning of an assistant's message.")
    ] = True
    continue_final_message: Annotated[
        bool,
        Field(description="End the prompt inside the last message, so that the reply continues this message."),
    ] = False
    tools: Annotated[
        Tools | None,
        Field(
            description=f"Functions that the model may call, at most {MAX_TOOLS}. Tools of other types are left out, "
            "and the header X-Warning says so."
        ),
    ] = None
    reasoning_effort: Annotated[
        ReasoningEffort | None,
        Field(
            description='"none" makes a reasoning model answer without thoughts. Other efforts reach the chat template '
            "if it has a variable of that name; otherwise they are ignored, and the header X-Ignored-Fields says so."
        ),
    ] = None
    documents: Annotated[
        Annotated[list[Document], Field(max_length=MAX_DOCUMENTS, fail_fast=True)] | None,
        Field(
            description="Documents that the chat template puts into the prompt: objects with `text`, `title` and more."
        ),
    ] = None
    chat_template: Annotated[
        Annotated[str, Field(max_length=MAX_TEMPLATE_CHARS)] | None,
        Field(
            description="A chat template that replaces the model's. The server must run with --allow-request-templates."
        ),
    ] = None
    chat_template_kwargs: Annotated[
        Annotated[dict[str, Any], Field(max_length=MAX_TEMPLATE_VARIABLES)] | None,
        Field(description="Variables of the chat template. A variable that the template does not read is refused."),
    ] = None

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        asks_for_turn = self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set
        if self.continue_final_message and asks_for_turn:
            raise invalid("is not allowed together with `add_generation_prompt`: true", field="continue_final_message")
        return self
