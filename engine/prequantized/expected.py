"""Says which matrices of a folder are quantised if its weight files are absent. A memory plan without these files needs
this."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any, Final, cast

from jamba_server.engine.prequantized.layout import Loader
from jamba_server.engine.prequantized.settings import Settings
from jamba_server.engine.quantization import Role
from jamba_server.engine.quantization.blocks import StoredMatrix

# The keys of lists that name modules which are not quantised. Tools match the names in different ways.
_IGNORED: Final = ("ignore", "modules_to_not_convert", "llm_int8_skip_modules")


def expected_matrices(
    loader: Loader, settings: Settings, shapes: Iterable[tuple[str, Role, int, int]], names: Collection[str]
) -> dict[str, StoredMatrix]:
    """Returns the quantised matrices of a folder. `shapes` has the name, the part of the model, the rows and the inputs
    of each matrix of the model. `names` are the tensors that the index file lists. If it lists none, all linear modules
    but the output head are expected to be quantised, except those that the settings ignore."""
    ignored = _ignored(settings)
    found: dict[str, StoredMatrix] = {}
    for name, role, rows, inputs in shapes:
        module = name.removesuffix(".weight")
        stacked = re.sub(r"\.experts\.\d+\.", ".switch_mlp.", module)
        if names:
            is_quantized = any(f"{own}{mark}" in names for own in (module, stacked) for mark in loader.MARKS)
        else:
            is_quantized = role != "head" and "embed" not in module and not _is_ignored(module, ignored)
        if is_quantized:
            kind, form = loader.usual(settings, stacked if loader.MARKS == (".scales",) else module)
            found[name] = StoredMatrix(kind, form, rows * inputs, form.num_bytes(rows, inputs))
    return found


def _ignored(settings: Settings) -> list[str]:
    lists = [settings.values.get(key) for key in _IGNORED]
    return [
        item for found in lists if isinstance(found, list) for item in cast(list[Any], found) if isinstance(item, str)
    ]


def _is_ignored(module: str, ignored: Iterable[str]) -> bool:
    return any(
        re.match(pattern[3:], module) is not None if pattern.startswith("re:") else pattern in module
        for pattern in ignored
    )
