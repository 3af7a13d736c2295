"""An application whose fake engine writes thoughts and tool calls in the manner of one of Jamba's families."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from jamba_server.engine.types import EngineInfo
from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.app import create_app
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import Bench
from tests.server.fake_engine import EOS, INFO, FakeEngine, says
from tests.synthetic_tokenizer import Family, write_tokenizer

CHAT = "/v1/chat/completions"
REASONING_TEMPLATE = (Path(__file__).parent.parent / "templates" / "reasoning.jinja").read_text(encoding="utf-8")
# A template in the manner of Jamba 1.7: tools and documents in the system message, calls between special tokens.
JAMBA_TEMPLATE = (
    "<|bom|><|system|> {% if tools %}<tool_definitions>{{ tools | tojson }}</tool_definitions>{% endif %}"
    "{% for document in documents or [] %}{{ document.text }}{% endfor %}{{ style }}<|eom|>"
    "{% for message in messages %}<|bom|><|{{ message.role }}|> {{ message.content }}"
    "{% if message.tool_calls %}<tool_calls>[{% for call in message.tool_calls %}{{ call.function | tojson }}"
    "{% endfor %}]</tool_calls>{% endif %}<|eom|>{% endfor %}"
    "{% if add_generation_prompt %}<|bom|><|assistant|>{% endif %}"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
TOOLS = [WEATHER, CLOCK]
QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}]
PARIS = '{"city": "Paris"}'
HERMES_CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>'
JAMBA_CALL = f' <tool_calls>[\n    {{"name": "get_weather", "arguments": {PARIS}}}\n]</tool_calls>'


class LongEngine(FakeEngine):
    """A fake engine with room for the prompts of templates with tools."""

    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(INFO, max_model_len=8192)


@dataclass
class Model:
    """A served model, and the tokens of its replies."""

    bench: Bench
    tokenizer: Tokenizer

    def tokens(self, text: str) -> list[int]:
        """Returns the token ids of a text. A tag of tool calls becomes a special token if the vocabulary has one."""
        special = self.tokenizer.special_tokens
        pieces = re.split("(</?tool_calls>)", text)
        nested = [
            [special[piece]] if piece in special else self.tokenizer.encode(piece, add_special_tokens=False)
            for piece in pieces
        ]
        return [token for tokens in nested for token in tokens]

    def say(self, *replies: str) -> None:
        self.bench.engine.script = says(*map(self.tokens, replies))
        self.bench.engine.requests.clear()

    @property
    def prompt(self) -> str:
        return self.tokenizer.decode(self.bench.engine.requests[-1].prompt, skip_special_tokens=False)

    @property
    def params(self) -> Any:
        return self.bench.engine.requests[-1].params

    async def post(self, **fields: Any) -> httpx.Response:
        async with self.bench.http() as http:
            return await http.post(CHAT, json={"messages": QUESTION, **fields})

    async def message(self, **fields: Any) -> dict[str, Any]:
        """Returns the message of a reply. Checks that the streamed reply has the same message and finish reason."""
        reply = await self.post(**fields)
        assert reply.status_code == 200, reply.text
        [choice] = reply.json()["choices"]
        streamed = await self.post(**fields, stream=True)
        message, finish_reason = collect(events(streamed))
        assert without_ids(message) == without_ids({key: v for key, v in choice["message"].items() if key != "refusal"})
        assert finish_reason == choice["finish_reason"]
        return choice["message"] | {"finish_reason": finish_reason}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", response.text
    return [json.loads(line) for line in lines[:-1]]


def collect(chunks: list[dict[str, Any]]) -> tuple[dict[str, Any], str | None]:
    """Puts a message together from the events of a stream, as OpenAI's guide does."""
    message: dict[str, Any] = {"role": None, "content": ""}
    calls: list[dict[str, Any]] = []
    finish_reason = None
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            message["role"] = delta.get("role") or message["role"]
            for name in ("content", "reasoning", "reasoning_content"):
                if name in delta:
                    message[name] = message.get(name, "") + delta[name]
            for piece in delta.get("tool_calls", []):
                if piece["index"] == len(calls):
                    assert piece["function"]["arguments"] == ""
                    calls.append(json.loads(json.dumps({key: piece[key] for key in ("id", "type", "function")})))
                else:
                    assert piece.keys() == {"index", "function"}
                    assert piece["index"] == len(calls) - 1
                    calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
            finish_reason = choice["finish_reason"] or finish_reason
    if calls:
        message |= {"tool_calls": calls, "content": message["content"] or None}
    return message, finish_reason


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"tool_calls": [call | {"id": ""} for call in message.get("tool_calls", [])]}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "", "type": "function", "function": {"name": name, "arguments": arguments}}


@asynccontextmanager
async def serve(
    folder: Path, family: Family, template: str, defaults: GenerationDefaults | None = None, **settings: Any
) -> AsyncGenerator[Model]:
    write_tokenizer(folder, family)
    tokenizer = Tokenizer.from_folder(folder)
    engine = LongEngine(says([EOS]))
    config = ServerConfig(served_model_name=("jamba",), **settings)
    app = create_app(
        config, engine, tokenizer, ChatTemplate(template, tokenizer), defaults or GenerationDefaults(), demo=False
    )
    async with app.router.lifespan_context(app):
        yield Model(Bench(app, engine), tokenizer)


@pytest.fixture
async def hermes(tmp_path: Path) -> AsyncGenerator[Model]:
    """A model that writes thoughts and calls as Jamba Reasoning does."""
    async with serve(tmp_path, "reasoning", REASONING_TEMPLATE) as model:
        yield model


@pytest.fixture
async def jamba(tmp_path: Path) -> AsyncGenerator[Model]:
    """A model that writes calls as Jamba 1.7 does."""
    async with serve(tmp_path, "jamba-1.5", JAMBA_TEMPLATE) as model:
        yield model
