"""Rows of the fields that /v1/chat/completions, /v1/completions and /v1/responses have in common."""

from __future__ import annotations

from typing import Any

from tests.conformance.rows import Inert, Refused, Row, contains, params, some

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
LARK = 'start: "yes"'

_EXACT: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.25,
    "presence_penalty": 1.5,
    "frequency_penalty": -1.5,
    "top_k": 7,
    "min_p": 0.125,
    "repetition_penalty": 1.25,
    "seed": 11,
    "ignore_eos": True,
    "min_tokens": 3,
}


CACHE_ROWS = [
    Row(field="cache.explain", body={"cache": {"explain": True}}, engine={"0.cache.explain": True}),
    Row(field="cache.read", body={"cache": {"read": False}}, engine={"0.cache.read": False}),
    Row(field="cache.write", body={"cache": {"write": False}}, engine={"0.cache.write": False}),
    Row(field="cache.pin", body={"cache": {"pin": 5}}, engine={"0.cache.pin_seconds": 5.0}),
]


def sampling_rows(text: str) -> list[Row]:
    """`text` is the path of the reply's text."""
    rows = [Row(field=name, body={name: value}, engine=params(**{name: value})) for name, value in _EXACT.items()]
    return [
        *rows,
        *CACHE_ROWS,
        Row(field="model", body={"model": "alias"}, reply={"model": "alias"}),
        Row(field="logit_bias", body={"logit_bias": {"9": 2.5}}, engine=params(logit_bias={"9": 2.5})),
        Row(field="stop_token_ids", body={"stop_token_ids": [9]}, engine=params(stop_token_ids=[9])),
        Row(field="allowed_token_ids", body={"allowed_token_ids": [2, 9]}, engine=params(allowed_token_ids=[2, 9])),
        Row(field="bad_words", body={"bad_words": ["world"]}, engine=params(bad_words=some)),
        Row(field="cache_salt", body={"cache_salt": "secret"}, engine={"0.cache_salt": "secret"}),
        Row(field="priority", body={"priority": -5}, engine={"0.priority": -5}),
        Row(field="stop", body={"stop": " the"}, reply={text: _is("hello")}),
        Row(field="stop", body={"stop": ["never", " world"]}, reply={text: _is("hello the")}),
        Row(
            field="include_stop_str_in_output",
            base={"stop": [" the"]},
            body={"include_stop_str_in_output": True},
            reply={text: _is("hello the")},
        ),
        Row(
            field="skip_special_tokens",
            body={"skip_special_tokens": False},
            says=("hello<|pad|> world",),
            reply={text: contains("<|pad|>")},
        ),
    ]


def _is(text: str) -> Any:
    return lambda value: isinstance(value, str) and value.strip() == text


def _form(field: str, body: dict[str, Any]) -> Row:
    return Row(field=field, body=body, engine=params(grammar=some))


FORM_ROWS = [
    _form("guided_json", {"guided_json": SCHEMA}),
    _form("guided_regex", {"guided_regex": "[a-c]+"}),
    _form("guided_choice", {"guided_choice": ["red", "blue"]}),
    _form("guided_grammar", {"guided_grammar": LARK}),
    _form("structured_outputs.json", {"structured_outputs": {"json": SCHEMA}}),
    _form("structured_outputs.regex", {"structured_outputs": {"regex": "[a-c]+"}}),
    _form("structured_outputs.choice", {"structured_outputs": {"choice": ["red", "blue"]}}),
    _form("structured_outputs.grammar", {"structured_outputs": {"grammar": LARK}}),
    _form("structured_outputs.json_object", {"structured_outputs": {"json_object": True}}),
]
_JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
RESPONSE_FORMAT_ROWS = [
    _form("response_format.type", {"response_format": {"type": "json_object"}}),
    _form("response_format.json_schema.schema", {"response_format": _JSON_FORMAT}),
]
STREAM_ROWS = [
    Row(
        field="stream_options.include_usage",
        base={"stream_options": {}},
        body={"stream_options": {"include_usage": True}},
        reply={"usage.completion_tokens": some},
        unstreamed=False,
    ),
    Row(
        field="stream_options.continuous_usage_stats",
        base={"stream_options": {"include_usage": True}},
        body={"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        reply={"usages": some},
        unstreamed=False,
    ),
]
LENGTH_ROWS = [
    Row(field=name, body={name: 2}, reply={"choices.0.finish_reason": "length"}, engine=params(max_tokens=2))
    for name in ("max_tokens", "max_completion_tokens")
]
DETAIL_ROWS = [
    Row(field="n", body={"n": 2}, engine={"1.index": 1}, reply={"choices.1.index": 1}),
    Row(field="timings_per_token", body={"timings_per_token": True}, reply={"timings.predicted_n": some}),
    Row(field="return_token_ids", body={"return_token_ids": True}, reply={"choices.0.token_ids": some}),
]

_INERT: dict[str, Any] = {
    "user": "somebody",
    "metadata": {"a": "b"},
    "service_tier": "flex",
    "safety_identifier": "somebody",
    "prompt_cache_key": "key",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "spaces_between_special_tokens": False,
    "guided_decoding_backend": "xgrammar",
}
INERT = [Inert(name, {name: value}) for name, value in _INERT.items()]
INERT_FORMS = [
    Inert(
        f"structured_outputs.{name}",
        {"structured_outputs": {"regex": "a+", name: True}},
        {"structured_outputs": {"regex": "a+"}},
    )
    for name in ("disable_any_whitespace", "disable_fallback")
]
INERT_RESPONSE_FORMATS = [
    Inert(
        f"response_format.json_schema.{name}",
        {"response_format": {**_JSON_FORMAT, "json_schema": {"schema": SCHEMA, "name": "a", name: value}}},
        {"response_format": _JSON_FORMAT},
    )
    for name, value in {"name": "other", "description": "a note", "strict": True}.items()
]
REFUSED = [
    Refused("guided_whitespace_pattern", {"guided_whitespace_pattern": " "}),
    *(
        Refused(f"structured_outputs.{name}", {"structured_outputs": {"regex": "a+", name: value}})
        for name, value in {
            "structural_tag": "{}",
            "whitespace_pattern": " ",
            "disable_additional_properties": True,
        }.items()
    ),
]
REFUSED_STREAM = [
    Refused("stream_options.include_obfuscation", {"stream": True, "stream_options": {"include_obfuscation": True}})
]
