"""The demonstration checkpoint that is served when no model is named. README.md beside this file describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

DESCRIPTION: Final = (
    "demonstration: a model of 9 million parameters that tells short stories and is no assistant; "
    "name a model to serve one"
)


def demo_folder() -> Path:
    """The checkpoint's folder inside the installed package, laid out like one from the Hugging Face hub."""
    return Path(__file__).resolve().parent
