"""`jamba chat`: a conversation in the terminal, with a running server or a local model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Protocol

import httpx
import msgspec
import typer
from rich.console import Console

from jamba_server.engine.errors import ConfigError, JambaError
from jamba_server.server.cli.bench.client import EventDecoder, error_message
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.cli.local import LocalModel, Sampling
from jamba_server.server.cli.log import configure_logging
from jamba_server.server.cli.run import MaxTokens, Seed, Temperature, TopK, TopP
from jamba_server.server.cli.settings import LOCAL, with_options
from jamba_server.server.config import ServerConfig

DEFAULT_URL = "http://127.0.0.1:8000"
HELP = "/system TEXT sets the system message, /reset forgets the conversation, /exit ends; Ctrl-C stops a reply."

Messages = list[dict[str, str]]
Target = Annotated[
    str, typer.Argument(metavar="[URL|MODEL]", help="A server's URL, or a checkpoint folder or hub id to load here.")
]


class ChatError(JambaError):
    """What a server says in place of a reply, or that there is none."""


class Partner(Protocol):
    """Whoever replies."""

    def reply(self, messages: Messages) -> AsyncGenerator[str]:
        """The assistant's next message, as it comes. Raises JambaError."""
        ...


class LocalPartner:
    """A model in this terminal."""

    def __init__(self, model: LocalModel, sampling: Sampling) -> None:
        self._model, self._sampling = model, sampling

    async def reply(self, messages: Messages) -> AsyncGenerator[str]:
        if (template := self._model.template) is None:
            raise ConfigError("This model has no chat template: give one with --chat-template, or use `jamba run`.")
        chat = template.render(messages)
        stream = self._model.stream(
            chat.prompt_ids,
            self._sampling,
            save_positions=chat.save_positions,
            strip_leading_space=chat.strip_leading_space,
        )
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                yield piece


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list[_Choice])
    error: _Error | None = None


class RemotePartner:
    """A server with OpenAI's chat API, and the model that it serves when none is named."""

    def __init__(self, http: httpx.AsyncClient, sampling: Sampling) -> None:
        self._http, self._sampling = http, sampling

    async def reply(self, messages: Messages) -> AsyncGenerator[str]:
        body = {"messages": messages, "stream": True, **self._sampling.given}
        decoder = EventDecoder()
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    await response.aread()
                    raise ChatError(f"{response.url} answers {response.status_code}: {error_message(response)}")
                async for chunk in response.aiter_bytes():
                    for data in decoder.feed(chunk):
                        yield _text(data)
        except httpx.HTTPError as error:
            raise ChatError(
                f"No answer from {self._http.base_url} ({error!r}). Start a server with `jamba serve`, or name a model."
            ) from error


def _text(data: bytes) -> str:
    """What an event of a stream adds to the reply. Raises ChatError with the message of an error event."""
    if data == b"[DONE]":
        return ""
    event = msgspec.json.decode(data, type=_Event)
    if event.error is not None:
        raise ChatError(event.error.message)
    return "".join(choice.delta.content or "" for choice in event.choices)


class Conversation:
    """Messages so far; `write` shows text."""

    def __init__(self, partner: Partner, write: Callable[[str], None], system: str | None = None) -> None:
        self._partner, self._write, self._system = partner, write, system
        self._turns: Messages = []

    @property
    def messages(self) -> Messages:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *self._turns]

    async def take(self, line: str) -> bool:
        """Answers a line of the user, or obeys its command. False ends the conversation."""
        command, _, argument = line.partition(" ")
        match command:
            case "":
                pass
            case "/exit":
                return False
            case "/help":
                self._write(f"{HELP}\n")
            case "/reset":
                self._turns = []
            case "/system":
                self._turns, self._system = [], argument.strip() or None
            case _ if command.startswith("/"):
                self._write(f"{command} is no command. {HELP}\n")
            case _:
                await self._answer(line)
        return True

    async def _answer(self, line: str) -> None:
        """An interrupted reply stays in the conversation as far as it came; after an error nothing of the turn does."""
        before, pieces = self._turns, list[str]()
        self._turns = [*before, {"role": "user", "content": line}]
        try:
            async with aclosing(self._partner.reply(self.messages)) as reply:
                async for piece in reply:
                    pieces.append(piece)
                    self._write(piece)
        except JambaError as error:
            self._turns = before
            self._write(f"\n[{error}]\n")
            return
        finally:
            if self._turns is not before:
                self._turns.append({"role": "assistant", "content": "".join(pieces)})
        self._write("\n")


@with_options(("api_key", *LOCAL))
def chat(
    config: ServerConfig,
    target: Target = DEFAULT_URL,
    system: Annotated[str | None, typer.Option(help="The system message.", show_default=False)] = None,
    max_tokens: MaxTokens = 1024,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
) -> None:
    """Talk in the terminal to a running server, or to a model that is loaded here with the options of the engine."""
    configure_logging("WARNING")
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    console = Console(stderr=True)
    folder = None  # of a model that is loaded here
    if not target.startswith(("http://", "https://")):
        config = replace(config, model=target)
        folder = find_checkpoint(config).folder  # before there is an event loop, which would hold Ctrl-C back
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            opened = _connect(config, target, sampling) if folder is None else _load(config, folder, sampling)
            partner = runner.run(stack.enter_async_context(opened))
            console.print(HELP, style="dim", markup=False, highlight=False)
            conversation = Conversation(partner, lambda text: print(text, end="", flush=True), system)
            _converse(runner, conversation)
        finally:
            runner.run(stack.aclose())


@asynccontextmanager
async def _load(config: ServerConfig, folder: Path, sampling: Sampling) -> AsyncGenerator[Partner]:
    async with LocalModel.open(config, folder, Console(stderr=True)) as model:
        yield LocalPartner(model, sampling)


@asynccontextmanager
async def _connect(config: ServerConfig, url: str, sampling: Sampling) -> AsyncGenerator[Partner]:
    async with httpx.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {config.api_key[0]}"} if config.api_key else {},
        timeout=httpx.Timeout(10.0, read=None),
    ) as http:
        yield RemotePartner(http, sampling)


def _converse(runner: asyncio.Runner, conversation: Conversation) -> None:
    """Reads lines until the end of the input, /exit, or Ctrl-C at the prompt."""
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if not runner.run(conversation.take(line)):
                return
        except KeyboardInterrupt:
            print()
