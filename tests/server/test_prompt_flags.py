"""`--schema`, `--system`, `--file` and `--session` of `jamba run` and `jamba chat`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from jamba_server.engine.errors import ConfigError, RequestRejected
from jamba_server.server.cli import application
from jamba_server.server.cli.chat import Conversation, LocalPartner
from jamba_server.server.cli.local import LocalModel, Sampling
from jamba_server.server.cli.prompt_flags import MAX_FILE_BYTES, read_document, read_schema
from jamba_server.server.cli.remote import ChatError, RemotePartner, SessionPartner
from jamba_server.server.cli.run import Question, reply
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import HELLO, TEMPLATE, Bench, MakeBench
from tests.server.fake_engine import FakeEngine

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 2]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
FEW = Sampling(max_tokens=9)


def local(engine: FakeEngine, tokenizer: Tokenizer, template: str | None = TEMPLATE) -> LocalModel:
    compiled = ChatTemplate(template, tokenizer) if template else None
    return LocalModel(engine, tokenizer, compiled, GenerationDefaults())


async def said(pieces: AsyncGenerator[Any]) -> str:
    async with aclosing(pieces) as opened:
        return "".join([piece async for piece in opened])


def prompt_of(engine: FakeEngine, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(list(engine.requests[-1].prompt), skip_special_tokens=False)


# Reading ------------------------------------------------------------------------------------------------------------


def test_a_schema_is_a_file_or_the_json_itself(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA), encoding="utf-8-sig")
    assert read_schema(str(path)) == read_schema(" " + json.dumps(SCHEMA)) == SCHEMA
    assert read_schema(None) is None


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("{'a': 1}", r"^--schema is not valid JSON: Expecting property name"),
        ("nothing.json", r"^--schema nothing\.json cannot be read: No such file or directory\.$"),
        ("list.json", r"^--schema list\.json holds list; a schema is a JSON object\.$"),
        ("deep.json", r"^--schema deep\.json is nested too deeply\.$"),
    ],
)
def test_what_is_no_schema(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str, sentence: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    Path("deep.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_schema(value)
    assert "\n" not in str(caught.value)


def test_a_document_is_named_and_limited(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Grüße\n", encoding="utf-8")
    assert read_document(path) == '<document name="notes.txt">\nGrüße\n</document>'
    path.write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match=r"--file .*notes\.txt is not a text in UTF-8: byte 2 is 0xff\.$"):
        read_document(path)
    path.write_bytes(b"a" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match=r"notes\.txt is too large: at most 4,194,304 bytes are read\.$"):
        read_document(path)
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory\.$"):
        read_document(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "-p", "x", "--schema", "[]"], "jamba: --schema [] cannot be read"),
        (["chat", "--file", "/no/such", "localhost:1"], "jamba: --file /no/such cannot be read"),
        (["run", "-p", "x", "--raw", "--system", "s"], "jamba: --system needs the model's chat template"),
        (["chat", "org/name", "--session", "a"], "jamba: --session a needs the URL of a server"),
        (["chat", "localhost:1", "--session", "a/b"], "jamba: --session is 'a/b'; it must have 1 to 64 letters"),
    ],
)
def test_mistakes_are_one_sentence(monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str) -> None:
    monkeypatch.setattr(sys, "argv", ["jamba", *arguments])
    with pytest.raises(SystemExit) as ended:
        application.run()
    assert str(ended.value.code).startswith(sentence)


# A model in the terminal --------------------------------------------------------------------------------------------


def test_run_puts_system_and_document_before_the_question(
    engine: FakeEngine, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = local(engine, tokenizer)
    asyncio.run(said(reply(model, FEW, Question("the document\n\nwhy", system="be brief"))))
    expected = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the document\n\nwhy"}]
    assert list(engine.requests[-1].prompt) == list(ChatTemplate(TEMPLATE, tokenizer).render(expected).prompt_ids)
    with pytest.raises(ConfigError, match="--system needs a chat template, which this model lacks"):
        reply(local(engine, tokenizer, None), FEW, Question("why", system="be brief"))


def test_a_schema_becomes_the_grammar_of_a_local_reply(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    model = local(engine, tokenizer)
    try:
        for question in (Question("why", schema=SCHEMA), Question("why", schema=SCHEMA, raw=True)):
            asyncio.run(said(reply(model, FEW, question)))
            assert '"enum"' in engine.requests[-1].params.grammar
        with pytest.raises(RequestRejected, match="nonsense"):
            asyncio.run(said(reply(model, FEW, Question("why", schema={"type": "nonsense"}))))
    finally:
        model.close()


def test_the_document_comes_before_the_first_question_of_each_conversation(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    conversation = Conversation(LocalPartner(local(engine, tokenizer), FEW), lambda text: None, document="DOC")

    async def run(*lines: str) -> None:
        for line in lines:
            await conversation.take(line)

    asyncio.run(run("one", "two"))
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["DOC\n\none", "two"]
    asyncio.run(run("/reset", "three"))
    assert conversation.messages[0]["content"] == "DOC\n\nthree"


def test_the_demonstration_model_answers_with_json(tmp_path: Path) -> None:
    """The whole command, on a real engine."""
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    result = CliRunner().invoke(
        application.app, ["run", "-p", "Is it so?", "--schema", str(path), "--device", "cpu", "--threads", "1"]
    )
    assert result.exit_code == 0, result.output
    jsonschema.validate(json.loads(result.stdout), SCHEMA)


# A server -----------------------------------------------------------------------------------------------------------


def test_a_server_gets_the_schema(bench: Bench) -> None:
    asyncio.run(said(RemotePartner(bench.http(), FEW, SCHEMA).reply([{"role": "user", "content": "Hi"}])))
    assert bench.engine.requests[-1].params.grammar


async def test_a_session_goes_on_in_a_later_chat(bench: Bench, tokenizer: Tokenizer) -> None:
    def chat(schema: dict[str, Any] | None = None) -> Conversation:
        partner = SessionPartner(bench.http(), Sampling(max_tokens=9, top_k=3), schema, "talk")
        return Conversation(partner, shown.append, "be brief", interactive=False)

    shown: list[str] = []
    assert await chat().take("one")
    assert "".join(shown) == HELLO.lstrip() + "\n"
    second = chat(SCHEMA)
    await second.take("two")
    prompt = prompt_of(bench.engine, tokenizer)
    assert all(text in prompt for text in ("be brief", "> one<", HELLO.strip(), "> two<"))
    params = bench.engine.requests[-1].params
    assert (params.max_tokens, params.top_k, bool(params.grammar)) == (9, 3, True)
    await second.take("/reset")
    await second.take("three")
    assert "> one<" not in prompt_of(bench.engine, tokenizer)


async def test_a_server_that_keeps_no_session_is_noticed(bench: Bench) -> None:
    class Elsewhere(SessionPartner):
        """Its server ignores the field `session`, as most servers do."""

        async def _events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[bytes]:
            async with aclosing(super()._events(path, {k: v for k, v in body.items() if k != "session"})) as events:
                async for data in events:
                    yield data

    with pytest.raises(ChatError, match="The server has not kept this reply in the session talk: it has no sessions"):
        await said(Elsewhere(bench.http(), FEW, None, "talk").reply([{"role": "user", "content": "Hi"}]))


async def test_a_sessions_errors(make_bench: MakeBench) -> None:
    partner = SessionPartner(make_bench(api_key=("k",)).http(), FEW, None, "talk")
    with pytest.raises(ChatError, match=r"/v1/responses answers 401"):
        await said(partner.reply([{"role": "user", "content": "Hi"}]))
    with pytest.raises(ChatError, match=r"/v1/sessions/talk answers 401"):
        await partner.forget()
