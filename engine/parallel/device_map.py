"""Reads a device map, which says which module of a model runs on which device, as in transformers.

A map is a JSON object from names of modules to devices: `{"model.embed_tokens": 0, "model.layers.0": 0, ...}`. A name
stands for everything inside its module, and a longer name has precedence. Devices are numbers, or names with a number
such as "cuda:1". On a CPU, the devices "cpu:0", "cpu:1" and so on are processes. Works without torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from jamba_server.engine.errors import ConfigError
from jamba_server.engine.files import read_object
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.parallel.stages import EMBEDDING, FINAL_NORM, HEADS, Stage, stages_with_borders

DeviceMap = Mapping[str, int | str]

_DEVICE: Final = re.compile(r"(?:(cpu|cuda)(?::(\d{1,3}))?|(\d{1,3}))")


class _Device(NamedTuple):
    """`kind` is "cpu", "cuda", or None for a device that the map names by its number only."""

    kind: str | None
    number: int


def read_device_map(path: Path) -> dict[str, int | str]:
    """Returns the device map in a file. Raises ConfigError if the file is missing, and CheckpointError if it holds no
    JSON object."""
    if (found := read_object(path)) is None:
        raise ConfigError(f"device_map is {str(path)!r}; there is no such file.")
    for name, device in found.items():
        _parsed(name, device)
    return found


def num_devices(device_map: DeviceMap) -> int:
    """Returns the number of devices in a map. Raises ConfigError for what is no device."""
    return len({_parsed(name, device).number for name, device in device_map.items()})


def device_kind(device_map: DeviceMap) -> str | None:
    """Returns "cpu" or "cuda" if the map names such devices, or None if it has only numbers. Raises ConfigError if it
    names both."""
    named: dict[str, str] = {}
    for name, device in device_map.items():
        if (kind := _parsed(name, device).kind) is not None:
            named.setdefault(kind, name)
    if len(named) > 1:
        raise ConfigError(
            f"device_map puts {_shown(named['cpu'])} on a CPU and {_shown(named['cuda'])} on a GPU; all devices must "
            "be of one kind."
        )
    return next(iter(named), None)


def check_kind(device_map: DeviceMap, device: str) -> None:
    """Raises ConfigError if the map names devices of another kind than `device` ("cpu" or "cuda")."""
    if (kind := device_kind(device_map)) is not None and kind != device:
        name, where = next((name, d) for name, d in device_map.items() if _parsed(name, d).kind == kind)
        raise ConfigError(f"device_map puts {_shown(name)} on {where!r}, but the server runs on the device {device!r}.")


def stages_of_map(device_map: DeviceMap, config: JambaConfig) -> tuple[Stage, ...]:
    """Returns the stages that a map describes: the stage with index i has what is on the device with number i.

    Raises ConfigError, which names the module, if the map divides a layer, omits a module, has a module that the model
    does not have, or puts the modules on the devices in another order than the model runs them.
    """
    devices = _Devices(device_map)
    devices.check_names(config)
    modules = [(EMBEDDING, devices.of(EMBEDDING))]
    modules += [(f"model.layers.{i}", devices.of_layer(i, config)) for i in range(config.num_hidden_layers)]
    head = HEADS[config.is_classifier]
    modules += [(name, devices.of(name)) for name in (FINAL_NORM, head)]
    _check_order(modules)
    last = modules[-1][1]
    layers = [number for _, number in modules[1:-2]]
    for number in range(last + 1):
        if number not in layers:
            name = next(name for name, place in modules if place == number)
            raise ConfigError(f"device_map puts {name} on device {number}, which has no layer; every device needs one.")
    return stages_with_borders((*(layers.index(number) for number in range(last + 1)), len(layers)))


def _check_order(modules: list[tuple[str, int]]) -> None:
    before, place = modules[0]
    if place != 0:
        raise ConfigError(f"device_map puts {before} on device {place}; the first module must be on device 0.")
    for name, number in modules[1:]:
        if number < place:
            raise ConfigError(
                f"device_map puts {name} on device {number}, but {before}, which runs before it, on device {place}: "
                "each device must have neighbouring modules, in the order of the devices' numbers."
            )
        if number > place + 1:
            raise ConfigError(
                f"device_map puts {name} on device {number}, but nothing on device {place + 1}; devices are numbered "
                "without gaps."
            )
        before, place = name, number
    if modules[-1][1] != modules[-3][1]:
        name, number = modules[-1] if modules[-2][1] == modules[-3][1] else modules[-2]
        raise ConfigError(
            f"device_map puts {name} on device {number}, but the last layer on device {modules[-3][1]}; they must be "
            "on the same device, also if the head is tied to the embedding."
        )


class _Devices:
    """Finds the number of the device of each module."""

    def __init__(self, device_map: DeviceMap) -> None:
        device_kind(device_map)
        self._numbers = {name: _parsed(name, device).number for name, device in device_map.items()}

    def of(self, name: str) -> int:
        """Returns the device of a module: that of the longest name in the map that is the module or has it inside."""
        for key in _and_parents(name):
            if key in self._numbers:
                return self._numbers[key]
        raise ConfigError(f"device_map has no device for {name}.")

    def of_layer(self, index: int, config: JambaConfig) -> int:
        prefix = f"model.layers.{index}"
        inside = [f"{prefix}.{name}" for name in _inside(config.is_attention(index))]
        modules = [*inside, *(name for name in self._numbers if name.startswith(f"{prefix}."))]
        places = {name: self.of(name) for name in modules}
        first = places[modules[0]]
        for name, number in places.items():
            if number != first:
                raise ConfigError(
                    f"device_map divides {prefix}: {modules[0]} is on device {first} and {name} on device {number}. "
                    "A layer must be on one device."
                )
        return first

    def check_names(self, config: JambaConfig) -> None:
        """Raises ConfigError for a name that is not a module of the model."""
        known = {EMBEDDING, FINAL_NORM, HEADS[config.is_classifier]}
        for i in range(config.num_hidden_layers):
            known |= {f"model.layers.{i}.{name}" for name in _inside(config.is_attention(i))}
        parents = {parent for name in known for parent in _and_parents(name)}
        for name in self._numbers:
            if name not in parents and not known.intersection(_and_parents(name)):
                raise ConfigError(f"device_map has a device for {name!r}, which is no module of this model.")


def _inside(is_attention: bool) -> tuple[str, ...]:
    """Returns the names of the modules inside a layer."""
    return ("input_layernorm", "self_attn" if is_attention else "mamba", "pre_ff_layernorm", "feed_forward")


def _and_parents(name: str) -> Iterator[str]:
    """Yields the name of a module and of all modules that it is inside of, which end with the whole model, ""."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _parsed(name: str, device: object) -> _Device:
    if isinstance(device, int) and not isinstance(device, bool) and 0 <= device < 1000:
        return _Device(None, device)
    if isinstance(device, str) and (found := _DEVICE.fullmatch(device)) is not None:
        return _Device(found[1], int(found[2] or found[3] or 0))
    raise ConfigError(
        f"device_map puts {_shown(name)} on {device!r}; a device is a number, 'cuda:NUMBER' or 'cpu:NUMBER'."
    )


def _shown(name: str) -> str:
    """Returns the name of a module for an error text. The name of the whole model is empty."""
    return name or "the model"
