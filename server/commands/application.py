"""The typer application: every command, and the one place where an error becomes a sentence and an exit status."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from engine.errors import JambaError
from server.app import package_version
from server.bench.command import bench
from server.commands.chat import chat
from server.commands.doctor import doctor
from server.commands.plan import plan
from server.commands.run import run as run_prompt
from server.commands.serve import serve

app = typer.Typer(
    name="jamba",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut long flags off on a terminal of 80 columns
)
app.command("serve")(serve)
app.command("run")(run_prompt)
app.command("chat")(chat)
app.command("plan")(plan)
app.command("bench")(bench)
app.command("doctor")(doctor)


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
