"""The requests and replies of /v1/models, /v1/streams, /tokenize, /detokenize and /tokenizer_info, and of the routes
for operators."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.base import Reply, RequestBody, TokenId, invalid
from jamba_server.server.http.schemas.chat import Messages
from jamba_server.server.http.schemas.template_fields import TemplateFields


class ModelCard(Reply):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jamba"
    root: str
    max_model_len: int
    demonstration: bool
    description: str | None


class DeletedStream(Reply):
    id: str
    object: Literal["stream"] = "stream"
    deleted: Literal[True] = True


class ModelList(Reply):
    object: Literal["list"] = "list"
    data: list[ModelCard]


ModelName = Annotated[str, Field(max_length=512)]


class TokenizeRequest(TemplateFields):
    """A request for the token ids of either `prompt` or `messages`.

    The field `add_special_tokens` affects only `prompt`, because the chat template writes the special tokens of
    `messages`. The fields of the chat template are only allowed with `messages`.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [{"prompt": "Once upon a time"}]})
    peers = peer_fields.TOKENIZE

    model: Annotated[ModelName | None, Field(description="One of the names that /v1/models lists.")] = None
    prompt: Annotated[str | None, Field(description="The text of a completion's prompt.")] = None
    messages: Annotated[Messages | None, Field(description="A conversation, in place of `prompt`.")] = None
    add_special_tokens: Annotated[
        bool | None, Field(description="Put the begin-of-text token before `prompt`. Default: true.")
    ] = None
    return_token_strs: Annotated[bool | None, Field(description="Return also the text of each token.")] = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.prompt is None and self.messages is None:
            raise invalid("is required, unless `messages` is sent", field="prompt")
        if self.prompt is not None and self.messages is not None:
            raise invalid("is not allowed together with `messages`; send one of them", field="prompt")
        if self.messages is not None and self.add_special_tokens:
            raise invalid("must be false: the chat template writes the special tokens", field="add_special_tokens")
        for name, field in TemplateFields.model_fields.items():
            if self.prompt is not None and getattr(self, name) not in (field.default, [], {}, ""):
                raise invalid("is only allowed with `messages`", field=name)
        return self


class TokenizeReply(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class RenderReply(Reply):
    """The prompt of a conversation, as text and as token ids.

    `save_positions` are the numbers of prompt tokens after which the model's state is saved, in addition to states that
    are saved at regular distances. `opens_reasoning` says whether the reply begins with reasoning, because the prompt
    ends with the start tag of the reasoning.
    """

    prompt: str
    token_ids: list[int]
    count: int
    max_model_len: int
    save_positions: list[int]
    opens_reasoning: bool


class TokenizerInfoReply(Reply):
    """The reply of /tokenizer_info: the fields of the same endpoint in vLLM, and the ids of the special tokens."""

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
    """A request for the text that a list of token ids decodes to."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tokens": [1, 4, 4]}]})
    peers = peer_fields.DETOKENIZE

    model: Annotated[ModelName | None, Field(description="One of the names that /v1/models lists.")] = None
    tokens: Annotated[
        list[TokenId], Field(fail_fast=True, description="The token ids. Special tokens are part of the text.")
    ]


class DetokenizeReply(Reply):
    prompt: str


class HealthReply(Reply):
    """The state of the server. The field `reason` says why the server cannot run requests now.

    While the engine restarts, the status of /health is "ok", and `reason` says that it restarts.
    """

    status: Literal["ok", "loading", "dead", "ready", "not ready", "live"]
    reason: str | None = None


class LoadingReply(HealthReply):
    """The progress of the engine's first start.

    The field `phase` names the current phase. The field `fraction`, from 0 to 1, says how much of this phase is done.
    """

    phase: str
    fraction: float


class MemoryPlan(Reply):
    """How the engine divides its memory. Sizes are in bytes.

    The KV pages hold the keys and values of `kv_tokens` tokens. The states are those of `running_sequences` running
    sequences, and `saved_states` states that are saved for later requests.
    """

    weight_bytes: int
    kv_bytes: int
    kv_tokens: int
    state_bytes: int
    running_sequences: int
    saved_states: int


class ServerInfoReply(Reply):
    """What the engine loaded and which sizes it chose. `dtype` is the number format of weights and KV pages;
    `quantization` is that of quantised weights. `kernels` names the implementation of each operation. If there are
    several engines (`data_parallel_size`), the sizes in `memory` are those of all of them together."""

    version: str
    architecture: str
    num_parameters: int
    device: str
    dtype: str
    quantization: str | None
    activation_quantization: str
    max_model_len: int
    max_num_batched_tokens: int
    max_num_mixed_tokens: int
    memory: MemoryPlan
    kernels: dict[str, str]
    batch_invariant: bool
    load_seconds: float
    data_parallel_size: int = 1


class AboutReply(Reply):
    """The server's name and version, the names of its models, and the paths of its pages."""

    name: str
    version: str
    models: list[str]
    links: dict[str, str]


class VersionReply(Reply):
    version: str
