"""Two applications on fake engines: one writes as Jamba 1.5 does, the other as Jamba Reasoning."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastapi import FastAPI

from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.app import create_app
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.conformance.apis import Api
from tests.server.fake_engine import FakeEngine, says
from tests.server.served_model import REASONING_TEMPLATE, LongEngine
from tests.synthetic_tokenizer import Family, write_tokenizer

TEMPLATE = (Path(__file__).parent / "template.jinja").read_text(encoding="utf-8")


@dataclass
class Served:
    """An application with a fake engine. All requests without a seed get the same seed."""

    engine: FakeEngine
    tokenizer: Tokenizer
    app: FastAPI
    apis: dict[type[Api], Api] = field(default_factory=dict[type[Api], Api])

    def api(self, kind: type[Api]) -> Api:
        if kind not in self.apis:
            self.apis[kind] = kind(self.app)
        return self.apis[kind]

    def say(self, *texts: str) -> None:
        self.engine.script = says(*map(self._tokens, texts))
        self.engine.requests.clear()

    def prompt(self) -> str:
        return self.tokenizer.decode(self.engine.requests[0].prompt, skip_special_tokens=False)

    def _tokens(self, text: str) -> list[int]:
        special = self.tokenizer.special_tokens
        pieces = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
        return [
            token
            for piece in pieces
            for token in (
                [special[piece]] if piece in special else self.tokenizer.encode(piece, add_special_tokens=False)
            )
        ]


def serve(folder: Path, family: Family) -> Served:
    write_tokenizer(folder, family)
    tokenizer = Tokenizer.from_folder(folder)
    engine = LongEngine(says([]))
    config = ServerConfig(
        served_model_name=("jamba", "alias"),
        enable_priority=True,
        allow_request_templates=True,
        max_model_len=None,
        data_dir=str(folder / "data"),
    )
    template = ChatTemplate(TEMPLATE if family == "jamba-1.5" else REASONING_TEMPLATE, tokenizer)
    app = create_app(config, engine, tokenizer, template, GenerationDefaults(), demo=False)
    app.state.services = replace(app.state.services, draw_seed=lambda: 7)
    return Served(engine, tokenizer, app)
