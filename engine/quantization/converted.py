"""The `quantization_config` of folders that `jamba convert` writes. Their weights are quantised in the same way in
which this server quantises plain weights when it loads them, so such a folder loads faster and gives the same
numbers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from jamba_server.engine.config import Quantization
from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.quantization import FORMATS, Role
from jamba_server.engine.quantization.methods import OWN

# Each name is a format in which `jamba convert` writes weights.
FORMATS_WRITTEN: Final[Mapping[str, Quantization]] = {"int8": "int8", "int4": "int4", "int4-g32": "int4-g32"}
_VERSION: Final = 1


class Converted(NamedTuple):
    """The format of the quantised weights, and the parts of the model that have them."""

    quantization: Quantization
    roles: frozenset[Role]


def settings(quantization: Quantization) -> dict[str, Any]:
    """Returns the `quantization_config` of a folder with weights of the given format."""
    form = FORMATS[quantization]
    return {
        "quant_method": OWN,
        "version": _VERSION,
        "format": quantization,
        "bits": form.bits,
        "group_size": form.group_size,
    }


def read(path: Path, config: object) -> Converted | None:
    """Returns what the quantization_config `config` of the file `path` says, or None if `jamba convert` has not written
    it. Raises CheckpointError if it was written by another version."""
    values = cast(dict[str, Any], config) if isinstance(config, dict) else {}
    if values.get("quant_method") != OWN:
        return None
    form = FORMATS_WRITTEN.get(str(values.get("format")))
    if form is None or values != settings(form):
        raise CheckpointError(
            f"{path}: quantization_config is {shown(config)}; this server reads what its own `jamba convert` writes in "
            f"the formats {', '.join(FORMATS_WRITTEN)}. Convert the original checkpoint again."
        )
    return Converted(form, frozenset(("attention", "mlp", "experts", "head")))
