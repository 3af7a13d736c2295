"""An inference server for Jamba models: `server` is HTTP and text, `engine` steps the model, `kernels` compute."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jamba_server.llm import LLM

__all__ = ["LLM"]


def __getattr__(name: str) -> Any:
    """`LLM` is imported when it is used: it brings torch, which the HTTP process must not load."""
    if name != "LLM":
        raise AttributeError(f"module 'jamba_server' has no attribute {name!r}")
    return import_module("jamba_server.llm").LLM
