"""The table of loaders for folders that other tools have quantised. To add a method, add its module to `_LOADERS`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from jamba_server.engine.prequantized import awq, bitsandbytes, compressed, gptq, mlx
from jamba_server.engine.prequantized.expected import expected_matrices
from jamba_server.engine.prequantized.layout import Layout, Loader
from jamba_server.engine.prequantized.settings import Settings, find_settings
from jamba_server.engine.quantization import Role
from jamba_server.engine.quantization.blocks import StoredMatrix
from jamba_server.engine.weight_files import headers

_LOADERS: Final[tuple[Loader, ...]] = (gptq, awq, compressed, mlx, bitsandbytes)


def loader_of(settings: Settings) -> Loader | None:
    """Returns the loader that recognises the settings, or None if there is none."""
    return next((loader for loader in _LOADERS if loader.recognises(settings)), None)


def is_known(folder: Path) -> bool:
    """Returns whether a loader recognises a folder."""
    settings = find_settings(folder)
    return settings is not None and loader_of(settings) is not None


def open_layout(folder: Path) -> Layout | None:
    """Returns what a folder holds, or None if no loader recognises it. If weight files are missing or incomplete, the
    layout is empty. Raises CheckpointError for a folder that a loader recognises but cannot read."""
    settings = find_settings(folder)
    loader = None if settings is None else loader_of(settings)
    return None if settings is None or loader is None else loader.layout(settings, headers(folder) or {})


def expected(
    folder: Path, shapes: Iterable[tuple[str, Role, int, int]], names: Collection[str]
) -> dict[str, StoredMatrix]:
    """Returns the matrices that a folder without weight files is expected to have quantised. `expected_matrices`
    describes the arguments."""
    settings = find_settings(folder)
    loader = None if settings is None else loader_of(settings)
    return {} if settings is None or loader is None else expected_matrices(loader, settings, shapes, names)
