"""An inference server for Jamba models. The package `server` serves HTTP requests and converts between text and tokens.
The package `engine` runs the model step by step, and the package `kernels` does the arithmetic."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jamba_server.engine.types import SamplingParams
    from jamba_server.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, because the class `LLM` imports torch, which the HTTP process must
    not load."""
    match name:
        case "LLM":
            return import_module("jamba_server.llm").LLM
        case "SamplingParams":
            return import_module("jamba_server.engine.types").SamplingParams
        case _:
            raise AttributeError(f"module 'jamba_server' has no attribute {name!r}")
