"""Reads the options of the server. A flag wins over an environment variable, and an environment variable over a YAML
file."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jamba_server.engine.errors import ConfigError
from jamba_server.engine.files import read_text
from jamba_server.server.config import OPTIONS, ServerConfig
from jamba_server.server.options import ENV_PREFIX

logger = logging.getLogger(__name__)

CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"  # environment variable with the YAML file's path if --config is not given
# For each service whose name begins with "jamba", Kubernetes sets environment variables with such names and values in
# every container. These variables are not options of this server.
_INJECTED_NAME = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_|$)|_PORT_\d+_(TCP|UDP|SCTP)(_|$)")
_INJECTED_VALUE = re.compile(r"(tcp|udp|sctp)://")

FORMER_NAMES: Mapping[str, str] = {o.help.formerly: o.name for o in OPTIONS.values() if o.help.formerly}


def present_name(name: str, shown: str) -> str:
    """Returns the present name of an option. If `name` is the option's name in the previous version, a warning is
    logged. The warning contains `shown`, which is the name in the user's spelling."""
    if (present := FORMER_NAMES.get(name)) is None:
        return name
    logger.warning("%s is now called %s; the next version reads only that name.", shown, present)
    return present


def load_config(flags: Mapping[str, object], environ: Mapping[str, str], path: Path | None = None) -> ServerConfig:
    """Returns the options from all sources. A flag wins over an environment variable, a variable over the YAML file,
    and the file over the default.

    A flag that is None was not given. `path` is the YAML file; if it is None, the variable JAMBA_CONFIG names the file.
    Raises ConfigError, which names the key, the value and what is allowed.
    """
    if path is None and environ.get(CONFIG_VARIABLE):
        path = Path(environ[CONFIG_VARIABLE])
    values = {} if path is None else _from_yaml(path)
    values |= _from_environment(environ)
    values |= {
        name: OPTIONS[name].cast(value, OPTIONS[name].flag) for name, value in flags.items() if value not in (None, [])
    }
    config = ServerConfig(**values)
    config.check()
    return config


def _from_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file whose keys are option names, with underscores or dashes. The value null means the default."""
    import yaml  # imported only here, since this import takes a tenth of the time in which a command starts

    if (text := read_text(path)) is None:
        raise ConfigError(f"--config {path}: there is no such file.")
    try:
        document: object = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(document, dict | None):
        raise ConfigError(f"--config {path} holds a {type(document).__name__}; keys with values are expected.")
    return cast_settings(cast("dict[object, object]", document or {}), str(path))


def cast_settings(settings: Mapping[Any, object], source: str) -> dict[str, Any]:
    """Converts the values of `settings` to the types of their options, and returns them by option name.

    A value of None is left out, so that its option keeps the default.

    Raises ConfigError for a key that is not an option, or for a value that the option does not allow; the message
    begins with `source`.
    """
    values: dict[str, Any] = {}
    for key, value in settings.items():
        name = present_name(str(key).replace("-", "_"), f"{source}: {key}")
        if name not in OPTIONS:
            raise ConfigError(f"{source}: {key!r} is not an option{_suggestion(name)}")
        if value is not None:
            values[name] = OPTIONS[name].cast(value, f"{source}: {name}")
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """Reads the JAMBA_* variables. An empty variable counts as not set, since compose files create empty variables.

    An empty variable for a secret is an error: whoever sets it expects a server that asks for a key.
    """
    variables = {option.variable: option for option in OPTIONS.values()}
    values: dict[str, Any] = {}
    injected: list[str] = []
    for name, text in sorted(environ.items()):
        if not name.startswith(ENV_PREFIX) or name == CONFIG_VARIABLE:
            continue
        if not text:
            if (empty := variables.get(name)) is not None and empty.help.secret:
                raise ConfigError(f"The variable {name} is empty; give it a value, or unset it.")
            continue
        if _INJECTED_VALUE.match(text) or _INJECTED_NAME.search(name):
            injected.append(name)
        elif (option := variables.get(_present_variable(name))) is None:
            raise ConfigError(f"The variable {name} is not an option{_suggestion(name)}")
        else:
            values[option.name] = option.cast(text, name)
    if injected:
        logger.warning(
            "These variables are ignored, since Kubernetes sets them for its services: %s", ", ".join(injected)
        )
    return values


def _present_variable(name: str) -> str:
    """Returns an environment variable's present name. If `name` is the variable's name in the previous version, a
    warning is logged."""
    former = name.removeprefix(ENV_PREFIX).lower()
    return ENV_PREFIX + present_name(former, name).upper() if former in FORMER_NAMES else name


def _suggestion(unknown: str) -> str:
    """Returns the end of an error message on an unknown key or variable. The text suggests the option whose name is
    most similar."""
    near = difflib.get_close_matches(unknown.removeprefix(ENV_PREFIX).lower(), OPTIONS, n=1)
    if not near:
        return "; `jamba serve --help` lists them."
    return f"; did you mean {OPTIONS[near[0]].variable if unknown.isupper() else near[0]}?"
