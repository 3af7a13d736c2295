"""The request fields that ask for a reply of a certain form: OpenAI's `response_format`, vLLM's `structured_outputs`
and vLLM's older fields, whose names begin with `guided_`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self, cast

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from jamba_server.engine.grammar.limits import MAX_CHOICE_CHARS, MAX_CHOICES, MAX_REGEX_CHARS
from jamba_server.engine.validation import MAX_GRAMMAR_CHARS
from jamba_server.server.http.schemas.base import RequestBody, invalid, unsupported
from jamba_server.server.text.grammars.types import OutputFormat

# Matches a grammar rule in the notation of GBNF or EBNF, which this server does not read.
_OTHER_FORM = re.compile(r"^\s*<?[\w-]+>?\s*::=", re.MULTILINE)


def _string_or_object(value: object) -> str | None:
    return "(string)" if isinstance(value, str) else "(object)" if isinstance(value, dict) else None


JsonSchema = Annotated[
    Annotated[str, Field(max_length=MAX_GRAMMAR_CHARS), Tag("(string)")] | Annotated[dict[str, Any], Tag("(object)")],
    Discriminator(
        _string_or_object,
        custom_error_type="schema_type",
        custom_error_message="must be a JSON schema, as an object or as a string",
    ),
]
Regex = Annotated[str, Field(min_length=1, max_length=MAX_REGEX_CHARS)]
Choices = Annotated[
    list[Annotated[str, Field(max_length=MAX_CHOICE_CHARS)]],
    Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True),
]
Lark = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]

_SCHEMA = "A JSON schema, as an object or as a string. The content is JSON without optional white space."
_REGEX = "A regular expression that the whole content matches."
_CHOICE = "The content is one of these strings."
_LARK = "A grammar of the content in Lark's form, as llguidance reads it. Its first rule is `start`."


class TextFormat(RequestBody):
    """The response format of plain text."""

    type: Annotated[Literal["text"], Field(description='Always "text".')]


class JsonObjectFormat(RequestBody):
    """The response format of any JSON object."""

    type: Annotated[Literal["json_object"], Field(description='Always "json_object".')]


class NamedSchema(RequestBody):
    """A JSON schema with a name."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: Annotated[
        Annotated[str, Field(max_length=256)] | None, Field(description="The schema's name. It has no effect.")
    ] = None
    description: Annotated[
        Annotated[str, Field(max_length=65536)] | None, Field(description="A note on the schema. It has no effect.")
    ] = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema", description="The JSON schema of the content.")]
    strict: Annotated[
        bool | None, Field(description="It has no effect: the content always follows the schema exactly.")
    ] = None


class JsonSchemaFormat(RequestBody):
    """The response format of JSON that follows a schema."""

    type: Annotated[Literal["json_schema"], Field(description='Always "json_schema".')]
    json_schema: Annotated[NamedSchema, Field(description="The schema of the reply's content.")]


def _format_tag(value: object) -> str | None:
    """Returns the tag by which pydantic chooses the class that validates a response format."""
    return f"({cast('dict[str, Any]', value).get('type')})" if isinstance(value, dict) else None


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("(text)")]
    | Annotated[JsonObjectFormat, Tag("(json_object)")]
    | Annotated[JsonSchemaFormat, Tag("(json_schema)")],
    Discriminator(
        _format_tag,
        custom_error_type="format_type",
        custom_error_message="must be an object whose type is 'text', 'json_object' or 'json_schema'",
    ),
]


class StructuredOutputs(RequestBody):
    """The field `structured_outputs` of vLLM's API, which says what form a reply must have. Exactly one form must be
    given."""

    json_schema: Annotated[JsonSchema | None, Field(alias="json", description=_SCHEMA)] = None
    regex: Annotated[Regex | None, Field(description=_REGEX)] = None
    choice: Annotated[Choices | None, Field(description=_CHOICE)] = None
    grammar: Annotated[Lark | None, Field(description=_LARK)] = None
    json_object: Annotated[bool | None, Field(description="If true, the content is any JSON object.")] = None
    structural_tag: Annotated[
        str | dict[str, Any] | None, unsupported("", {}), Field(description="Not supported. Use `grammar`.")
    ] = None
    whitespace_pattern: Annotated[
        str | None, unsupported(""), Field(description="Not supported: JSON has no optional white space.")
    ] = None
    disable_any_whitespace: Annotated[
        bool | None, Field(description="It has no effect: JSON never has optional white space.")
    ] = None
    disable_additional_properties: Annotated[
        bool | None,
        unsupported(False),
        Field(description="Not supported. Set `additionalProperties` to false in the schema."),
    ] = None
    disable_fallback: Annotated[
        bool | None, Field(description="It has no effect: this server has one library for grammars.")
    ] = None

    def forms(self) -> Iterator[OutputFormat]:
        return _forms(
            json_schema=("structured_outputs.json", self.json_schema),
            regex=("structured_outputs.regex", self.regex),
            choice=("structured_outputs.choice", self.choice),
            lark=("structured_outputs.grammar", self.grammar),
            json_object=("structured_outputs.json_object", self.json_object or None),
        )


class FormatFields(RequestBody):
    """The request fields that ask for a reply of a certain form, such as JSON or a regular expression. At most one form
    may be given."""

    response_format: Annotated[
        ResponseFormat | None,
        Field(description="The form of the content: text, any JSON object, or JSON that follows a schema."),
    ] = None
    structured_outputs: Annotated[
        StructuredOutputs | None, Field(description="vLLM's field for the form of the content.")
    ] = None
    guided_json: Annotated[JsonSchema | None, Field(description=f"vLLM's older field. {_SCHEMA}")] = None
    guided_regex: Annotated[Regex | None, Field(description=f"vLLM's older field. {_REGEX}")] = None
    guided_choice: Annotated[Choices | None, Field(description=f"vLLM's older field. {_CHOICE}")] = None
    guided_grammar: Annotated[Lark | None, Field(description=f"vLLM's older field. {_LARK}")] = None
    guided_decoding_backend: Annotated[
        str | None, Field(description="vLLM's older field. It has no effect: this server has one library for grammars.")
    ] = None
    guided_whitespace_pattern: Annotated[
        str | None,
        unsupported(""),
        Field(description="vLLM's older field. Not supported: JSON has no optional white space."),
    ] = None

    @model_validator(mode="after")
    def _check_one_form(self) -> Self:
        forms = list(self._forms())
        if len(forms) > 1:
            raise invalid(f"is sent together with `{forms[1].param}`; send one form only", field=forms[0].param)
        for form in forms:
            if form.kind == "lark" and _OTHER_FORM.search(form.value):
                raise invalid(
                    'has rules with "::="; it must be in Lark\'s form, such as "start: ..."', field=form.param
                )
        return self

    @property
    def output_format(self) -> OutputFormat | None:
        """Returns the form that the reply's content must have, or None if any text is allowed."""
        return next(self._forms(), None)

    def _forms(self) -> Iterator[OutputFormat]:
        match self.response_format:
            case JsonObjectFormat():
                yield OutputFormat(kind="json_object", param="response_format")
            case JsonSchemaFormat(json_schema=named):
                param = "response_format.json_schema.schema"
                yield OutputFormat(kind="json_schema", value=named.json_schema, param=param)
            case _:
                pass
        if self.structured_outputs is not None:
            yield from self.structured_outputs.forms()
        yield from _forms(
            json_schema=("guided_json", self.guided_json),
            regex=("guided_regex", self.guided_regex),
            choice=("guided_choice", self.guided_choice),
            lark=("guided_grammar", self.guided_grammar),
        )


def _forms(**fields: tuple[str, Any]) -> Iterator[OutputFormat]:
    """Yields an `OutputFormat` for each argument that has a value. The name of an argument is the kind of the format.
    Its value is a pair: the name of the request's field, and the field's value."""
    for kind, (param, value) in fields.items():
        if value is None:
            continue
        if kind == "json_schema" and isinstance(value, str):
            value = _parsed(value, param)
        elif kind == "choice":
            value = tuple(cast("list[str]", value))
        elif kind == "json_object":
            value = None
        yield OutputFormat(kind=cast("Any", kind), value=value, param=param)


def _parsed(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise invalid("is a string that is not JSON", field=param) from None
