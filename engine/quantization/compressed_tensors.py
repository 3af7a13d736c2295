"""Reads the `quantization_config` of checkpoints whose weights are fp8 already, in the compressed-tensors format that
llm-compressor wrote for AI21's FP8 models. Each weight is float8_e4m3fn, and its `weight_scale` [rows, 1] has one scale
for each output row.

The configuration also asks that activations be rounded to fp8, with a scale for each token. The only purpose of this
rounding is to make matrix products faster, and no tensor in the files depends on the rounding. This server keeps
activations in the model's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.quantization import Role
from jamba_server.engine.quantization.methods import COMPRESSED_TENSORS, advice

FORMAT: Final = "float-quantized"
# The maximum length of a list of module-name patterns, each of which might be matched against the name of every linear
# module.
_MAX_PATTERNS: Final = 10_000
# Maps each key of the `weights` object in a config group to its allowed values. An allowed None means that the key may
# be null or absent.
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
    """Returns which parts of the model (attention, experts, ...) have fp8 weights according to `config`, the
    `quantization_config` of the file `path`. `modules` lists all linear modules: for each module its name on disk and
    the part of the model that contains it. Raises CheckpointError, which names the key and the value, for a setting
    that this server does not support."""
    reader = ConfigReader(path)
    groups = reader.groups(config)
    ignored = reader.patterns("ignore", cast(dict[str, Any], config).get("ignore") or [])
    # Maps each role (the part of the model that a linear module belongs to, such as attention) to up to two names of
    # modules: under the key True the first module that is fp8, under the key False the first module that is not fp8.
    found: dict[Role, dict[bool, str]] = {}
    for name, role in modules:
        quantized = not is_named(name, ignored) and any(is_named(name, targets, "Linear") for targets in groups)
        found.setdefault(role, {}).setdefault(quantized, name)
    for role, names in found.items():
        if role == "other" and True in names:
            raise CheckpointError(
                f"{path}: quantization_config.ignore lacks {names[True]}; this server supports no quantized weights of "
                "this kind (router, x_proj, dt_proj, a classifier's scores)."
            )
        if len(names) > 1:
            raise CheckpointError(
                f"{path}: quantization_config.ignore has {names[False]} and not {names[True]}; in this server either "
                f"all {role} weights are fp8 or none."
            )
    return frozenset(role for role, names in found.items() if True in names)


def is_named(name: str, patterns: Iterable[str], kind: str | None = None) -> bool:
    """Returns whether one of the patterns matches the module `name`. A pattern `re:...` is a regular expression that
    must match from the start of the name. Any other pattern must equal the name or `kind`, the class of the module."""
    return any(
        re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern in (name, kind)
        for pattern in patterns
    )


class ConfigReader:
    """Reads and checks a `quantization_config`. Every error names the file, the key and the value."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def groups(self, config: object) -> list[list[str]]:
        """Checks the whole configuration. Returns, for each of its groups, the list of module-name patterns in
        `targets`."""
        values = self.mapping("", config)
        self.expect("quant_method", values.get("quant_method"), COMPRESSED_TENSORS)
        self.expect("format", values.get("format"), FORMAT, None)
        self.check_extras(values)
        groups = self.mapping("config_groups", values.get("config_groups"))
        return [self.group(f"config_groups.{name}", self.mapping(name, group)) for name, group in groups.items()]

    def check_extras(self, values: Mapping[str, Any]) -> None:
        """Checks the settings that have nothing to do with the numbers of the weights."""
        # A transform_config would rotate weights by Hadamard matrices, and this server does not support that.
        for name in ("kv_cache_scheme", "transform_config"):
            self.expect(name, values.get(name) or None, None)
        if sparsity := values.get("sparsity_config"):
            self.expect("sparsity_config.format", self.mapping("sparsity_config", sparsity).get("format"), "dense")

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
        if len(patterns) > _MAX_PATTERNS:
            self.refuse(key, f"a list of {len(patterns)}", f"at most {_MAX_PATTERNS} names are expected")
        for pattern in patterns:
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                self.refuse(key, pattern, f"it is not a regular expression: {error}")
        return patterns

    def mapping(self, key: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self.refuse(key, value, "an object is expected")
        return cast(dict[str, Any], value)

    def expect(self, key: str, value: object, *allowed: object) -> None:
        if not any(value == known and type(value) is type(known) for known in allowed):
            known = ", ".join(shown(item) for item in allowed if item is not None) or shown(None)
            self.refuse(key, value, f"this server reads {known} only. {advice(None).removesuffix('.')}")

    def refuse(self, key: str, value: object, rule: str) -> NoReturn:
        name = f"quantization_config.{key}".rstrip(".")
        raise CheckpointError(f"{self._path}: {name} is {shown(value)}; {rule}.")
