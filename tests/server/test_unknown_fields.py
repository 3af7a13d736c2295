"""Fields that this API does not have: slips, other servers' fields, and what is ignored."""

from __future__ import annotations

import json
from functools import cache
from random import Random
from typing import Any

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from jamba_server.server.http.metrics import MAX_FIELD_LABELS
from jamba_server.server.http.middleware import MAX_JSON_NAMES
from jamba_server.server.http.schemas import peer_fields
from jamba_server.server.http.schemas.chat import ChatCompletionRequest, ChatMessage
from jamba_server.server.http.schemas.completions import CompletionRequest
from jamba_server.server.http.schemas.models import DetokenizeRequest, TokenizeRequest
from jamba_server.server.http.schemas.peer_fields import PeerFields
from jamba_server.server.http.schemas.unknown import edits, nearest
from tests.conformance.vector_rows import VECTOR_TABLES
from tests.server.conftest import Bench, MakeBench, chat

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: chat(),
    f"{CHAT}/render": chat(),
    COMPLETIONS: {"prompt": "Hi"},
    TOKENIZE: {"prompt": "Hi"},
    DETOKENIZE: {"tokens": [5]},
    "/v1/responses": {"input": "Hi"},
    "/v1/responses/input_tokens": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
}
SCHEMAS: dict[str, type[BaseModel]] = {
    CHAT: ChatCompletionRequest,
    COMPLETIONS: CompletionRequest,
    TOKENIZE: TokenizeRequest,
    DETOKENIZE: DetokenizeRequest,
}


def turn(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi", **fields}]}


def part(**fields: Any) -> dict[str, Any]:
    return turn(content=[{"type": "text", "text": "Hi", **fields}])


async def post(bench: Bench, path: str, body: dict[str, Any]) -> httpx.Response:
    async with bench.http() as http:
        return await http.post(path, json=body)


# what clients send; the names that the header gives
TAKEN: list[tuple[str, dict[str, Any], str | None]] = [
    (CHAT, turn(id="msg_1"), "messages.id"),
    (CHAT, chat(opts={}), "opts"),
    (CHAT, part(cache_control={"type": "ephemeral"}), "messages.content.cache_control"),
    (COMPLETIONS, {"prompt": "Hi", "max_tokens": 4, "max_completion_tokens": 4}, None),
    (COMPLETIONS, {"prompt": "Hi", "max_tokens": -1}, None),
    (CHAT, chat(max_tokens=-1), None),
    (CHAT, turn(thinking_blocks=[]), "messages.thinking_blocks"),
    (CHAT, chat(verbosity="low"), "verbosity"),
    (CHAT, chat(chat_template_kwargs={}, add_generation_prompt=True, continue_final_message=False), None),
    (CHAT, chat(parallel_tool_calls=False, tools=[], tool_choice="auto"), None),
    (CHAT, chat(spaces_between_special_tokens=True), None),
    (CHAT, chat(use_beam_search=False, request_id="r"), "use_beam_search, request_id"),
    (CHAT, chat(stream=True, stream_options={"chunk_size": 3}), "stream_options.chunk_size"),
    (CHAT, chat(response_format={"type": "text", "strict": True}), "response_format.strict"),
    (TOKENIZE, {"prompt": "Hi", "opts": 1, "tools": []}, "opts"),
    (DETOKENIZE, {"tokens": [5], "opts": 1}, "opts"),
]


@pytest.mark.parametrize(("path", "body", "ignored"), TAKEN, ids=str)
async def test_what_clients_send_is_taken(bench: Bench, path: str, body: dict[str, Any], ignored: str | None) -> None:
    response = await post(bench, path, body)
    assert response.status_code == 200, response.text
    assert response.headers.get("x-ignored-fields") == ignored


@pytest.mark.parametrize(("path", "body", "ignored"), [case for case in TAKEN if case[2]], ids=str)
async def test_or_refused_where_the_server_is_told_to(
    make_bench: MakeBench, path: str, body: dict[str, Any], ignored: str
) -> None:
    bench = make_bench(unknown_fields="reject")
    response = await post(bench, path, body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unknown_parameter")
    assert (error["param"], "x-ignored-fields" in response.headers) == (ignored.split(", ")[0], False)
    assert bench.engine.requests == []


async def test_every_route_that_takes_a_body_has_the_rule(bench: Bench) -> None:
    document = bench.app.openapi()["paths"].items()
    paths = [path for path, methods in document if "requestBody" in methods.get("post", {})]
    others = {table.path for table in VECTOR_TABLES}  # tests/conformance/test_vectors.py sends these unknown fields
    others |= {"/v1/files", "/v1/batches"}  # tests/conformance/test_files.py does it here
    others |= {path for path in paths if path.startswith("/v1/sessions/")}  # tests/server/test_sessions.py does
    assert set(paths) - others == set(BODIES)
    for path in BODIES:
        response = await post(bench, path, BODIES[path] | {"unheard_of": 1})
        assert (response.status_code, response.headers.get("x-ignored-fields")) == (200, "unheard_of")


# Slips ----------------------------------------------------------------------------------------------------------------

SLIPS: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, chat(max_token=1), "max_token", "max_tokens"),
    (CHAT, chat(maxTokens=1), "maxTokens", "max_tokens"),
    (CHAT, chat(temprature=1), "temprature", "temperature"),
    (CHAT, chat(stpo="a"), "stpo", "stop"),
    (CHAT, chat(sead=1), "sead", "seed"),
    ("/v1/completions", {"prompts": ["Hi"]}, "prompts", "prompt"),
    (CHAT, {"mesages": []}, "mesages", "messages"),
    (CHAT, turn(contents="a"), "messages.0.contents", "content"),
    (CHAT, part(txet="a"), "messages.0.content.0.txet", "text"),
    (
        CHAT,
        chat(stream=True, stream_options={"includeusage": True}),
        "stream_options.includeusage",
        "include_usage",
    ),
    (TOKENIZE, {"prompt": "Hi", "add_special_token": False}, "add_special_token", "add_special_tokens"),
    (DETOKENIZE, {"token": [5]}, "token", "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param", "known"), SLIPS, ids=str)
async def test_a_slip_names_both(bench: Bench, path: str, body: dict[str, Any], param: str, known: str) -> None:
    response = await post(bench, path, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "unknown_parameter")
    assert error["message"] == f"{param} is not a field of this API; did you mean `{known}`?"
    assert bench.engine.requests == []


@pytest.mark.parametrize("name", ["opts", "id", "top", "sed", "stps", "logs", "metadata_of_mine", "modesty"])
def test_names_that_only_resemble_a_field(name: str) -> None:
    assert nearest(name, ChatCompletionRequest.model_fields) is None


def test_edits_are_those_of_the_definition() -> None:
    @cache
    def distance(a: str, b: str) -> int:
        """By its recursion, from the front."""
        if not a or not b:
            return len(a) + len(b)
        costs = [distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0])]
        if len(a) > 1 and len(b) > 1 and (a[0], a[1]) == (b[1], b[0]):
            costs.append(distance(a[2:], b[2:]) + 1)
        return min(costs)

    random = Random(3)
    words = ["".join(random.choices("abc", k=random.randint(0, 8))) for _ in range(60)]
    assert all(edits(a, b) == distance(a, b) for a in words for b in words)


def test_one_edit_is_a_slip_and_of_long_names_two() -> None:
    random = Random(4)

    def slip(name: str) -> str:
        i = random.randrange(len(name) - 1)
        kinds = (name[:i] + name[i + 1 :], name[:i] + "q" + name[i:], name[:i] + "q" + name[i + 1 :])
        return random.choice((*kinds, name[:i] + name[i + 1] + name[i] + name[i + 2 :]))

    for name in [name for name in ChatCompletionRequest.model_fields if len(name) > 3]:
        for _ in range(5):
            once = slip(name)
            assert once == name or len(once) < 4 or nearest(once, [name]) == name
            twice = slip(slip(name))
            if edits(twice, name) == 2:
                assert (nearest(twice, [name]) == name) == (len(twice) > 6)


# Other servers' fields ------------------------------------------------------------------------------------------------

TABLES: list[tuple[str, PeerFields]] = [
    (CHAT, peer_fields.CHAT),
    (COMPLETIONS, peer_fields.COMPLETION),
    (TOKENIZE, peer_fields.TOKENIZE),
    (DETOKENIZE, peer_fields.DETOKENIZE),
]


@pytest.mark.parametrize(("path", "table"), TABLES, ids=[path for path, _ in TABLES])
async def test_what_would_change_the_answer_is_refused_by_name(bench: Bench, path: str, table: PeerFields) -> None:
    peers = {name: field for name, field in table.items() if name not in SCHEMAS[path].model_fields}
    for i in range(3):
        neutral = {name: (None, *field.neutral, None)[min(i, 1 + len(field.neutral))] for name, field in peers.items()}
        response = await post(bench, path, BODIES[path] | neutral)
        assert response.status_code == 200, response.text
    for name, field in peers.items():
        with pytest.raises(ValidationError) as caught:
            SCHEMAS[path].model_validate(BODIES[path] | {name: 0.625})
        [error] = caught.value.errors()
        assert error["type"] == "not_supported_yet"
        assert error.get("ctx", {})["field"] == name
        assert error["msg"].startswith(f"is a field of {field.of} that would change the answer")
        assert field.instead in error["msg"]


@pytest.mark.parametrize(
    "name",
    ["typical_p", "top_a", "min_k", "mirostat", "mirostat_tau", "xtc_probability", "dry_multiplier", "structural_tag"],
)
def test_the_table_has_what_is_best_known(name: str) -> None:
    assert name in peer_fields.CHAT


def test_what_is_sent_instead_exists() -> None:
    for schema, table in ((ChatCompletionRequest, peer_fields.CHAT), (ChatMessage, peer_fields.MESSAGE)):
        known = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}
        assert {field.instead for field in table.values() if field.instead} <= known, schema
        assert {name for field in table.values() for name in field.switches} <= table.keys() | known


async def test_settings_of_what_is_off_say_nothing(bench: Bench) -> None:
    off = {"mirostat_mode": 0, "mirostat_tau": 3.5, "dry_multiplier": 0.0, "dry_base": 9, "xtc_probability": 0}
    assert (await post(bench, CHAT, chat(**off, xtc_threshold=0.4))).status_code == 200
    assert (await post(bench, CHAT, chat(dry_base=9))).json()["error"]["param"] == "dry_base"
    assert (await post(bench, CHAT, chat(**off | {"mirostat_mode": 2}))).status_code == 400
    assert (await post(bench, CHAT, turn(prefix=True))).json()["error"]["param"] == "messages.0.prefix"


# Header and metric ----------------------------------------------------------------------------------------------------


async def test_the_header_is_bounded_and_clean(bench: Bench) -> None:
    fields = {f"unheard_of_{n:03}\r\nX-Evil: 1é": n for n in range(900)} | {"y" * 5000: 1}
    response = await post(bench, CHAT, chat(**fields))
    assert response.status_code == 200
    header = response.headers["x-ignored-fields"]
    assert header.startswith("unheard_of_000??X-Evil??1?, unheard_of_001??")
    assert header.endswith(" more")
    listed = header.split(", and ")[0].split(", ")
    assert (len(header) < 600, f"and {901 - len(listed)} more" in header) == (True, True)
    assert "x-evil" not in response.headers


async def test_streams_and_errors_have_it_too(bench: Bench) -> None:
    async with bench.http() as http:
        stream = await http.post(CHAT, json=chat(stream=True, opts=1))
        error = await http.post(CHAT, json=chat(opts=1, stop_token_ids=[10**6]))
    assert (stream.status_code, stream.headers["x-ignored-fields"]) == (200, "opts")
    assert (error.status_code, error.headers["x-ignored-fields"]) == (400, "opts")


async def test_ignored_fields_are_counted_under_a_bounded_number_of_names(bench: Bench) -> None:
    async with bench.http() as http:
        for _ in range(2):
            await http.post(CHAT, json={"messages": [{"role": "user", "content": "a", "id": "1"}] * 3})
        await http.post(CHAT, json=chat(**{f"unheard_of_{n}": n for n in range(500)}))
        text = (await http.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith("jamba_ignored_fields_total")]
    assert len(lines) == MAX_FIELD_LABELS + 1
    assert 'jamba_ignored_fields_total{field="messages.id",model_name="jamba"} 2.0' in lines
    assert f'jamba_ignored_fields_total{{field="other",model_name="jamba"}} {501 - MAX_FIELD_LABELS}.0' in lines


async def test_a_body_of_endless_fields_is_not_even_read(bench: Bench) -> None:
    body = chat(**{f"x{n}": 0 for n in range(MAX_JSON_NAMES)})
    error = (await post(bench, CHAT, body)).json()["error"]
    assert (error["code"], str(MAX_JSON_NAMES) in error["message"]) == ("invalid_json", True)
    colons = json.dumps(":" * 2 * MAX_JSON_NAMES)  # in a text they are no fields
    response = await post(bench, TOKENIZE, {"prompt": "a", "opts": colons})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("fields", "header", "value"),
    [
        ({"": 1}, "X-Ignored-Fields", "?"),
        ({"a": 1, "": 2}, "X-Ignored-Fields", "a, ?"),
        (
            {"tools": [{"type": "spaces  "}]},
            "X-Warning",
            "tools of other types than function were left out: spaces",
        ),
    ],
)
async def test_no_header_ends_with_white_space(bench: Bench, fields: dict[str, Any], header: str, value: str) -> None:
    """HTTP does not allow it, and the server's HTTP library closes the connection in place of a reply."""
    async with bench.served() as address, httpx.AsyncClient(base_url=address) as http:
        reply = await http.post(CHAT, json=chat(**fields))
    assert (reply.status_code, reply.headers[header]) == (200, value)
