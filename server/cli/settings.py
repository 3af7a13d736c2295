"""Commands with options: their flags are made from the fields of ServerConfig."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Concatenate, Literal, ParamSpec, cast

import typer

from jamba_server.engine.config import EngineConfig
from jamba_server.server.config import OPTIONS, ServerConfig, load_config, present_name
from jamba_server.server.options import Option

P = ParamSpec("P")

ALL = tuple(name for name in OPTIONS if name != "model")
# What a model in this process takes: it runs one sequence at a time, and only its own.
LOCAL = (
    "revision",
    "chat_template",
    *(
        name
        for name in EngineConfig.__struct_fields__
        if name not in ("model", "seed", "max_num_seqs", "enable_priority")
    ),
)

Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help=OPTIONS["model"].help.text, show_default=False)]


def with_options(
    names: Iterable[str],
) -> Callable[[Callable[Concatenate[ServerConfig, P], None]], Callable[..., None]]:
    """Gives a command the flags of `names` and --config; it gets the resulting ServerConfig as first argument.

    A parameter `model` of the command is passed on as part of the configuration, too.
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
        # typer reads parameters from here
        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        command.__annotations__ = {}
        return command

    return decorate


def _config_parameter() -> inspect.Parameter:
    help = "YAML file with options; flags and JAMBA_* variables go before it."
    return _keyword("config", Annotated[Path | None, typer.Option("--config", help=help, show_default=False)])


def _parameter(option: Option, former_name: str = "") -> inspect.Parameter:
    """All flags are texts, but for switches: `Option.cast` reads them, as it does the variables. A flag under its
    former name is hidden."""
    name = (former_name or option.name).replace("_", "-")
    flag = f"--{name}/--no-{name}" if option.kind is bool else f"--{name}"
    kind: Any = bool if option.kind is bool else list[str] if option.kind in (tuple, dict) else str
    info = typer.Option(
        flag,
        help=f"{option.help.text}{_shown(option.default)}",
        metavar=None if option.kind is bool else _metavar(option),
        show_default=False,
        hidden=bool(former_name),
    )
    return _keyword(former_name or option.name, Annotated[kind | None, info])


def _shown(default: object) -> str:
    if default is None or default in ((), {}, ""):
        return ""
    return f"  [default: {str(default).lower() if isinstance(default, bool) else default}]"


def _metavar(option: Option) -> str:
    kinds: dict[Any, str] = {int: "N", float: "SECONDS", str: "TEXT", tuple: "TEXT", dict: "OP=IMPL"}
    return "|".join(option.choices) if option.kind is Literal else kinds[option.kind]


def _keyword(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
