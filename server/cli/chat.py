"""Implements `jamba chat`: a conversation in the terminal, with a running server or with a model that the command
loads."""

from __future__ import annotations

import asyncio
import functools
import re
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import httpx
import typer
from rich.console import Console

from jamba_server.engine.errors import ConfigError, JambaError
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.cli.history import history_file, line_editing
from jamba_server.server.cli.local import LocalModel, Sampling
from jamba_server.server.cli.log import configure_logging
from jamba_server.server.cli.prompt_flags import Document, Schema, System, read_document, read_schema, with_document
from jamba_server.server.cli.remote import Messages, Piece, RemotePartner, SessionPartner
from jamba_server.server.cli.sampling_flags import with_sampling
from jamba_server.server.cli.settings import LOCAL, with_options
from jamba_server.server.config import ServerConfig
from jamba_server.server.text.parts import Reasoning

DEFAULT_URL = "http://127.0.0.1:8000"
HTTP_TIMEOUT = httpx.Timeout(10.0, read=None)  # connecting may take at most 10 s; a reply may take any time
HELP = "/system TEXT sets the system message, /reset forgets the conversation, /exit ends; Ctrl-C stops a reply."
_ADDRESS = re.compile(
    r"([\w.-]+|\[[0-9a-f:]+\]):\d+(/.*)?", re.IGNORECASE
)  # matches a server's address without http://, such as localhost:8000 or [::1]:8000/v1

Target = Annotated[
    str,
    typer.Argument(
        metavar="URL|MODEL", help="URL of a server such as localhost:8000, or folder or hub id of a model to load"
    ),
]


Session = Annotated[
    str | None,
    typer.Option(
        "--session",
        metavar="NAME",
        help="Name under which the server keeps the conversation, to go on later  [default: none]",
        show_default=False,
    ),
]
_SESSION = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


class Partner(Protocol):
    """Writes the assistant's messages of a chat: a server, or a model that the command has loaded."""

    def reply(self, messages: Messages) -> AsyncGenerator[Piece]:
        """Yields the assistant's next message in pieces, each as soon as it is generated. Raises JambaError."""
        ...

    async def forget(self) -> None:
        """Forgets what the partner itself keeps of the conversation. Raises JambaError."""
        ...


class LocalPartner:
    """A model that `jamba chat` has loaded in its own process."""

    def __init__(self, model: LocalModel, sampling: Sampling, schema: dict[str, Any] | None = None) -> None:
        self._model, self._sampling, self._schema = model, sampling, schema

    def reply(self, messages: Messages) -> AsyncGenerator[Piece]:
        return self._model.chat(messages, self._sampling, schema=self._schema)

    async def forget(self) -> None:
        """Does nothing, because the model keeps nothing of the conversation but its prefix cache."""


class Conversation:
    """The messages of the user and the assistant in one chat. The argument `write` is a function that shows text to the
    user, and `write_thoughts` one that shows the model's thoughts, which do not become part of the messages.

    The text `document` is put before the first message of the user.
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
        document: str | None = None,
    ) -> None:
        self._write_thoughts = write_thoughts or write
        self._partner, self._write, self._system, self._interactive = partner, write, system, interactive
        self._turns: Messages = []
        self._document = document

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
                await self._forget(self._system)
            case "/system":
                await self._forget(argument.strip() or None)
            case _ if command.startswith("/"):
                self._write(f"{command} is not a command. {HELP}\n")
            case _:
                await self._answer(line)
        return True

    async def _forget(self, system: str | None) -> None:
        """Begins a new conversation with the system message `system`. After an error the old one goes on."""
        try:
            await self._partner.forget()
        except JambaError as error:
            if not self._interactive:
                raise
            self._write(f"[{error}]\n")
            return
        self._turns, self._system = [], system

    async def _answer(self, line: str) -> None:
        """Adds the user's message and the reply to the conversation. If the reply is interrupted, the text received
        before the interruption is kept. After an error neither the user's message nor the reply is kept."""
        before, pieces, has_thoughts = self._turns, list[str](), False
        content = line if before else with_document(self._document, line)
        self._turns = [*before, {"role": "user", "content": content}]
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
    system: System = None,
    schema: Schema = None,
    file: Document = None,
    session: Session = None,
) -> None:
    """Talk in the terminal to a running server, or to a model that this command loads."""
    configure_logging("WARNING")
    interactive = sys.stdin.isatty()
    form, document = read_schema(schema), read_document(file)
    url = server_url(target)
    if session is not None:
        _check_session(session, url)
    folder = None  # the folder of the model to load; stays None if a server replies
    if url is None:
        config = replace(config, model=target)
        # A running event loop would delay Ctrl-C, so the model is downloaded before the loop starts.
        folder = find_checkpoint(config).folder
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        try:
            opened = (
                _load(config, folder, sampling, form)
                if folder
                else _connect(config, url or "", sampling, form, session)
            )
            partner = runner.run(stack.enter_async_context(opened))
            write = functools.partial(print, end="", flush=True)
            dim = _write_dimmed if sys.stdout.isatty() else None
            conversation = Conversation(
                partner, write, system, interactive=interactive, write_thoughts=dim, document=document
            )
            if interactive:
                Console(stderr=True).print(HELP, style="dim", markup=False, highlight=False)
            with line_editing(history_file()) if interactive else nullcontext():
                _converse(runner, conversation, "> " if interactive else "")
        finally:
            runner.run(stack.aclose())


def _check_session(name: str, url: str | None) -> None:
    """Raises ConfigError if `name` is no name of a session, or if no server would keep the session."""
    if url is None:
        raise ConfigError(f"--session {name} needs the URL of a server; a model loaded by this command keeps none.")
    if _SESSION.fullmatch(name) is None:
        raise ConfigError(
            f"--session is {name!r}; it must have 1 to 64 letters, digits, dots, dashes or underscores, and may not "
            "begin with a dot."
        )


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
async def _load(
    config: ServerConfig, folder: Path, sampling: Sampling, schema: dict[str, Any] | None
) -> AsyncGenerator[Partner]:
    async with LocalModel.open(config, folder, Console(stderr=True)) as model:
        yield LocalPartner(model, sampling, schema)


@asynccontextmanager
async def _connect(
    config: ServerConfig, url: str, sampling: Sampling, schema: dict[str, Any] | None, session: str | None
) -> AsyncGenerator[Partner]:
    async with httpx.AsyncClient(
        base_url=url.rstrip("/").removesuffix("/v1"),
        headers={"Authorization": f"Bearer {config.api_key[0]}"} if config.api_key else {},
        timeout=HTTP_TIMEOUT,
    ) as http:
        partner = (
            RemotePartner(http, sampling, schema)
            if session is None
            else SessionPartner(http, sampling, schema, session)
        )
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
