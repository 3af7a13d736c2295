"""The command `jamba run-batch`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.log import configure_logging
from jamba_server.server.cli.run_batch.output import Output
from jamba_server.server.cli.settings import LOCAL, with_options
from jamba_server.server.config import OPTIONS, ServerConfig

BATCH = (*LOCAL, "served_model_name", "max_num_seqs", "max_batch_requests")


def _model_help() -> str:
    option = OPTIONS["model"]
    return f"{option.help.text}  [default: {option.shown_default}]"


@with_options(BATCH)
def run_batch(
    config: ServerConfig,
    input: Annotated[Path, typer.Argument(metavar="INPUT", help="File with one request per line")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="File to which one result per line is added")
    ],
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help=_model_help(), show_default=False)
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url", metavar="URL", help="Server that runs the requests  [default: this process]", show_default=False
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            envvar="JAMBA_API_KEY",
            help="Key for --url  [default: none]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a file of requests in the form of OpenAI's batches. A second run with the same files does what is left."""
    configure_logging("WARNING")
    if url is not None and model is not None:
        raise ConfigError("Give --model or --url, not both of them.")
    from jamba_server.server.cli.run_batch.run import Run, read_input, run_file  # this import takes long

    console = Console(stderr=True)
    contents = read_input(input, config)
    with Output(output) as results:
        asyncio.run(run_file(config, url, api_key, Run(input, contents, results, console)))
    console.print(f"{results.num_completed} completed, {results.num_failed} failed: {output}", highlight=False)
