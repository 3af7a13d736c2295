"""`jamba chat` and `jamba run`: the conversation, and its two partners on a fake engine."""

from __future__ import annotations

import asyncio
import io
import readline
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from jamba_server.engine.errors import ConfigError, EngineDead, RequestRejected
from jamba_server.server.cli import application, chat
from jamba_server.server.cli.chat import HELP, Conversation, LocalPartner, server_url
from jamba_server.server.cli.history import line_editing
from jamba_server.server.cli.local import LocalModel, Sampling
from jamba_server.server.cli.remote import ChatError, Messages, RemotePartner
from jamba_server.server.cli.run import Question, reply
from jamba_server.server.config import ServerConfig
from jamba_server.server.generation_defaults import GenerationDefaults
from jamba_server.server.http.app import create_app
from jamba_server.server.text.chat_template import ChatTemplate
from jamba_server.server.text.parts import Reasoning
from jamba_server.server.text.tokenizer import Tokenizer
from tests.server.conftest import HELLO, TEMPLATE, Bench, Ids, MakeBench
from tests.server.fake_engine import FakeEngine, says, updates_of
from tests.server.served_model import REASONING_TEMPLATE
from tests.synthetic_tokenizer import write_tokenizer

HI: Messages = [{"role": "user", "content": "Hi"}]


class Parrot:
    """Says the last message in two pieces, and remembers what it was asked. `error` ends a reply after the first."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.asked: list[Messages] = []
        self.error = error

    async def reply(self, messages: Messages) -> AsyncGenerator[str]:
        self.asked.append(messages)
        text = messages[-1]["content"]
        yield text[:1]
        if self.error:
            raise self.error
        yield text[1:]

    async def forget(self) -> None: ...


def converse(conversation: Conversation, *lines: str) -> list[bool]:
    async def run() -> list[bool]:
        return [await conversation.take(line) for line in lines]

    return asyncio.run(run())


def text_of(partner: LocalPartner | RemotePartner, messages: Messages) -> str:
    async def run() -> str:
        async with aclosing(partner.reply(messages)) as pieces:
            shown = [piece if isinstance(piece, str) else f"({piece.text})" async for piece in pieces]
            return "".join(shown)

    return asyncio.run(run())


# The conversation ---------------------------------------------------------------------------------------------------


def test_turns_alternate_after_the_system_message() -> None:
    shown: list[str] = []
    parrot = Parrot()
    assert converse(Conversation(parrot, shown.append, "Be brief."), "one", "", "two") == [True] * 3
    assert "".join(shown) == "one\ntwo\n"
    assert parrot.asked[1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "two"},
    ]


def test_commands() -> None:
    shown: list[str] = []
    parrot = Parrot()
    conversation = Conversation(parrot, shown.append)
    assert converse(conversation, "one", "/reset", "/system Be kind.", "two", "/help", "/what", "/exit") == [
        *[True] * 6,
        False,
    ]
    assert parrot.asked[1] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "two"}]
    assert shown[-2:] == [f"{HELP}\n", f"/what is not a command. {HELP}\n"]
    converse(conversation, "/system")
    assert conversation.messages == []


def test_after_an_error_nothing_of_the_turn_stays() -> None:
    shown: list[str] = []
    conversation = Conversation(Parrot(EngineDead("gone")), shown.append)
    assert converse(conversation, "one") == [True]
    assert conversation.messages == []
    assert shown[-1] == "\n[gone]\n"


def test_an_error_ends_a_conversation_that_is_piped() -> None:
    shown: list[str] = []
    conversation = Conversation(Parrot(EngineDead("gone")), shown.append, interactive=False)
    with pytest.raises(EngineDead, match="gone"):
        converse(conversation, "one")
    assert (conversation.messages, shown) == ([], ["o"])


def test_the_command_fails_where_a_piped_line_gets_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @asynccontextmanager
    async def connect(*_: object) -> AsyncGenerator[Parrot]:
        yield Parrot(EngineDead("gone"))

    monkeypatch.setattr(chat, "_connect", connect)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    monkeypatch.setattr(sys, "argv", ["jamba", "chat"])
    with pytest.raises(SystemExit, match=r"^jamba: gone$"):
        application.run()
    assert capsys.readouterr().out == "o"


def test_an_interrupted_reply_stays_as_far_as_it_came() -> None:
    conversation = Conversation(Parrot(asyncio.CancelledError()), lambda text: None)
    with pytest.raises(asyncio.CancelledError):
        converse(conversation, "one")
    assert conversation.messages == [{"role": "user", "content": "one"}, {"role": "assistant", "content": "o"}]


def test_thoughts_are_shown_but_are_no_part_of_the_messages() -> None:
    class Thinker(Parrot):
        async def reply(self, messages: Messages) -> AsyncGenerator[Any]:
            for piece in (Reasoning("so"), Reasoning(" many"), "eye", "s"):
                yield piece

    shown: list[str] = []
    thoughts: list[str] = []
    conversation = Conversation(Thinker(), shown.append, write_thoughts=thoughts.append)
    converse(conversation, "one")
    assert (thoughts, shown) == (["so", " many"], ["\n\n", "eye", "s", "\n"])
    assert conversation.messages[-1] == {"role": "assistant", "content": "eyes"}


# A server -----------------------------------------------------------------------------------------------------------


def test_a_server_gets_the_messages_and_the_sampling(bench: Bench) -> None:
    partner = RemotePartner(bench.http(), Sampling(max_tokens=9, temperature=0.5, seed=3))
    assert text_of(partner, HI) == HELLO.lstrip()
    [request] = bench.engine.requests
    assert (request.params.max_tokens, request.params.temperature, request.params.seed) == (9, 0.5, 3)


def test_a_servers_refusal_is_its_own_sentence(make_bench: MakeBench) -> None:
    partner = RemotePartner(make_bench(api_key=("k",)).http(), Sampling(max_tokens=9))
    with pytest.raises(ChatError, match=r"/v1/chat/completions answers 401: Missing or incorrect API key"):
        text_of(partner, HI)


def test_an_error_within_a_stream(make_bench: MakeBench, ids: Ids) -> None:
    engine = FakeEngine(lambda request: [next(iter(says(ids(" hello"))(request))), EngineDead("it is gone")])
    partner = RemotePartner(make_bench(engine=engine).http(), Sampling(max_tokens=9))
    with pytest.raises(ChatError, match="it is gone"):
        text_of(partner, HI)


def test_the_key_is_checked_before_the_first_prompt(make_bench: MakeBench) -> None:
    partner = RemotePartner(make_bench(api_key=("k",)).http(), Sampling(max_tokens=9))
    with pytest.raises(ChatError, match=r"/v1/models answers 401: Missing or incorrect API key"):
        asyncio.run(partner.check())


@pytest.mark.parametrize(
    ("target", "url"),
    [
        ("https://example.org/v1", "https://example.org/v1"),
        ("localhost:8401", "http://localhost:8401"),
        ("[::1]:80/v1", "http://[::1]:80/v1"),
        ("org/name", None),
        ("./folder", None),
    ],
)
def test_a_server_may_be_named_without_a_scheme(target: str, url: str | None) -> None:
    assert server_url(target) == url


def test_the_history_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    for line in ("one", "two"):
        with line_editing(path):
            readline.add_history(line)
        assert path.stat().st_mode & 0o777 == 0o600
        readline.clear_history()
    assert [line for line in path.read_text().splitlines() if not line.startswith("_")] == ["one", "two"]


def test_no_server_there() -> None:
    partner = RemotePartner(httpx.AsyncClient(base_url="http://127.0.0.1:1"), Sampling(max_tokens=9))
    with pytest.raises(ChatError, match=r"No server answers at http://127\.0\.0\.1:1 .* `jamba serve`"):
        text_of(partner, HI)


def reasoner(folder: Path) -> tuple[Tokenizer, FakeEngine]:
    """A tokenizer of a reasoning model, and an engine that thinks first."""
    write_tokenizer(folder, "reasoning")
    tokenizer = Tokenizer.from_folder(folder)
    text = "so many\n</think>\n\neyes"
    return tokenizer, FakeEngine(says(tokenizer.encode(text, add_special_tokens=False)))


def test_thoughts_of_a_server_and_of_a_loaded_model(tmp_path: Path) -> None:
    tokenizer, engine = reasoner(tmp_path)
    model = local(engine, tokenizer, REASONING_TEMPLATE)
    assert text_of(LocalPartner(model, Sampling(max_tokens=50)), HI).replace(")(", "") == "(so many)eyes"
    config = ServerConfig(served_model_name=("jamba",))
    app = create_app(config, engine, tokenizer, model.template, GenerationDefaults(), demo=False)
    partner = RemotePartner(Bench(app, engine).http(), Sampling(max_tokens=50))
    assert text_of(partner, HI).replace(")(", "") == "(so many)eyes"


# A model in the terminal --------------------------------------------------------------------------------------------


def local(engine: FakeEngine, tokenizer: Tokenizer, template: str | None = TEMPLATE) -> LocalModel:
    compiled = ChatTemplate(template, tokenizer) if template else None
    return LocalModel(engine, tokenizer, compiled, GenerationDefaults(temperature=0.6, top_p=0.9))


def test_a_local_chat(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    partner = LocalPartner(local(engine, tokenizer), Sampling(max_tokens=50, top_p=0.5))
    assert text_of(partner, HI) == HELLO.lstrip()
    [request] = engine.requests
    params = request.params
    assert (params.max_tokens, params.temperature, params.top_p) == (50, 0.6, 0.5)  # flag before file before OpenAI


def test_a_local_chat_without_a_template(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="no chat template: give one with --chat-template, or use `jamba run`"):
        text_of(LocalPartner(local(engine, tokenizer, None), Sampling(max_tokens=5)), HI)


@pytest.mark.parametrize(
    ("raw", "template", "is_chat"), [(False, TEMPLATE, True), (True, TEMPLATE, False), (False, None, False)]
)
def test_run_uses_the_chat_template_where_there_is_one(
    engine: FakeEngine, tokenizer: Tokenizer, raw: bool, template: str | None, is_chat: bool
) -> None:
    model = local(engine, tokenizer, template)

    async def run() -> None:
        async with aclosing(reply(model, Sampling(max_tokens=9), Question("Hi", raw=raw))) as pieces:
            async for _ in pieces:
                pass

    asyncio.run(run())
    [request] = engine.requests
    expected = ChatTemplate(TEMPLATE, tokenizer).render(HI).prompt_ids if is_chat else tokenizer.encode("Hi")
    assert list(request.prompt) == list(expected)


def test_the_stop_token_is_not_shown(tokenizer: Tokenizer, ids: Ids) -> None:
    hello, stop = ids(" hello"), ids(" the")[-1]
    model = local(FakeEngine(lambda request: updates_of(request, [*hello, stop], "stop", stop)), tokenizer)

    async def run() -> list[str]:
        return [piece async for piece in model.stream([5, 6], Sampling(max_tokens=50))]

    assert "".join(asyncio.run(run())) == " hello"


def test_prompt_and_sampling_are_checked(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    model = local(engine, tokenizer)

    async def run(prompt: list[int], sampling: Sampling) -> None:
        async for _ in model.stream(prompt, sampling):
            pass

    with pytest.raises(RequestRejected, match=r"temperature is 9"):
        asyncio.run(run([5], Sampling(max_tokens=5, temperature=9.0)))
    with pytest.raises(RequestRejected, match="the prompt has 300 tokens"):
        asyncio.run(run([5] * 300, Sampling(max_tokens=5)))
    assert engine.requests == []


def test_each_run_draws_its_own_seed() -> None:
    drawn = {Sampling(max_tokens=5).params(GenerationDefaults()).seed for _ in range(4)}
    assert len(drawn) == 4
    assert Sampling(max_tokens=5, seed=7).params(GenerationDefaults()).seed == 7
