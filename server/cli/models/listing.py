"""Implements `jamba list`, which shows the models in the hub cache. It works without a network."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from huggingface_hub import constants
from rich import filesize
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jamba_server.server.cli.models.cached import (
    CachedModel,
    Description,
    Machine,
    describe,
    model_repositories,
    models_of,
    scan,
)
from jamba_server.server.cli.settings import with_options
from jamba_server.server.config import ServerConfig

WIDTH = 400  # characters; a row stays one line, which a narrow terminal wraps, so that names can be copied
HASH_SHOWN = 8  # characters of a commit's hash that the table shows; `jamba rm --revision` takes as many


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the list: a model of the cache, and what it is."""

    model: CachedModel
    description: Description


@with_options(())
def list_models(
    config: ServerConfig,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON")] = False,
) -> None:
    """List the models in the hub cache: revision, size on the disk, architecture, quantisation, and whether they fit
    into the free memory of this machine. Works offline."""
    cache = scan()
    machine = Machine.here(config)
    rows = [
        Row(model, describe(model.place, machine))
        for repository in model_repositories(cache)
        for model in models_of(repository)
    ]
    for warning in [] if cache is None else cache.warnings:
        typer.echo(f"A part of the cache cannot be read: {' '.join(str(warning).split())}", err=True)
    if as_json:
        typer.echo(json.dumps([_as_json(row) for row in rows], indent=2))
        return
    if not rows:
        typer.echo(f"The hub cache {constants.HF_HUB_CACHE} holds no models; `jamba pull MODEL` downloads one.")
        return
    Console(width=WIDTH).print(table(rows))
    for row in rows:
        if row.description.reason:
            typer.echo(f"{row.model.id}: {row.description.fits}: {row.description.reason}")
    size = filesize.decimal(sum(repository.size_on_disk for repository in model_repositories(cache)))
    memory = filesize.decimal(machine.available)
    typer.echo(f"{size} in {constants.HF_HUB_CACHE}; a server here may use {memory} of memory ({machine.device})")


def table(rows: list[Row]) -> Table:
    """Returns a table with one row for each model."""
    result = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("model", "revision", "size", "architecture", "quantisation", "fits"):
        result.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for row in rows:
        model, found = row.model, row.description
        refs = f" ({', '.join(model.refs)})" if model.refs else ""
        cells = (
            model.id,
            f"{model.revision[:HASH_SHOWN]}{refs}",
            filesize.decimal(model.num_bytes),
            found.architecture,
            found.quantization,
            found.fits,
        )
        result.add_row(*map(escape, cells))
    return result


def _as_json(row: Row) -> dict[str, object]:
    return {**asdict(row.model), "place": str(row.model.place), **asdict(row.description)}
