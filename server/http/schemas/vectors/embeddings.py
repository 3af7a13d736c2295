"""The requests and replies of /v1/embeddings and /pooling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from jamba_server.engine.types import Pooling
from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.base import Reply
from jamba_server.server.http.schemas.vectors.fields import InputBody, UseActivation, VectorUsage

Dimensions = Annotated[
    Annotated[int, Field(ge=1)] | None,
    Field(description="Keep only this number of the first dimensions, before the division by the length."),
]
EncodingFormat = Annotated[
    Literal["float", "base64"],
    Field(description='Send vectors as JSON numbers ("float"), or as float32 numbers in base64.'),
]
PoolingField = Annotated[
    Pooling | None,
    Field(
        description='Use the hidden state of the last token ("last"), or the mean over all tokens ("mean"). Default: '
        "the option --embedding-pooling."
    ),
]


class EmbeddingRequest(InputBody):
    """A request for embeddings, with OpenAI's fields and some of vLLM's."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": "Once upon a time"}]})
    peers = peer_fields.EMBEDDING

    dimensions: Dimensions = None
    encoding_format: EncodingFormat = "float"
    pooling: PoolingField = None
    use_activation: UseActivation = True


class PoolingRequest(InputBody):
    """vLLM's request for the output of whatever the model ends with: hidden states, or a classifier's outputs."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": "Once upon a time"}]})
    peers = peer_fields.VECTOR

    task: Annotated[
        Literal["embed", "classify"] | None,
        Field(description='Return hidden states ("embed") or a classifier\'s outputs. Default: what the model is for.'),
    ] = None
    dimensions: Dimensions = None
    encoding_format: EncodingFormat = "float"
    pooling: PoolingField = None
    use_activation: UseActivation = True


class Embedding(Reply):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(Reply):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: VectorUsage


class Pooled(Reply):
    object: Literal["pooling"] = "pooling"
    index: int
    data: list[float] | str


class PooledList(Reply):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Pooled]
    usage: VectorUsage
