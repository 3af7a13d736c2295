"""Checkpoints whose weights are fp8 already: compressed-tensors' `quantization_config`, as llm-compressor writes it for
AI21's FP8 models. A weight is float8_e4m3fn, its `weight_scale` [rows, 1] has one number an output row.

Such a file has activations rounded to fp8, too, token by token as they come: a matter of speed, which nothing in the
file depends on. Here they keep the model's dtype.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.quantization import Role

METHOD: Final = "compressed-tensors"
FORMAT: Final = "float-quantized"
# Of a group's weights; null is the last one here, where it or no key at all is allowed.
_WEIGHTS: Final[Mapping[str, tuple[object, ...]]] = {
    "num_bits": (8,),
    "type": ("float",),
    "strategy": ("channel",),
    "symmetric": (True, None),
    "dynamic": (False, None),
    "group_size": (None,),
    "block_structure": (None,),
}


def fp8_roles(path: Path, config: object, modules: Iterable[tuple[str, Role]]) -> frozenset[Role]:
    """The roles whose weights are fp8 by `config`, the `quantization_config` of the file `path`; `modules`: every
    linear module's name on disk and role. Raises CheckpointError, with key and value, for what is not read here."""
    reader = _Reader(path)
    groups = reader.groups(config)
    ignored = reader.patterns("ignore", cast(dict[str, Any], config).get("ignore") or [])
    found: dict[Role, dict[bool, str]] = {}  # a module of each kind
    for name, role in modules:
        quantized = not _named(name, ignored) and any(_named(name, targets, "Linear") for targets in groups)
        found.setdefault(role, {}).setdefault(quantized, name)
    for role, names in found.items():
        if role == "other" and True in names:
            raise CheckpointError(
                f"{path}: quantization_config.ignore lacks {names[True]}; this server has no quantized weights of its "
                "kind (router, x_proj, dt_proj, a classifier's scores)."
            )
        if len(names) > 1:
            raise CheckpointError(
                f"{path}: quantization_config.ignore has {names[False]} and not {names[True]}; this server reads the "
                f"{role} weights either all in fp8 or none."
            )
    return frozenset(role for role, names in found.items() if True in names)


def _named(name: str, patterns: Iterable[str], kind: str | None = None) -> bool:
    """Whether one of the patterns is the name, a regular expression (`re:...`) that its start matches, or `kind`."""
    return any(
        re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern in (name, kind)
        for pattern in patterns
    )


class _Reader:
    """Checks; every complaint names file, key and value."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def groups(self, config: object) -> list[list[str]]:
        """The targets of each group."""
        values = self.mapping("", config)
        self.expect("quant_method", values.get("quant_method"), METHOD)
        self.expect("format", values.get("format"), FORMAT, None)
        self.expect("kv_cache_scheme", values.get("kv_cache_scheme"), None)
        groups = self.mapping("config_groups", values.get("config_groups"))
        return [self.group(f"config_groups.{name}", self.mapping(name, group)) for name, group in groups.items()]

    def group(self, key: str, group: Mapping[str, Any]) -> list[str]:
        self.expect(f"{key}.format", group.get("format"), FORMAT, None)
        self.expect(f"{key}.output_activations", group.get("output_activations"), None)
        weights = self.mapping(f"{key}.weights", group.get("weights"))
        for name, allowed in _WEIGHTS.items():
            self.expect(f"{key}.weights.{name}", weights.get(name), *allowed)
        if group.get("input_activations") is not None:
            activations = self.mapping(f"{key}.input_activations", group["input_activations"])
            self.expect(f"{key}.input_activations.dynamic", activations.get("dynamic"), True)
        return self.patterns(f"{key}.targets", group.get("targets"))

    def patterns(self, key: str, value: object) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in cast(list[object], value)):
            self.refuse(key, value, "a list of names is expected")
        patterns = cast(list[str], value)
        for pattern in patterns:
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                self.refuse(key, pattern, f"it is no regular expression: {error}")
        return patterns

    def mapping(self, key: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self.refuse(key, value, "an object is expected")
        return cast(dict[str, Any], value)

    def expect(self, key: str, value: object, *allowed: object) -> None:
        if not any(value == known and type(value) is type(known) for known in allowed):
            self.refuse(key, value, f"this server reads {json.dumps(allowed[0])}")

    def refuse(self, key: str, value: object, rule: str) -> NoReturn:
        name = f"quantization_config.{key}".rstrip(".")
        raise CheckpointError(f"{self._path}: {name} is {shown(value)}; {rule}.")
