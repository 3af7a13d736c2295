"""The flags of `jamba run` and `jamba chat` for sampling parameters, such as --temperature."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from jamba_server.server.cli.local import Sampling


def _option(metavar: str, help: str) -> Any:
    return typer.Option(metavar=metavar, help=help, show_default=False)


FLAGS: dict[str, Any] = {
    "max_tokens": Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Maximum tokens of a reply")],
    "temperature": Annotated[
        float | None, _option("NUMBER", "Randomness of the reply; 0 is greedy  [default: the model's]")
    ],
    "top_p": Annotated[
        float | None,
        _option("FRACTION", "Share of the probability to draw from; 1 is all  [default: the model's]"),
    ],
    "top_k": Annotated[
        int | None, _option("N", "Number of likeliest tokens to draw from; 0 is all  [default: the model's]")
    ],
    "seed": Annotated[int | None, _option("N", "Seed of the sampling  [default: random]")],
}


def with_sampling(max_tokens: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Returns a decorator that replaces a command's parameter `sampling` by the flags in FLAGS. `max_tokens` is the
    default of --max-tokens."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(*values: Any, **arguments: Any) -> None:
            sampling = Sampling(**{name: arguments.pop(name) for name in FLAGS})
            function(*values, sampling=sampling, **arguments)

        own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "sampling"]
        flags = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=max_tokens if name == "max_tokens" else None,
                annotation=annotation,
            )
            for name, annotation in FLAGS.items()
        ]
        # `with_options` and typer read a command's parameters from its signature
        command.__signature__ = inspect.Signature([*own, *flags])  # pyright: ignore[reportAttributeAccessIssue]
        return command

    return decorate
