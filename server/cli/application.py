"""The typer application: every command, and the one place where an error becomes a sentence and an exit status."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jamba_server.engine.errors import JambaError
from jamba_server.server.cli.bench.command import bench
from jamba_server.server.cli.chat import chat
from jamba_server.server.cli.doctor import doctor
from jamba_server.server.cli.plan import plan
from jamba_server.server.cli.run import run as run_prompt
from jamba_server.server.cli.serve import serve
from jamba_server.server.http.app import package_version

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
