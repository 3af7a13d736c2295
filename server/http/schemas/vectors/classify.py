"""The request and the reply of /classify."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.base import Reply, if_any
from jamba_server.server.http.schemas.vectors.fields import InputBody, Text, UseActivation, VectorUsage

MAX_LABELS = 256  # maximum number of label words in a request


class ClassifyRequest(InputBody):
    """A request for the classes of texts, with vLLM's fields, and `labels` for a language model."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": "Is water wet? Answer:", "labels": ["yes"]}]})
    peers = peer_fields.VECTOR

    labels: Annotated[
        Annotated[list[Text], Field(min_length=1, max_length=MAX_LABELS, fail_fast=True)] | None,
        Field(
            description="For a language model: words that may follow the input. Each gets the probability that it does "
            "so, relative to the others. Default: the option --classify-labels."
        ),
    ] = None
    use_activation: UseActivation = True


class Class(Reply):
    """`logprobs`, for label words only, are the log-probabilities of the whole words, in the order of the labels."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    logprobs: Annotated[list[float] | None, if_any] = None


class ClassList(Reply):
    """`labels` are the names of the classes, in the order of the probabilities."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    labels: list[str]
    data: list[Class]
    usage: VectorUsage
