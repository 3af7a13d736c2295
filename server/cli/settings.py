"""Makes the flags of the commands from the fields of ServerConfig."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, cast

import typer

from jamba_server.engine.config import EngineConfig
from jamba_server.server.config import OPTIONS, ServerConfig
from jamba_server.server.config_sources import load_config, present_name
from jamba_server.server.options import Option

P = ParamSpec("P")

ALL = tuple(name for name in OPTIONS if name != "model")
# The names of the options of `jamba run` and `jamba chat`. These commands load a model and run one sequence at a time.
LOCAL = (
    "revision",
    "chat_template",
    *(
        name
        for name in EngineConfig.__struct_fields__
        if name not in ("model", "seed", "max_num_seqs", "enable_priority", "nnodes")
    ),
)

_MODEL = OPTIONS["model"]
Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"{_MODEL.help.text}  [default: {_MODEL.shown_default}]", show_default=False),
]


def with_options(
    names: Iterable[str],
) -> Callable[[Callable[Concatenate[ServerConfig, P], None]], Callable[..., None]]:
    """Returns a decorator that gives a command the flag --config and the flags of the options in `names`.

    The command gets the resulting ServerConfig as its first argument. If the command has a parameter `model`,
    that parameter's value becomes the option `model` of the ServerConfig.
    """
    options = [OPTIONS[name] for name in names]

    def decorate(function: Callable[Concatenate[ServerConfig, P], None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        @functools.wraps(function)
        def command(*, config: Path | None, **arguments: Any) -> None:
            flags = {option.name: arguments.pop(option.name) for option in options}
            for option in options:
                if option.help.formerly and (value := arguments.pop(option.help.formerly)) is not None:
                    flags[present_name(option.help.formerly, f"--{option.help.formerly.replace('_', '-')}")] = value
            flags["model"] = arguments.get("model")
            cast("Callable[..., None]", function)(load_config(flags, os.environ, config), **arguments)

        former = [_parameter(option, option.help.formerly) for option in options if option.help.formerly]
        parameters = [*own, _config_parameter(), *map(_parameter, options), *former]
        # typer reads a command's parameters from its signature
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        command.__annotations__ = {}
        return command

    return decorate


def _config_parameter() -> inspect.Parameter:
    help = "YAML file with options; flags and JAMBA_* variables win over it  [default: none]"
    info = typer.Option("--config", help=help, metavar="PATH", show_default=False)
    return _keyword("config", Annotated[Path | None, info])


def _parameter(option: Option, former_name: str = "") -> inspect.Parameter:
    """Returns the function parameter from which typer makes an option's flag. If `former_name` is given, the flag gets
    that older name, and `--help` does not show the flag.

    Except for switches, typer passes every value on as text: `Option.cast` reads it as it reads the variables.
    """
    name = (former_name or option.name).replace("_", "-")
    flag = f"--{name}/--no-{name}" if option.kind is bool else f"--{name}"
    kind: Any = bool if option.kind is bool else list[str] if option.kind in (tuple, dict) else str
    info = typer.Option(
        flag,
        help=f"{option.help.text}  [default: {option.shown_default}]",
        metavar=None if option.kind is bool else option.metavar,
        rich_help_panel=option.help.panel,
        show_default=False,
        hidden=bool(former_name),
    )
    return _keyword(former_name or option.name, Annotated[kind | None, info])


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
