"""The requests and replies of /v1/score and /v1/rerank."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.base import Reply, RequestBody, if_any, invalid, string_or_list
from jamba_server.server.http.schemas.vectors.fields import MAX_INPUTS, Text, UseActivation, VectorBody, VectorUsage

Texts = Annotated[
    Annotated[Text, Tag("(string)")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("(list)")],
    Discriminator(
        string_or_list,
        custom_error_type="prompt_type",
        custom_error_message="must be a string or a list of strings",
    ),
]


class ScoreRequest(VectorBody):
    """A request for the scores of pairs of texts, with vLLM's fields."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text_1": "What is wet?", "text_2": ["Water.", "Sand."]}]}
    )
    peers = peer_fields.PAIR

    text_1: Annotated[Texts, Field(description="A text, such as a question, or a list of texts.")]
    text_2: Annotated[
        Texts,
        Field(description="A text, such as a document, or a list of texts, of which each is paired with `text_1`."),
    ]
    use_activation: UseActivation = True

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        first, second = self._lists
        if len(first) not in (1, len(second)):
            why = f"has {len(first)} texts, but `text_2` has {len(second)}; send one text, or as many as in `text_2`"
            raise invalid(why, field="text_1")
        return self

    @property
    def _lists(self) -> tuple[list[str], list[str]]:
        return _listed(self.text_1), _listed(self.text_2)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        first, second = self._lists
        return list(zip(first * len(second) if len(first) == 1 else first, second, strict=True))


def _listed(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


class Score(Reply):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(Reply):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: VectorUsage


class TextDocument(RequestBody):
    """A document as an object."""

    text: Annotated[Text, Field(description="The text of the document.")]


def _document_kind(value: object) -> str:
    return "(string)" if isinstance(value, str) else "(object)"


Document = Annotated[
    Annotated[Text, Tag("(string)")] | Annotated[TextDocument, Tag("(object)")], Discriminator(_document_kind)
]


class RerankRequest(VectorBody):
    """A request to order documents by their scores with a query, with the fields of Jina, Cohere and vLLM."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"query": "What is wet?", "documents": ["Water.", "Sand."]}]}
    )
    peers = peer_fields.PAIR

    query: Annotated[Text, Field(description="The text with which each document is paired.")]
    documents: Annotated[
        list[Document],
        Field(
            min_length=1,
            max_length=MAX_INPUTS,
            fail_fast=True,
            description="The documents: texts, or objects with the field `text`.",
        ),
    ]
    top_n: Annotated[
        Annotated[int, Field(ge=0)] | None,
        Field(description="Return only this number of the best documents. 0 means all."),
    ] = None
    return_documents: Annotated[bool, Field(description="Return the texts of the documents, too.")] = True
    use_activation: UseActivation = True

    @property
    def texts(self) -> list[str]:
        return [document if isinstance(document, str) else document.text for document in self.documents]


class RankedText(Reply):
    text: str


class Ranked(Reply):
    """`index` is the position of the document in the request."""

    index: int
    document: Annotated[RankedText | None, if_any] = None
    relevance_score: float


class Ranking(Reply):
    id: str
    model: str
    results: list[Ranked]
    usage: VectorUsage
