"""Rows of the endpoints that answer with vectors, classes, scores and decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.conformance.rows import DIFFERS, Body, Inert, Refused, Row, some

Model = Literal["text", "scores"]
HI = {"input": "Hi"}
PAIR = {"text_1": "Hi", "text_2": "Ho"}
DOCUMENTS = {"query": "Hi", "documents": ["Ho", "Ha"]}
PREDICATE = {"type": "predicate", "instructions": "It is."}
CHOICE = {"type": "choice", "instructions": "Which?", "choices": [{"value": "a"}, {"value": "b"}]}
SCORE = {"type": "score", "instructions": "How?", "levels": [{"label": "a"}, {"label": "b"}]}
DECIDE = {"input": "Hi", "questions": [PREDICATE]}
USER = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c", "output": "zzz"}


@dataclass(frozen=True)
class VectorTable:
    """`example` are the fields that a request must have. `model` is a language model, or a classifier with one label
    whose scores depend on the prompt."""

    path: str
    example: Body
    rows: Sequence[Row]
    inert: Sequence[Inert]
    refused: Sequence[Refused]
    model: Model = "text"


def _shared(changed: Body) -> list[Row]:
    """Rows of the fields that all of these endpoints have. `changed` has another input than the example."""
    return [
        *(Row(field=field, body={field: value}, engine={"0.prompt": DIFFERS}) for field, value in changed.items()),
        Row(field="cache_salt", body={"cache_salt": "s"}, engine={"0.cache_salt": "s"}),
        Row(field="priority", body={"priority": 3}, engine={"0.priority": 3}),
        Row(field="model", body={"model": "alias"}, reply={"model": "alias"}),
    ]


USER_FIELD = Inert("user", {"user": "u"})
INPUTS = [
    *_shared({"input": "Ho"}),
    Row(field="input", body={"input": ["Hi", "Ho"]}, engine={"1.prompt": some}),
    Row(field="input", body={"input": [5, 6]}, engine={"0.prompt": [5, 6]}),
    Row(field="input", body={"input": [[5, 6], [7]]}, engine={"0.prompt": [5, 6], "1.prompt": [7]}),
    Row(field="add_special_tokens", body={"add_special_tokens": False}, engine={"0.prompt": DIFFERS}),
]
PEERS = [
    Refused("truncate_prompt_tokens", {"truncate_prompt_tokens": 3}),
    Refused("messages", {"messages": [USER]}),
    Refused("normalize", {"normalize": False}),
]
_FLAT = {"data.0.embedding": lambda value: isinstance(value, list) and len(value) == 3}
EMBEDDINGS = VectorTable(
    "/v1/embeddings",
    HI,
    [
        *INPUTS,
        Row(field="dimensions", body={"dimensions": 3}, reply=_FLAT),
        Row(
            field="encoding_format",
            body={"encoding_format": "base64"},
            reply={"data.0.embedding": lambda value: isinstance(value, str)},
        ),
        Row(field="pooling", body={"pooling": "mean"}, engine={"0.pooling": "mean"}),
        Row(field="use_activation", body={"use_activation": False}, reply={"data.0.embedding": DIFFERS}),
    ],
    [USER_FIELD],
    [*PEERS, Refused("task", {"task": "retrieval.query"}), Refused("input_type", {"input_type": "search_query"})],
)
POOLING = VectorTable(
    "/pooling",
    HI,
    [
        *INPUTS,
        Row(field="task", body={"task": "embed"}, engine={"0.kind": "embed"}),
        Row(field="dimensions", base={"task": "embed"}, body={"dimensions": 3}, reply={"data.0.data": DIFFERS}),
        Row(
            field="encoding_format",
            body={"encoding_format": "base64"},
            reply={"data.0.data": lambda value: isinstance(value, str)},
        ),
        Row(field="pooling", base={"task": "embed"}, body={"pooling": "mean"}, engine={"0.pooling": "mean"}),
        Row(field="use_activation", body={"use_activation": False}, reply={"data.0.data": DIFFERS}),
    ],
    [USER_FIELD],
    PEERS,
    model="scores",
)
CLASSIFY = VectorTable(
    "/classify",
    {**HI, "labels": ["a", "b"]},
    [
        *INPUTS,
        Row(field="labels", body={"labels": ["a", "c"]}, reply={"labels": ["a", "c"]}, engine={"0.targets": DIFFERS}),
        Row(field="use_activation", body={"use_activation": False}, reply={"data.0.probs": DIFFERS}),
    ],
    [USER_FIELD],
    PEERS,
)
SCORES = VectorTable(
    "/v1/score",
    PAIR,
    [
        *_shared({"text_1": "Ho", "text_2": ["Hu"]}),
        Row(field="use_activation", body={"use_activation": False}, reply={"data.0.score": DIFFERS}),
    ],
    [USER_FIELD],
    [*PEERS, Refused("queries", {"queries": "a"}), Refused("data_1", {"data_1": "a"})],
    model="scores",
)
RERANK = VectorTable(
    "/v1/rerank",
    DOCUMENTS,
    [
        *_shared({"query": "Hu", "documents": ["Hu", "Ha"]}),
        Row(field="documents.text", body={"documents": [{"text": "Hu"}, "Ha"]}, engine={"0.prompt": DIFFERS}),
        Row(field="top_n", body={"top_n": 1}, reply={"results": lambda found: len(found) == 1}),
        Row(field="return_documents", body={"return_documents": False}, reply={"results.0.document": DIFFERS}),
        Row(field="use_activation", body={"use_activation": False}, reply={"results.0.relevance_score": DIFFERS}),
    ],
    [USER_FIELD],
    [*PEERS, Refused("max_tokens_per_doc", {"max_tokens_per_doc": 9})],
    model="scores",
)


def _items(*items: Any) -> dict[str, Any]:
    return {"input": list(items)}


def _asked(question: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"questions": [{**question, **changes}]}


def _part(**fields: Any) -> dict[str, Any]:
    return _items({"role": "user", "content": [fields]})


_TWO = [{"value": "a"}, {"value": "b"}]
_LEVELS = [{"label": "a"}, {"label": "b"}]
_CUSTOM = {"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "in"}
DECISIONS = VectorTable(
    "/v1/decisions",
    DECIDE,
    [
        *_shared({"input": "Ho"}),
        Row(field="input.role", base=_items(USER), body=_items({**USER, "role": "system"}), prompt="<|system|> Hi"),
        Row(field="input.type", base=_items(USER), body=_items(CALL, OUTPUT, USER), prompt="zzz"),
        Row(field="input.content", base=_items(USER), body=_items({**USER, "content": "Ho"}), prompt="Ho"),
        Row(field="input.content.type", base=_items(USER), body=_part(type="input_json", data={"a": 1}), prompt='"a"'),
        Row(
            field="input.content.data", base=_items(USER), body=_part(type="input_json", data=[{"b": 1}]), prompt='"b"'
        ),
        Row(field="input.content.text", base=_items(USER), body=_part(type="input_text", text="Ho"), prompt="Ho"),
        Row(field="input.content.refusal", base=_items(USER), body=_part(type="refusal", refusal="No"), prompt="No\n"),
        Row(
            field="input.name",
            base=_items(CALL, OUTPUT),
            body=_items({**CALL, "name": "other"}, OUTPUT),
            prompt="other",
        ),
        Row(
            field="input.call_id",
            base=_items(CALL, OUTPUT),
            body=_items({**CALL, "call_id": "deep"}, {**OUTPUT, "call_id": "deep"}),
            prompt="deep",
        ),
        Row(
            field="input.namespace",
            base=_items(CALL, OUTPUT),
            body=_items({**CALL, "namespace": "space"}, OUTPUT),
            prompt="space",
        ),
        Row(
            field="input.arguments",
            base=_items(CALL, OUTPUT),
            body=_items({**CALL, "arguments": '{"deep": 1}'}, OUTPUT),
            prompt="deep",
        ),
        Row(
            field="input.input",
            base=_items(_CUSTOM, {**OUTPUT, "type": "custom_tool_call_output"}),
            body=_items({**_CUSTOM, "input": "deep"}, {**OUTPUT, "type": "custom_tool_call_output"}),
            prompt="deep",
        ),
        Row(
            field="input.output",
            base=_items(CALL, OUTPUT),
            body=_items(CALL, {**OUTPUT, "output": "deep"}),
            prompt="deep",
        ),
        Row(
            field="input.output.text",
            base=_items(CALL, OUTPUT),
            body=_items(CALL, {**OUTPUT, "output": [{"type": "input_text", "text": "deep"}]}),
            prompt="deep",
        ),
        Row(
            field="input.output.refusal",
            base=_items(CALL, OUTPUT),
            body=_items(CALL, {**OUTPUT, "output": [{"type": "refusal", "refusal": "deep"}]}),
            prompt="deep",
        ),
        Row(field="questions.type", body=_asked(CHOICE), reply={"answers.0.type": "choice"}),
        Row(field="questions.name", body=_asked(PREDICATE, name="n"), reply={"answers.0.name": "n"}),
        Row(field="questions.instructions", body=_asked(PREDICATE, instructions="It was."), prompt="It was."),
        Row(
            field="questions.instructions.text",
            body=_asked(PREDICATE, instructions=[{"type": "input_text", "text": "It was."}]),
            prompt="It was.",
        ),
        Row(
            field="questions.instructions.data",
            body=_asked(PREDICATE, instructions=[{"type": "input_json", "data": {"q": 1}}]),
            prompt='{"q":1}',
        ),
        Row(
            field="questions.instructions.refusal",
            body=_asked(PREDICATE, instructions=[{"type": "refusal", "refusal": "It was."}]),
            prompt="It was.",
        ),
        Row(
            field="questions.choices.value",
            base=_asked(CHOICE),
            body=_asked(CHOICE, choices=[{"value": True}, {"value": "c"}]),
            reply={"answers.0.probabilities.0.value": True, "answers.0.probabilities.1.value": "c"},
        ),
        Row(
            field="questions.choices.description",
            base=_asked(CHOICE),
            body=_asked(CHOICE, choices=[{"value": "a", "description": "long"}, {"value": "b"}]),
            prompt="a: long",
        ),
        Row(
            field="questions.levels.label",
            base=_asked(SCORE),
            body=_asked(SCORE, levels=[{"label": "c"}, {"label": "d"}]),
            reply={"answers.0.probabilities.1.label": "d"},
        ),
        Row(
            field="questions.levels.description",
            base=_asked(SCORE),
            body=_asked(SCORE, levels=[{"label": "a", "description": "long"}, {"label": "b"}]),
            prompt="a: long",
        ),
    ],
    [
        USER_FIELD,
        Inert("safety_identifier", {"safety_identifier": "u"}),
        Inert("prompt_cache_key", {"prompt_cache_key": "k"}),
        Inert("prompt_cache_options", {"prompt_cache_options": {"mode": "implicit"}}),
        Inert("input.phase", _items({**USER, "phase": "final_answer"}), _items(USER)),
        Inert("input.id", _items({**CALL, "id": "i"}, OUTPUT), _items(CALL, OUTPUT)),
        Inert("input.status", _items({**CALL, "status": "completed"}, OUTPUT), _items(CALL, OUTPUT)),
        Inert(
            "input.content.prompt_cache_breakpoint",
            _part(type="input_text", text="Hi", prompt_cache_breakpoint={"mode": "explicit"}),
            _part(type="input_text", text="Hi"),
        ),
        Inert(
            "questions.instructions.prompt_cache_breakpoint",
            _asked(
                PREDICATE,
                instructions=[{"type": "input_text", "text": "a", "prompt_cache_breakpoint": {"mode": "explicit"}}],
            ),
            _asked(PREDICATE, instructions=[{"type": "input_text", "text": "a"}]),
        ),
        Inert(
            "input.output.annotations",
            _items(CALL, {**OUTPUT, "output": [{"type": "input_text", "text": "a", "annotations": []}]}),
            _items(CALL, {**OUTPUT, "output": [{"type": "input_text", "text": "a"}]}),
        ),
        Inert(
            "input.output.logprobs",
            _items(CALL, {**OUTPUT, "output": [{"type": "input_text", "text": "a", "logprobs": []}]}),
            _items(CALL, {**OUTPUT, "output": [{"type": "input_text", "text": "a"}]}),
        ),
        Inert(
            "input.output.type",
            _items(CALL, {**OUTPUT, "output": [{"type": "text", "text": "a"}]}),
            _items(CALL, {**OUTPUT, "output": [{"type": "input_text", "text": "a"}]}),
        ),
        Inert(
            "questions.instructions.type",
            _asked(PREDICATE, instructions=[{"type": "output_text", "text": "a"}]),
            _asked(PREDICATE, instructions=[{"type": "input_text", "text": "a"}]),
        ),
    ],
    [
        Refused("state", {"state": "a"}),
        Refused("temperature", {"temperature": 0.5}),
        Refused("input.content", _part(type="input_image", image_url="https://x"), param="input.0.content.0"),
        Refused("input.type", _items({"type": "reasoning"}), param="input.0"),
    ],
)
VECTOR_TABLES = (EMBEDDINGS, POOLING, CLASSIFY, SCORES, RERANK, DECISIONS)
