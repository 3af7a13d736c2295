"""The request and the reply of /v1/decisions."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, StrictBool, StrictStr, Tag, model_validator
from pydantic_core import PydanticCustomError

from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.base import NullableBody, Reply, RequestBody, invalid, string_or_list
from jamba_server.server.http.schemas.responses.items import (
    CustomToolCall,
    CustomToolCallOutput,
    FunctionCall,
    FunctionCallOutput,
    Item,
    RefusalPart,
)
from jamba_server.server.http.schemas.vectors.fields import Text, VectorBody

MAX_QUESTIONS = 400  # this limit and the next one are those of OpenAI's API
MAX_OPTIONS = 255
MAX_JSON_BYTES = 256 * 1024
PART_TYPES = ("input_text", "input_json", "output_text", "refusal")

Name = Annotated[str | None, Field(max_length=256, description="A name of the question, which the answer repeats.")]


class TextPart(NullableBody):
    """A text."""

    type: Annotated[Literal["input_text", "output_text"], Field(description="What kind of text it is.")]
    text: Annotated[str, Field(description="The text.")]
    prompt_cache_breakpoint: Annotated[
        dict[str, Any] | None,
        Field(description="The end of a prefix to cache. It has no effect: every prefix is cached."),
    ] = None


def _data_kind(value: object) -> str | None:
    return "(object)" if isinstance(value, dict) else "(list)" if isinstance(value, list) else None


JsonData = Annotated[
    Annotated[dict[str, Any], Tag("(object)")] | Annotated[list[dict[str, Any]], Tag("(list)")],
    Discriminator(
        _data_kind, custom_error_type="content_type", custom_error_message="must be an object or a list of objects"
    ),
]


class JsonPart(RequestBody):
    """JSON, which the model reads as text."""

    type: Literal["input_json"]
    data: Annotated[JsonData, Field(description="An object, or a list of objects.")]

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        if (size := len(self.text.encode())) > MAX_JSON_BYTES:
            raise invalid(f"has {size} bytes of JSON; at most {MAX_JSON_BYTES} are allowed", field="data")
        return self

    @property
    def text(self) -> str:
        return json.dumps(self.data, ensure_ascii=False, separators=(",", ":"))


def _one_of(types: tuple[str, ...], why: str = "", *, optional: bool = False) -> BeforeValidator:
    """Returns a validator that refuses objects whose `type` is none of `types`. The text `why` follows the type in the
    error. With `optional`, an object needs no type."""

    def check(value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else types[0]
        if kind not in types and not (optional and kind is None):
            has = f"has the type {str(kind)[:48]!r}{why}" if "type" in value else "has no `type`"
            raise PydanticCustomError("type", "{why}", {"why": f"{has}; it must be one of {', '.join(types)}"})
        return value

    return BeforeValidator(check)


def _by_type(types: tuple[str, ...]) -> Discriminator:
    """Chooses the member of a union whose tag is the `type` of an object in parentheses: one of `types`, of which the
    first one stands for all others."""

    def tag(value: Any) -> str:
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return f"({kind if kind in types else types[0]})"

    return Discriminator(tag)


Part = Annotated[
    Annotated[
        Annotated[TextPart, Tag("(input_text)")]
        | Annotated[RefusalPart, Tag("(refusal)")]
        | Annotated[JsonPart, Tag("(input_json)")],
        _by_type(("input_text", "input_json", "refusal")),
    ],
    _one_of(PART_TYPES, ", but the model reads only text"),
]
Content = Annotated[
    Annotated[str, Tag("(string)")] | Annotated[list[Part], Field(fail_fast=True), Tag("(list)")],
    Discriminator(
        string_or_list,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of text and JSON parts",
    ),
]


def text_of(content: str | list[TextPart | RefusalPart | JsonPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class DecisionMessage(NullableBody):
    """A message of the input."""

    type: Annotated[Literal["message"], Field(description='Always "message". May be left out.')] = "message"
    role: Annotated[
        Literal["user", "assistant", "system", "developer"],
        Field(description="The author of the message. `developer` is another name for `system`."),
    ]
    content: Annotated[Content, Field(description="The text, or a list of its parts.")]
    phase: Annotated[str | None, Field(description="A label of an earlier reply. It has no effect.")] = None

    def to_item(self) -> Item:
        return {"type": "message", "role": self.role, "content": [{"text": text_of(self.content)}]}


ITEM_TYPES = (
    "message",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
)


DecisionItem = Annotated[
    Annotated[
        Annotated[DecisionMessage, Tag("(message)")]
        | Annotated[FunctionCall, Tag("(function_call)")]
        | Annotated[FunctionCallOutput, Tag("(function_call_output)")]
        | Annotated[CustomToolCall, Tag("(custom_tool_call)")]
        | Annotated[CustomToolCallOutput, Tag("(custom_tool_call_output)")],
        _by_type(ITEM_TYPES),
    ],
    _one_of(ITEM_TYPES, ", which this server does not read", optional=True),
]
DecisionInput = Annotated[
    Annotated[Text, Tag("(string)")]
    | Annotated[list[DecisionItem], Field(min_length=1, fail_fast=True), Tag("(list)")],
    Discriminator(
        string_or_list,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of messages and tool calls",
    ),
]


class _Question(NullableBody):
    instructions: Annotated[Content, Field(description="What is asked about the input.")]
    name: Name = None

    @property
    def text(self) -> str:
        return text_of(self.instructions)


class Predicate(_Question):
    """Asks how likely it is that a statement about the input is true."""

    type: Literal["predicate"]


def _value_kind(value: object) -> str | None:
    return "(string)" if isinstance(value, str) else "(bool)" if isinstance(value, bool) else None


ChoiceValue = Annotated[
    Annotated[StrictStr, Tag("(string)")] | Annotated[StrictBool, Tag("(bool)")],
    Discriminator(
        _value_kind, custom_error_type="content_type", custom_error_message="must be a string, true or false"
    ),
]


class Choice(NullableBody):
    """One of the options of a question."""

    value: Annotated[ChoiceValue, Field(description="The value that the answer has: a text, true or false.")]
    description: Annotated[str | None, Field(description="What the option means.")] = None


class ChoiceQuestion(_Question):
    """Asks which of several options fits best."""

    type: Literal["choice"]
    choices: Annotated[
        list[Choice], Field(min_length=2, max_length=MAX_OPTIONS, fail_fast=True, description="The options.")
    ]

    @model_validator(mode="after")
    def _check_unique(self) -> Self:
        values = [(type(choice.value), choice.value) for choice in self.choices]
        if len(set(values)) < len(values):
            raise invalid("has two equal values", field="choices")
        return self


class Level(NullableBody):
    """One of the ordered levels of a question."""

    label: Annotated[str, Field(description="The name of the level.")]
    description: Annotated[str | None, Field(description="What the level means.")] = None


class ScoreQuestion(_Question):
    """Asks for a rating of the input."""

    type: Literal["score"]
    levels: Annotated[
        list[Level],
        Field(min_length=2, max_length=MAX_OPTIONS, fail_fast=True, description="The levels, the lowest first."),
    ]


QUESTION_TYPES = ("predicate", "choice", "score")


Question = Annotated[
    Annotated[
        Annotated[Predicate, Tag("(predicate)")]
        | Annotated[ChoiceQuestion, Tag("(choice)")]
        | Annotated[ScoreQuestion, Tag("(score)")],
        _by_type(QUESTION_TYPES),
    ],
    _one_of(QUESTION_TYPES),
]


class DecisionRequest(VectorBody):
    """A request of OpenAI's Decisions API: typed questions about one input, each answered with probabilities."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "input": "I was charged twice.",
                    "questions": [{"type": "predicate", "instructions": "The customer reports a double charge."}],
                }
            ]
        }
    )
    peers = peer_fields.DECISION

    input: Annotated[
        DecisionInput, Field(description="The input of all questions: a text, or messages and tool calls.")
    ]
    questions: Annotated[
        list[Question], Field(min_length=1, max_length=MAX_QUESTIONS, fail_fast=True, description="The questions.")
    ]
    prompt_cache_key: Annotated[
        str | None, Field(description="A hint for routing between machines. It has no effect.")
    ] = None
    prompt_cache_options: Annotated[
        dict[str, Any] | None,
        Field(description="The parts of the prompt that are cached. It has no effect: every prefix is cached."),
    ] = None
    safety_identifier: Annotated[str | None, Field(description="The client's name for its user. It has no effect.")] = (
        None
    )


class PredicateAnswer(Reply):
    type: Literal["predicate"] = "predicate"
    name: str | None
    probability: float


class ChoiceProbability(Reply):
    value: str | bool
    probability: float


class ChoiceAnswer(Reply):
    type: Literal["choice"] = "choice"
    name: str | None
    choice: str | bool
    confidence: float
    probabilities: list[ChoiceProbability]


class ScoreProbability(Reply):
    value: int
    label: str
    probability: float


class ScoreAnswer(Reply):
    type: Literal["score"] = "score"
    name: str | None
    score: float
    confidence: float
    probabilities: list[ScoreProbability]


Answer = PredicateAnswer | ChoiceAnswer | ScoreAnswer


class InputDetails(Reply):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Reply):
    reasoning_tokens: int = 0


class DecisionUsage(Reply):
    """The tokens of the input count once, however many questions there are."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int = 0
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class Decision(Reply):
    model: str
    answers: list[Answer]
    usage: DecisionUsage
