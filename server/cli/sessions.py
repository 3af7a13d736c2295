"""`jamba sessions`: lists the conversations that a server keeps, and moves them to other servers in files."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
import time
from collections.abc import Generator
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import httpx
import msgspec
import typer

from jamba_server.engine.errors import ConfigError
from jamba_server.engine.start.machine import format_bytes
from jamba_server.server.cli.bench.client import error_message
from jamba_server.server.cli.chat import DEFAULT_URL, server_url
from jamba_server.server.cli.remote import PROBE_SECONDS, ChatError

SUFFIX = ".jamba-session"
MEDIA_TYPE = "application/octet-stream"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_T = TypeVar("_T")


class Action(StrEnum):
    list = "list"
    export = "export"
    import_ = "import"
    rm = "rm"


class _Session(msgspec.Struct):
    id: str
    created_at: int
    num_responses: int
    pinned_until: int | None = None


class _Sessions(msgspec.Struct):
    data: list[_Session]


class _Imported(msgspec.Struct):
    id: str
    num_responses: int
    num_segments: int


def sessions(
    action: Annotated[Action, typer.Argument(help="What to do", show_default=False)],
    name: Annotated[
        str | None, typer.Argument(help="Name of the session; with import: the file", metavar="NAME|FILE")
    ] = None,
    url: Annotated[str, typer.Option("--url", metavar="URL", help="The server")] = DEFAULT_URL,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PATH", help=f"With export: the file  [default: NAME{SUFFIX}]"),
    ] = None,
    segments: Annotated[
        bool, typer.Option("--segments/--no-segments", help="With export: add what the disk tier has of it")
    ] = True,
    id_: Annotated[
        str | None,
        typer.Option("--id", metavar="NAME", help="With import: name of the session  [default: that in the file]"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With rm: delete without asking")] = False,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", envvar="JAMBA_API_KEY", help="API key of the server", show_default=""),
    ] = None,
) -> None:
    """List the conversations that a server keeps, export them to files, import or delete them."""
    given = {"--output": output, "--no-segments": not segments, "--id": id_, "--yes": yes}
    _check(action, name, {flag for flag, value in given.items() if value})
    with _server(url, api_key) as http:
        match action:
            case Action.list:
                _list(http)
            case Action.export:
                _export(http, _valid(name), output, segments=segments)
            case Action.import_:
                _import(http, Path(name or ""), None if id_ is None else _valid(id_))
            case Action.rm:
                _remove(http, _valid(name), ask=not yes)


# For each action: whether it takes a name or a file, and its own flags.
_TAKES: dict[Action, tuple[bool, frozenset[str]]] = {
    Action.list: (False, frozenset()),
    Action.export: (True, frozenset({"--output", "--no-segments"})),
    Action.import_: (True, frozenset({"--id"})),
    Action.rm: (True, frozenset({"--yes"})),
}


def _check(action: Action, name: str | None, flags: set[str]) -> None:
    """Raises ConfigError for arguments that do not belong to the action."""
    named, own = _TAKES[action]
    what = "a file" if action is Action.import_ else "the name of a session"
    if named and name is None:
        raise ConfigError(f"`jamba sessions {action}` needs {what}.")
    if not named and name is not None:
        raise ConfigError(f"`jamba sessions {action}` takes no argument, but {name!r} is given; the server is --url.")
    if others := sorted(flags - own):
        raise ConfigError(f"`jamba sessions {action}` has no flag {others[0]}.")


def _valid(name: str | None) -> str:
    if name is None or _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{name!r} is no name of a session; it must have 1 to 64 letters, digits, dots, dashes or underscores, and "
            "may not begin with a dot."
        )
    return name


@contextlib.contextmanager
def _server(target: str, api_key: str | None) -> Generator[httpx.Client]:
    if (url := server_url(target)) is None:
        raise ConfigError(f"--url is {target!r}; it must be the URL of a server, such as {DEFAULT_URL}.")
    try:
        with httpx.Client(
            base_url=url.rstrip("/").removesuffix("/v1"),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=PROBE_SECONDS,
        ) as http:
            yield http
    except httpx.ConnectError:
        raise ChatError(
            f"No server answers at {url}. Start one with `jamba serve`, or name another with --url."
        ) from None
    except httpx.HTTPError as error:
        raise ChatError(f"The connection to {url} failed: {error!r}.") from error


def _checked(response: httpx.Response) -> httpx.Response:
    """Returns the response, and shows the server's warning. Raises ChatError if the server refuses the request."""
    if response.is_error:
        response.read()
        raise ChatError(f"{response.url} answers {response.status_code}: {error_message(response)}")
    if warning := response.headers.get("x-warning"):
        typer.echo(f"warning: {warning}", err=True)
    return response


def _decoded(response: httpx.Response, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(_checked(response).content, type=kind)
    except msgspec.DecodeError as error:
        raise ChatError(f"{response.url} answers with something else than sessions: {error}") from None


def _list(http: httpx.Client) -> None:
    found = _decoded(http.get("/v1/sessions"), _Sessions).data
    width = max((len(session.id) for session in found), default=0)
    for session in found:
        pinned = "" if session.pinned_until is None else f", pinned until {_time(session.pinned_until)}"
        typer.echo(
            f"{session.id:{width}}  {_responses(session.num_responses)}, since {_time(session.created_at)}{pinned}"
        )
    if not found and sys.stdout.isatty():
        typer.echo("The server keeps no sessions for this API key.", err=True)


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _responses(number: int) -> str:
    return f"{number} response{'' if number == 1 else 's'}"


def _export(http: httpx.Client, name: str, output: Path | None, *, segments: bool) -> None:
    path = Path(f"{name}{SUFFIX}") if output is None else output
    if path.exists():
        raise ConfigError(f"{path} exists already; choose another file with --output.")
    parameters: dict[str, Any] = {} if segments else {"segments": False}
    with http.stream("GET", f"/v1/sessions/{name}/export", params=parameters) as response:
        _checked(response)
        with _new_file(path) as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
            size = file.tell()
    typer.echo(f"{path}: the session {name}, {format_bytes(size)}")


@contextlib.contextmanager
def _new_file(path: Path) -> Generator[IO[bytes]]:
    """Opens a new file that only its owner can read, because it has a conversation in clear. It gets its name when it
    is complete. Raises ConfigError if it cannot be written."""
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            yield file
        os.rename(unfinished, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.") from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def _import(http: httpx.Client, path: Path, name: str | None) -> None:
    parameters = {} if name is None else {"id": name}
    try:
        with path.open("rb") as file:
            headers = {"Content-Type": MEDIA_TYPE, "Content-Length": str(os.fstat(file.fileno()).st_size)}
            response = http.post("/v1/sessions/import", params=parameters, content=file, headers=headers)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from None
    found = _decoded(response, _Imported)
    segments = f", {found.num_segments} segments of the prefix cache" if found.num_segments else ""
    typer.echo(f"session {found.id}: {_responses(found.num_responses)}{segments}")


def _remove(http: httpx.Client, name: str, *, ask: bool) -> None:
    if ask:
        typer.confirm(f"Delete the session {name} from {http.base_url}?", abort=True)
    _checked(http.delete(f"/v1/sessions/{name}"))
    typer.echo(f"deleted the session {name}")
