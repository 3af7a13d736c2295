"""Builds the command line `jamba` with the library typer, and turns each JambaError into a sentence and exit status 1.

A command's module is imported when that command is used, because importing all of them takes more than a second.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from jamba_server.engine.errors import JambaError
from jamba_server.engine.process.standard_streams import open_missing_streams
from jamba_server.server.options import PANELS
from jamba_server.server.version import package_version

# Maps the name of each command to the Python module that implements the command. The module's main function is named
# after a colon; otherwise it has the command's name, with underscores.
MODULES: Final[Mapping[str, str]] = {
    "serve": "jamba_server.server.cli.serve",
    "run": "jamba_server.server.cli.run",
    "chat": "jamba_server.server.cli.chat",
    "run-batch": "jamba_server.server.cli.run_batch.command",
    "pull": "jamba_server.server.cli.models.pull",
    "list": "jamba_server.server.cli.models.listing:list_models",
    "rm": "jamba_server.server.cli.models.removal:remove",
    "plan": "jamba_server.server.cli.plan",
    "bench": "jamba_server.server.cli.bench.command",
    "doctor": "jamba_server.server.cli.doctor",
    "convert": "jamba_server.server.cli.convert",
    "cache": "jamba_server.server.cli.cache",
    "sessions": "jamba_server.server.cli.sessions",
}


# The function at the key `token_normalize_func` lets users write flags with underscores, such as --max_num_seqs.
SETTINGS: Final = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda name: name.replace("_", "-"),  # pyright: ignore[reportUnknownVariableType]
}


class Command(TyperCommand):
    """A command such as `jamba serve`. The help text of the command lists the flags in groups, as plain text.

    typer's own groups are tables of rich, which cut long flags off on a terminal of 80 columns.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the help in sections: the arguments, the flags that are in no group, and one section for each group of
        flags. typer's word for a group is panel."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        sections |= {f"{panel.capitalize()} options": [] for panel in PANELS}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                panel = getattr(parameter, "rich_help_panel", None)
                if parameter.param_type_name == "argument":
                    name, help = record
                    sections["Arguments"].append(
                        (name.partition(" ")[0], help)
                    )  # the library typer writes a Python type after an argument's name; this code removes the type
                else:
                    sections[f"{panel.capitalize()} options" if panel else "Options"].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Commands(Mapping[str, Any]):
    """Maps the names of commands to typer's command objects. A command's Python module is imported when the command's
    name is looked up."""

    def __getitem__(self, name: str) -> Any:
        module, _, main = MODULES[name].partition(":")
        function = getattr(import_module(module), main or name.replace("-", "_"))
        alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        alone.command(name, cls=Command)(function)
        return typer.main.get_command(alone)

    def __iter__(self) -> Iterator[str]:
        return iter(MODULES)

    def __len__(self) -> int:
        return len(MODULES)


class LazyGroup(TyperGroup):
    """The command `jamba`. The module of a subcommand is imported when the subcommand is used."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands: Any = Commands()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes each command with its whole description, which click would cut to one line."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.help or "") for name, command in self.commands.items()])


app = typer.Typer(
    cls=LazyGroup,
    name="jamba",
    no_args_is_help=True,
    context_settings=SETTINGS,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jamba-server {package_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    """Serve Jamba models behind OpenAI's API, or use them from the terminal."""


def run() -> None:
    """Runs the command that sys.argv names. Exits with status 1 and one sentence for each JambaError."""
    open_missing_streams()
    try:
        app()
    except JambaError as error:
        sys.exit(f"jamba: {error}")
