"""Implements `jamba pull`, which downloads a model from the hub before it is served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich import filesize

from jamba_server.engine.model_config import load_model_config
from jamba_server.server.cli.checkpoint import CONFIG_PATTERNS, refuse_local, split_hub_id
from jamba_server.server.cli.download import HubFile, download, list_files
from jamba_server.server.cli.log import configure_logging
from jamba_server.server.cli.models.cached import Machine, describe
from jamba_server.server.cli.models.selection import Selection, select
from jamba_server.server.cli.settings import with_options
from jamba_server.server.config import ServerConfig

HubId = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Hub id, such as ORGANISATION/NAME or ORGANISATION/NAME-GGUF:Q4_K_M", show_default=False
    ),
]


@with_options(("revision",))
def pull(
    config: ServerConfig,
    model: HubId,
    check: Annotated[
        bool, typer.Option("--check", help="Compare also the files that are here already with the hub's checksums")
    ] = False,
) -> None:
    """Download a model from the hub, or what is missing of it. Complete files are kept after an interruption, and large
    files are compared with their checksums."""
    configure_logging("WARNING")
    refuse_local(model, ": there is nothing to download.")
    hub_id, quantization = split_hub_id(model)
    files, folder = list_files(hub_id, config.revision, list(CONFIG_PATTERNS) if quantization is None else [])
    selection = select(hub_id, files, quantization)
    if quantization is None:
        load_model_config(folder)  # a model that this server cannot load is refused before its weights are downloaded
    for line in _lines(model, selection):
        typer.echo(line)
    names = [file.path for file in selection.wanted]
    folder = download(hub_id, config.revision, names, check_all=check)
    place = folder if quantization is None else folder / names[0]
    found = describe(place, Machine.here(config))
    typer.echo(f"{model} is complete: {found.architecture}, {found.quantization}, in {place}")
    typer.echo(f"fits into the free memory of this machine: {found.fits}{found.reason and ': '}{found.reason}")
    revision = "" if config.revision is None else f" --revision {config.revision}"
    typer.echo(f"try it with: jamba serve {model}{revision}")


def _lines(model: str, selection: Selection) -> list[str]:
    """Returns lines that name the files that the model needs, and those that are not downloaded, with the reasons."""
    wanted = [f"  {file.path}  {filesize.decimal(file.size)}" for file in selection.wanted]
    lines = [f"{model} needs {_count(selection.wanted)}:", *wanted]
    if not selection.left_out:
        return lines
    reasons: dict[str, list[HubFile]] = {}
    for file, reason in selection.left_out:
        reasons.setdefault(reason, []).append(file)
    return [
        *lines,
        "not downloaded:",
        *(f"  {_names(files)} ({_count(files)}): {reason}" for reason, files in reasons.items()),
    ]


def _names(files: Sequence[HubFile]) -> str:
    shown = ", ".join(file.path for file in files[:3])
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more"


def _count(files: Sequence[HubFile]) -> str:
    size = filesize.decimal(sum(file.size for file in files))
    return f"{len(files)} file{'' if len(files) == 1 else 's'}, {size}"
