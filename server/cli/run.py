"""Implements `jamba run`, which prints the reply to one prompt, without a server."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.checkpoint import find_checkpoint, is_local
from jamba_server.server.cli.local import LocalModel, Sampling
from jamba_server.server.cli.log import configure_logging
from jamba_server.server.cli.prompt_flags import Document, Schema, System, read_document, read_schema, with_document
from jamba_server.server.cli.sampling_flags import with_sampling
from jamba_server.server.cli.settings import LOCAL, Model, with_options
from jamba_server.server.config import ServerConfig
from jamba_server.server.text.parts import Reasoning


@with_options(LOCAL)
@with_sampling(max_tokens=256)
def run(
    config: ServerConfig,
    sampling: Sampling,
    model: Model = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", "-p", metavar="TEXT", help="Text of the prompt  [default: standard input]", show_default=False
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text, without the model's chat template")
    ] = False,
    system: System = None,
    schema: Schema = None,
    file: Document = None,
) -> None:
    """Print the reply to one prompt, from --prompt or standard input, without a server. Thoughts go to standard
    error."""
    configure_logging("WARNING")
    if model is not None:
        check_names_a_model(model)
    if prompt is None and sys.stdin.isatty():
        raise ConfigError("There is no prompt: give one with --prompt or on standard input.")
    form, document = read_schema(schema), read_document(file)
    if raw and system is not None:
        raise ConfigError("--system needs the model's chat template, which --raw leaves out.")
    text = with_document(document, sys.stdin.read() if prompt is None else prompt)
    # A running event loop would delay Ctrl-C, so the model is downloaded before the loop starts.
    folder = find_checkpoint(config).folder
    question = Question(text, system=system, schema=form, raw=raw)
    asyncio.run(_run(config, folder, sampling, question))


def check_names_a_model(model: str) -> None:
    """Raises ConfigError if the argument of `jamba run` looks like a prompt."""
    folder = Path(model).expanduser()
    if any(map(str.isspace, model)) and not is_local(folder):
        shown = shlex.quote(model)
        raise ConfigError(f"The argument of `jamba run` is a MODEL. If it is the prompt, write: jamba run -p {shown}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What `jamba run` asks. With `raw` the text is continued, without the model's chat template. The reply follows the
    JSON schema `schema` if there is one."""

    text: str = field(kw_only=False)
    system: str | None = None
    schema: dict[str, Any] | None = None
    raw: bool = False


async def _run(config: ServerConfig, folder: Path, sampling: Sampling, question: Question) -> None:
    async with (
        LocalModel.open(config, folder, Console(stderr=True)) as model,
        contextlib.aclosing(reply(model, sampling, question)) as pieces,
    ):
        async for piece in pieces:
            if isinstance(piece, Reasoning):
                print(piece.text, end="", file=sys.stderr, flush=True)
            else:
                print(piece, end="", flush=True)
    sys.stdout.write("\n")


def reply(model: LocalModel, sampling: Sampling, question: Question) -> AsyncGenerator[str | Reasoning]:
    """Returns the pieces of the model's reply to a chat with the question as the user's only message. If the question
    is raw or the model has no chat template, its text is no message, and the pieces of the text that continues it are
    returned. Raises ConfigError for a system message without a template."""
    if question.raw or model.template is None:
        if question.system is not None:
            raise ConfigError("--system needs a chat template, which this model lacks: give one with --chat-template.")
        ids = model.tokenizer.encode(question.text)
        return model.stream(ids, sampling, grammar=model.grammar(question.schema))
    system = [] if question.system is None else [{"role": "system", "content": question.system}]
    return model.chat([*system, {"role": "user", "content": question.text}], sampling, schema=question.schema)
