"""Writes the tables of docs/api.md and docs/vectors.md. For each field of a request, the tables say whether the server
honours, ignores or refuses the field.

python -m tools.api_page            rewrites the tables between the page's markers
python -m tools.api_page --check    fails where the page and the schemas differ
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.base import NoEffect
from jamba_server.server.http.schemas.batches import BatchRequest
from jamba_server.server.http.schemas.chat import ChatCompletionRequest, ChatMessage
from jamba_server.server.http.schemas.completions import CompletionRequest
from jamba_server.server.http.schemas.messages.request import MessagesRequest
from jamba_server.server.http.schemas.messages.tools import ToolDefinition
from jamba_server.server.http.schemas.models import DetokenizeRequest, TokenizeRequest
from jamba_server.server.http.schemas.responses import items
from jamba_server.server.http.schemas.responses.request import ResponseRequest
from jamba_server.server.http.schemas.vectors.classify import ClassifyRequest
from jamba_server.server.http.schemas.vectors.decisions import DecisionRequest
from jamba_server.server.http.schemas.vectors.embeddings import EmbeddingRequest, PoolingRequest
from jamba_server.server.http.schemas.vectors.scoring import RerankRequest, ScoreRequest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = (DOCS / "api.md", DOCS / "vectors.md")
SCHEMAS: dict[str, type[BaseModel]] = {
    "chat": ChatCompletionRequest,
    "message": ChatMessage,
    "completion": CompletionRequest,
    "response": ResponseRequest,
    "tokenize": TokenizeRequest,
    "detokenize": DetokenizeRequest,
    "batch": BatchRequest,
    "messages": MessagesRequest,
    "messages_tool": ToolDefinition,
    "embedding": EmbeddingRequest,
    "pooling": PoolingRequest,
    "classify": ClassifyRequest,
    "score": ScoreRequest,
    "rerank": RerankRequest,
    "decision": DecisionRequest,
}

WITHOUT_EFFECT = (
    "annotations",
    "prediction",
    "include_obfuscation",
    "speed",
    "inference_geo",
    "diagnostics",
    "guided_decoding_backend",
)


# The classes of the items in the field `input` of a request to /v1/responses. The field `type` of each class has the
# type of the items.
ITEMS: tuple[type[BaseModel], ...] = (
    items.Message,
    items.FunctionCall,
    items.FunctionCallOutput,
    items.CustomToolCall,
    items.CustomToolCallOutput,
    items.Reasoning,
    items.ItemReference,
)


def fate(name: str, field: FieldInfo, schema: type[BaseModel]) -> str:
    """Returns how the server treats a field of a request. The result is "refused" for a field that the server knows but
    does not support, "ignored" for a field without an effect, and "honoured" for all other fields."""
    if name in elsewhere(schema):
        return "refused"
    for item in field.metadata:
        if isinstance(item, BeforeValidator) and item.func.__qualname__.startswith("unsupported."):
            return "refused"
    if schema in (ResponseRequest, BatchRequest):
        return "ignored" if "no effect" in (field.description or "") else "honoured"
    return "ignored" if name in NoEffect.model_fields or name in WITHOUT_EFFECT else "honoured"


def elsewhere(schema: type[BaseModel]) -> dict[str, peer_fields.PeerField]:
    """Returns the fields that a request schema inherits from its base class although they belong to other endpoints, so
    that the server refuses them here."""
    return schema.elsewhere if issubclass(schema, ResponseRequest) else {}


def field_table(schema: type[BaseModel]) -> str:
    rows = sorted(
        (
            (fate(name, field, schema), name, _meaning(name, field, schema))
            for name, field in schema.model_fields.items()
        ),
        key=lambda row: ("honoured", "ignored", "refused").index(row[0]),
    )
    lines = [f"| `{name}` | {what} | {text} |" for what, name, text in rows]
    return "\n".join(["| field | support | meaning |", "| --- | --- | --- |", *lines])


def _meaning(name: str, field: FieldInfo, schema: type[BaseModel]) -> str:
    if (other := elsewhere(schema).get(name)) is not None:
        return f"A field of {other.of}." + (f" Send `{other.instead}` instead." if other.instead else "")
    return field.description or ""


def item_table() -> str:
    """Returns a Markdown table of the item types in a request to /v1/responses. For each type the table lists the
    fields that have an effect."""
    lines: list[str] = []
    for schema in ITEMS:
        fields = schema.model_fields.items()
        names = [
            f"`{name}`" for name, field in fields if name != "type" and "no effect" not in (field.description or "")
        ]
        kind = get_args(schema.model_fields["type"].annotation)[0]
        lines.append(f"| `{kind if isinstance(kind, str) else get_args(kind)[0]}` | {', '.join(names)} |")
    return "\n".join(["| type | fields |", "| --- | --- |", *lines])


def peer_table() -> str:
    """Returns a table of the request fields that other servers accept and this server refuses. The table has one line
    for each other server."""
    by_server: dict[str, list[str]] = {}
    tables: list[peer_fields.PeerFields] = [ChatCompletionRequest.peers, CompletionRequest.peers, ResponseRequest.peers]
    for name, field in {name: field for table in tables for name, field in table.items()}.items():
        by_server.setdefault(field.of, []).append(f"`{name}`")
    lines = [f"| {server} | {', '.join(sorted(names))} |" for server, names in sorted(by_server.items())]
    return "\n".join(["| origin | fields |", "| --- | --- |", *lines])


OTHER_TABLES = {"peers": peer_table, "items": item_table}


def rendered(page: str) -> str:
    """Returns the page with every table between `<!-- table NAME -->` and `<!-- end -->` replaced by a new table."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        made: Any = OTHER_TABLES[name]() if name in OTHER_TABLES else field_table(SCHEMAS[name])
        return f"<!-- table {name} -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    arguments = parser.parse_args()
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if not arguments.check:
            path.write_text(rendered(page), encoding="utf-8")
        elif rendered(page) != page:
            sys.exit(f"docs/{path.name} is out of date: run python -m tools.api_page")


if __name__ == "__main__":
    main()
