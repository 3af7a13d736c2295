"""Finds the demonstration model, which the server loads if the user names no model."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DESCRIPTION: Final = (
    "demonstration model of 9 million parameters, which tells short stories and is no assistant; "
    "to serve another model, start the server with its name or folder"
)


def demo_folder() -> Path:
    """Returns the demonstration model's folder in the installed package. It has the same files as a model on the
    hub."""
    return Path(__file__).resolve().parent
