"""Makes an option of the server from each field of a settings class: its flag, YAML key, environment variable, allowed
values and help."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from jamba_server.engine.errors import ConfigError

ENV_PREFIX = "JAMBA_"
SECRET_MASK = "***"
_SIZE = re.compile(r"(-?\d+(?:\.\d+)?) ?([KMGT]?)(i?B)?", re.IGNORECASE)


Panel = Literal["server", "model", "memory", "expert"]
PANELS: tuple[Panel, ...] = get_args(Panel)


@dataclass(frozen=True, slots=True)
class Help:
    """The help on an option, as `--help` and docs/options.md print it. The option is made from a field of a settings
    class.

    `panel` is the group in which the option is listed. `metavar` is the placeholder for the value, such as the unit of
    a number; if it is empty, the field's type gives the placeholder. `default` is the default in words; if it is empty,
    the field's value is printed.
    The value of a `secret` is never printed. `formerly` is the field's name in the version before this one, which is
    still read, with a warning. `aliases` pairs other spellings of a value with the value that they mean. `elsewhere`
    pairs values of other servers with the nearest value of this server, which the error message suggests.
    """

    panel: Panel
    text: str
    metavar: str = ""
    default: str = ""
    secret: bool = False
    formerly: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    elsewhere: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option of the server, which the user can set by a flag, an environment variable or a key of the YAML file.

    `annotation` is the field's type with its range (msgspec.Meta). `kind` is the type without range and None: int,
    float, bool, str, Literal, tuple or dict.
    """

    name: str
    annotation: Any
    kind: Any
    choices: tuple[str, ...]
    ranges: tuple[Meta, ...]
    default: Any
    help: Help

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def metavar(self) -> str:
        """The placeholder for the value in `--help`, such as N. If the option has fixed choices, the placeholder lists
        them."""
        kinds: dict[Any, str] = {int: "N", float: "NUMBER", str: "TEXT", tuple: "TEXT", dict: "OP=IMPLEMENTATION"}
        return self.help.metavar or ("|".join(self.choices) if self.kind is Literal else kinds.get(self.kind, ""))

    @property
    def shown_default(self) -> str:
        """The default in words, for `--help` and docs/options.md."""
        if self.help.default:
            return self.help.default
        match self.default:
            case bool():
                return "on" if self.default else "off"
            case float():
                return f"{self.default:g}"
            case _:
                return "none" if self.default in (None, "", (), {}) else str(self.default)

    @property
    def allowed(self) -> str:
        """The allowed values in words, for an error message."""
        words = {
            int: f"a whole number{self._range()} (also as 32K, 1M, 4GiB)",
            float: f"a number{self._range()}",
            bool: "true or false",
            str: "a text",
            Literal: f"one of {', '.join(self.choices)}",
            tuple: "a list of texts, none of them empty",
            dict: "OP=IMPLEMENTATION",
        }
        return words[self.kind]

    def _range(self) -> str:
        limits = [
            f"{word} {limit}"
            for meta in self.ranges
            for word, limit in (("of at least", meta.ge), ("above", meta.gt), ("at most", meta.le))
            if limit is not None
        ]
        return " " + " and ".join(limits) if limits else ""

    def cast(self, value: object, source: str) -> Any:
        """Converts `value` to the field's type. If that is not possible, raises ConfigError with the source of the
        value, the value and the allowed values."""
        try:
            return msgspec.convert(self._parse(value), self.annotation, strict=False)
        except (ValueError, msgspec.ValidationError):
            shown = SECRET_MASK if self.help.secret else repr(value)
            hint = next((f" The nearest value is {here}." for there, here in self.help.elsewhere if there == value), "")
            raise ConfigError(f"{source} is {shown}; it must be {self.allowed}.{hint}") from None

    def _parse(self, value: object) -> object:
        """Converts the text of a size, list, mapping or alias to its value. Returns every other value unchanged."""
        if isinstance(value, str) and self.help.aliases:
            return dict(self.help.aliases).get(value, value)
        if isinstance(value, str) and self.kind is int:
            return parse_size(value)
        if isinstance(value, str) and self.kind in (tuple, dict):
            value = [item for item in map(str.strip, value.split(",")) if item]
        if isinstance(value, list) and self.kind is dict:
            return _pairs(cast("list[object]", value))
        if isinstance(value, list) and self.help.secret:  # a secret from a file often ends with a line feed
            value = [item.strip() if isinstance(item, str) else item for item in cast("list[object]", value)]
        if isinstance(value, list) and ("" in value or (self.help.secret and not value)):
            raise ValueError(value)
        return value

    def show(self, value: object) -> object:
        """Returns `value` as text to be printed. If the option is a secret, asterisks are returned."""
        return SECRET_MASK if self.help.secret and value else value


def options_of(settings: type[Any]) -> tuple[Option, ...]:
    """Returns the options of a dataclass whose fields are `Annotated[type, Help(...)]`, in the order of the fields."""
    hints = get_type_hints(settings, include_extras=True)
    return tuple(_option(field, hints[field.name]) for field in dataclasses.fields(settings))


def _option(field: dataclasses.Field[Any], annotation: Any) -> Option:
    metadata, core = _unwrap(annotation)
    [help] = [item for item in metadata if isinstance(item, Help)]
    factory = field.default_factory
    return Option(
        name=field.name,
        annotation=annotation,
        kind=get_origin(core) or core,
        choices=get_args(core) if get_origin(core) is Literal else (),
        ranges=tuple(item for item in metadata if isinstance(item, Meta)),
        default=field.default if factory is dataclasses.MISSING else factory(),
        help=help,
    )


def _unwrap(annotation: Any) -> tuple[list[object], Any]:
    """Removes `Annotated` and `| None` from a type annotation, at every depth. Returns the metadata found in
    `Annotated` and the bare type."""
    metadata: list[object] = []
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *found = get_args(annotation)
            metadata += found
        elif get_origin(annotation) in (Union, UnionType):
            [annotation] = [kind for kind in get_args(annotation) if kind is not NoneType]
        else:
            return metadata, annotation


def parse_size(text: str) -> int:
    """Parses a size: `32K`, `1.5M` or `4GiB` (powers of 1024), `4GB` (powers of 1000) or a number. Raises
    ValueError."""
    if (match := _SIZE.fullmatch(text.strip())) is None:
        raise ValueError(f"{text!r} is not a size")
    number, prefix, unit = match.groups()
    base = 1000 if prefix and (unit or "").upper() == "B" else 1024
    size = Fraction(number) * base ** " KMGT".index(prefix.upper() or " ")
    if size.denominator != 1:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return size.numerator


def _pairs(items: Iterable[object]) -> Mapping[str, str]:
    """Parses texts of the form KEY=VALUE into a mapping. Raises ValueError for a text that does not have this form."""
    pairs: dict[str, str] = {}
    for item in items:
        key, equals, value = str(item).partition("=")
        if not (key and equals and value):
            raise ValueError(item)
        pairs[key.strip()] = value.strip()
    return pairs
