"""Implements `jamba chat`: a conversation in the terminal, with a running server or with a model that the command
loads."""

from __future__ import annotations

import asyncio
import functools
import re
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, nullcontext
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
from jamba_server.server.cli.history import history_file, line_editing
from jamba_server.server.cli.local import LocalModel, Sampling
from jamba_server.server.cli.log import configure_logging
from jamba_server.server.cli.sampling_flags import with_sampling
from jamba_server.server.cli.settings import LOCAL, with_options
from jamba_server.server.config import ServerConfig
from jamba_server.server.text.parts import Reasoning

DEFAULT_URL = "http://127.0.0.1:8000"
HELP = "/system TEXT sets the system message, /reset forgets the conversation, /exit ends; Ctrl-C stops a reply."
HTTP_TIMEOUT = httpx.Timeout(10.0, read=None)  # connecting may take at most 10 s; a reply may take any time
# Time limit in seconds for the server's first answer. A server that is still loading its model can delay the answer by
# the time of its option --startup-wait, 30 s by default. The limit must exceed that time.
PROBE_SECONDS = 60.0
_ADDRESS = re.compile(
    r"([\w.-]+|\[[0-9a-f:]+\]):\d+(/.*)?", re.IGNORECASE
)  # matches a server's address without http://, such as localhost:8000 or [::1]:8000/v1

Messages = list[dict[str, str]]
Piece = str | Reasoning  # a piece of a reply: text, or the model's thoughts
Target = Annotated[
    str,
    typer.Argument(
        metavar="URL|MODEL", help="URL of a server such as localhost:8000, or folder or hub id of a model to load"
    ),
]


class ChatError(JambaError):
    """Raised if the server sends an error instead of a reply, or does not answer."""


class Partner(Protocol):
    """Writes the assistant's messages of a chat: a server, or a model that the command has loaded."""

    def reply(self, messages: Messages) -> AsyncGenerator[Piece]:
        """Yields the assistant's next message in pieces, each as soon as it is generated. Raises JambaError."""
        ...


class LocalPartner:
    """A model that `jamba chat` has loaded in its own process."""

    def __init__(self, model: LocalModel, sampling: Sampling) -> None:
        self._model, self._sampling = model, sampling

    def reply(self, messages: Messages) -> AsyncGenerator[Piece]:
        return self._model.chat(messages, self._sampling)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Error(msgspec.Struct):
    message: str


class _Event(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list[_Choice])
    error: _Error | None = None


class RemotePartner:
    """A server with OpenAI's chat API. The requests name no model, so the server's default model replies."""

    def __init__(self, http: httpx.AsyncClient, sampling: Sampling) -> None:
        self._http, self._sampling = http, sampling

    async def check(self) -> None:
        """Raises ChatError unless a server answers at the URL and accepts the API key."""
        try:
            response = await self._http.get("/v1/models", timeout=PROBE_SECONDS)
        except httpx.HTTPError as error:
            raise self._no_answer(error) from error
        if response.is_error:
            raise ChatError(f"{response.url} answers {response.status_code}: {error_message(response)}")

    def _no_answer(self, error: httpx.HTTPError) -> ChatError:
        return ChatError(
            f"No server answers at {self._http.base_url} ({error!r}). Start one with `jamba serve`, or name a model."
        )

    async def reply(self, messages: Messages) -> AsyncGenerator[Piece]:
        body = {"messages": messages, "stream": True, **self._sampling.given}
        decoder = EventDecoder()
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    await response.aread()
                    raise ChatError(f"{response.url} answers {response.status_code}: {error_message(response)}")
                async for chunk in response.aiter_bytes():
                    for data in decoder.feed(chunk):
                        for piece in _pieces(data):
                            yield piece
        except httpx.HTTPError as error:
            raise self._no_answer(error) from error


def _pieces(data: bytes) -> Iterator[Piece]:
    """Yields what an event of a stream adds to the reply. Raises ChatError for an error event."""
    if data == b"[DONE]":
        return
    event = msgspec.json.decode(data, type=_Event)
    if event.error is not None:
        raise ChatError(event.error.message)
    for choice in event.choices:
        if choice.delta.reasoning:
            yield Reasoning(choice.delta.reasoning)
        if choice.delta.content:
            yield choice.delta.content


class Conversation:
    """The messages of the user and the assistant in one chat. The argument `write` is a function that shows text to the
    user, and `write_thoughts` one that shows the model's thoughts, which do not become part of the messages.

    If `interactive` is true, an error is shown to the user and the chat goes on. Otherwise the error is raised.
    """

    def __init__(
        self,
        partner: Partner,
        write: Callable[[str], None],
        system: str | None = None,
        *,
        interactive: bool = True,
        write_thoughts: Callable[[str], None] | None = None,
    ) -> None:
        self._write_thoughts = write_thoughts or write
        self._partner, self._write, self._system, self._interactive = partner, write, system, interactive
        self._turns: Messages = []

    @property
    def messages(self) -> Messages:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *self._turns]

    async def take(self, line: str) -> bool:
        """Takes a line that the user has typed. If the line is a command such as /reset, carries out the command.
        Otherwise writes the assistant's reply. Returns False for the command /exit."""
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
                self._write(f"{command} is not a command. {HELP}\n")
            case _:
                await self._answer(line)
        return True

    async def _answer(self, line: str) -> None:
        """Adds the user's message and the reply to the conversation. If the reply is interrupted, the text received
        before the interruption is kept. After an error neither the user's message nor the reply is kept."""
        before, pieces, has_thoughts = self._turns, list[str](), False
        self._turns = [*before, {"role": "user", "content": line}]
        try:
            async with aclosing(self._partner.reply(self.messages)) as reply:
                async for piece in reply:
                    if isinstance(piece, Reasoning):
                        has_thoughts = True
                        self._write_thoughts(piece.text)
                        continue
                    if has_thoughts and not pieces:
                        self._write("\n\n")
                    pieces.append(piece)
                    self._write(piece)
        except JambaError as error:
            self._turns = before
            if not self._interactive:
                raise
            self._write(f"\n[{error}]\n")
            return
        finally:
            if self._turns is not before:
                self._turns.append({"role": "assistant", "content": "".join(pieces)})
        self._write("\n")


@with_options(("api_key", *LOCAL))
@with_sampling(max_tokens=1024)
def chat(
    config: ServerConfig,
    sampling: Sampling,
    target: Target = DEFAULT_URL,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message  [default: none]", show_default=False)
    ] = None,
) -> None:
    """Talk in the terminal to a running server, or to a model that this command loads."""
    configure_logging("WARNING")
    interactive = sys.stdin.isatty()
    folder = None  # the folder of the model to load; stays None if a server replies
    if (url := server_url(target)) is None:
        config = replace(config, model=target)
        # A running event loop would delay Ctrl-C, so the model is downloaded before the loop starts.
        folder = find_checkpoint(config).folder
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            opened = _load(config, folder, sampling) if folder else _connect(config, url or "", sampling)
            partner = runner.run(stack.enter_async_context(opened))
            write = functools.partial(print, end="", flush=True)
            dim = _write_dimmed if sys.stdout.isatty() else None
            conversation = Conversation(partner, write, system, interactive=interactive, write_thoughts=dim)
            if interactive:
                Console(stderr=True).print(HELP, style="dim", markup=False, highlight=False)
            with line_editing(history_file()) if interactive else nullcontext():
                _converse(runner, conversation, "> " if interactive else "")
        finally:
            runner.run(stack.aclose())


def _write_dimmed(text: str) -> None:
    print(f"\x1b[2m{text}\x1b[22m", end="", flush=True)


def server_url(target: str) -> str | None:
    """Returns the URL of the server that `target` names, or None if `target` names a model. If `target` is only a host
    and a port, http:// is put before it. Raises ConfigError for a URL that cannot be read."""
    if _ADDRESS.fullmatch(target) and not Path(target).exists():
        target = f"http://{target}"
    if not target.startswith(("http://", "https://")):
        return None
    try:
        httpx.URL(target)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{target!r} is not a URL: {error}.") from error
    return target


@asynccontextmanager
async def _load(config: ServerConfig, folder: Path, sampling: Sampling) -> AsyncGenerator[Partner]:
    async with LocalModel.open(config, folder, Console(stderr=True)) as model:
        yield LocalPartner(model, sampling)


@asynccontextmanager
async def _connect(config: ServerConfig, url: str, sampling: Sampling) -> AsyncGenerator[Partner]:
    async with httpx.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {config.api_key[0]}"} if config.api_key else {},
        timeout=HTTP_TIMEOUT,
    ) as http:
        partner = RemotePartner(http, sampling)
        await partner.check()
        yield partner


def _converse(runner: asyncio.Runner, conversation: Conversation, prompt: str) -> None:
    """Reads the user's lines and answers them until the end of the input, /exit, or Ctrl-C at the prompt."""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            if prompt:
                print()
            return
        try:
            if not runner.run(conversation.take(line)):
                return
        except KeyboardInterrupt:
            print()
