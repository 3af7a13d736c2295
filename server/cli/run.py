"""`jamba run`: one prompt to stdout, without a server."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.checkpoint import find_checkpoint
from jamba_server.server.cli.local import LocalModel, Sampling
from jamba_server.server.cli.log import configure_logging
from jamba_server.server.cli.settings import LOCAL, Model, with_options
from jamba_server.server.config import ServerConfig

MaxTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. [default: the checkpoint's]", show_default=False)]
TopP = Annotated[float | None, typer.Option(help="[default: the checkpoint's]", show_default=False)]
TopK = Annotated[int | None, typer.Option(help="0 is all. [default: the checkpoint's]", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Of the sampling. [default: random]", show_default=False)]


@with_options(LOCAL)
def run(
    config: ServerConfig,
    model: Model = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text to go on with. [default: stdin]", show_default=False)
    ] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
) -> None:
    """Complete one prompt, from --prompt or stdin, to stdout; no server is needed."""
    configure_logging("WARNING")
    if prompt is None and sys.stdin.isatty():
        raise ConfigError("There is no prompt: give one with --prompt or on stdin.")
    text = sys.stdin.read() if prompt is None else prompt
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    folder = find_checkpoint(config).folder  # before there is an event loop, which would hold Ctrl-C back
    asyncio.run(_run(config, folder, text, sampling))


async def _run(config: ServerConfig, folder: Path, prompt: str, sampling: Sampling) -> None:
    async with (
        LocalModel.open(config, folder, Console(stderr=True)) as model,
        contextlib.aclosing(model.stream(model.tokenizer.encode(prompt), sampling)) as pieces,
    ):
        async for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
