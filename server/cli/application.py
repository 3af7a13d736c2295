"""The typer application: every command, and the one place where an error becomes a sentence and an exit status.

A command's module is imported when the command is asked for: all of them together take more than a second.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from jamba_server.engine.errors import JambaError
from jamba_server.server.version import package_version

# where the function of each command is, which has the command's name
MODULES: Final[Mapping[str, str]] = {
    "serve": "jamba_server.server.cli.serve",
    "run": "jamba_server.server.cli.run",
    "chat": "jamba_server.server.cli.chat",
    "plan": "jamba_server.server.cli.plan",
    "bench": "jamba_server.server.cli.bench.command",
    "doctor": "jamba_server.server.cli.doctor",
}


class Commands(Mapping[str, Any]):
    """The commands by name, as typer makes them."""

    def __getitem__(self, name: str) -> Any:
        function = getattr(import_module(MODULES[name]), name)
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        alone.command(name)(function)
        return typer.main.get_command(alone)

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


class LazyGroup(TyperGroup):
    """A group whose commands are made when they are asked for."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = Commands()


app = typer.Typer(
    cls=LazyGroup,
    name="jamba",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut long flags off on a terminal of 80 columns
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jamba-server {package_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Serve Jamba models behind OpenAI's API, or use them from the terminal."""


def run() -> None:
    """Runs the command that sys.argv names."""
    try:
        app()
    except JambaError as error:
        sys.exit(f"jamba: {error}")
