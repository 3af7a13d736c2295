"""ServerConfig: every option of the product, from flags, variables, a YAML file and defaults, in this order.

An option is one field of `ServerConfig`: its flag (`--max-model-len`), its YAML key (`max_model_len`), its variable
(`JAMBA_MAX_MODEL_LEN`), its cast and range and its line in `--help` come from there. What the engine needs stands under
the same name in `EngineConfig`.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import msgspec
import yaml
from msgspec import Meta

from jamba_server.engine.config import (
    Device,
    Dtype,
    EngineConfig,
    KvCacheDtype,
    LoadFormat,
    Quantization,
    StateCacheDtype,
)
from jamba_server.engine.errors import CheckpointError, ConfigError
from jamba_server.engine.validation import RANGES
from jamba_server.server.options import ENV_PREFIX, Help, Option, options_of

logger = logging.getLogger(__name__)

CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"  # the YAML file, where --config does not name one
# What Kubernetes tells a container about services whose names begin with "jamba".
_INJECTED_NAME = re.compile(r"_SERVICE_HOST$|_SERVICE_PORT(_|$)|_PORT_\d+_(TCP|UDP|SCTP)(_|$)")
_INJECTED_VALUE = re.compile(r"(tcp|udp|sctp)://")

Count = Annotated[int, Meta(ge=1)]
Number = Annotated[int, Meta(ge=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Seconds = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(gt=0, le=1)]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Sizes are upper bounds, shrunk to what fits; choices that cannot be met are errors."""

    model: Annotated[str | None, Help("Checkpoint folder or hub id; none: the demonstration checkpoint.")] = None
    revision: Annotated[str | None, Help("Branch, tag or commit of a hub id.")] = None
    served_model_name: Annotated[tuple[str, ...], Help("Name in the API instead of MODEL; repeatable.")] = ()
    host: Annotated[str, Help("Address to listen on.")] = "127.0.0.1"
    port: Annotated[Port, Help("TCP port; 0 takes a free one.")] = 8000
    api_key: Annotated[tuple[str, ...], Help("Key that requests must carry; repeatable.", secret=True)] = ()
    chat_template: Annotated[str | None, Help("File with a chat template in place of the checkpoint's.")] = None
    max_queue_requests: Annotated[Number, Help("Choices that may wait before requests get 503; 0: no limit.")] = 1024
    shutdown_timeout: Annotated[float, Meta(ge=0), Help("Seconds that running requests have to finish.")] = 30.0
    engine_timeout: Annotated[Seconds, Help("Seconds without a step after which the engine is restarted.")] = 120.0
    allowed_origins: Annotated[tuple[str, ...], Help("Origin of web pages that may call, or *; repeatable.")] = ()
    root_path: Annotated[str, Help("Path under which a proxy publishes the server, such as /jamba.")] = ""
    ssl_keyfile: Annotated[str | None, Help("Private key for HTTPS, with --ssl-certfile.")] = None
    ssl_certfile: Annotated[str | None, Help("Certificate for HTTPS, with --ssl-keyfile.")] = None
    metrics_public: Annotated[bool, Help("Leave /metrics open where there is an API key.")] = False
    sse_keep_alive: Annotated[Seconds, Help("Seconds until a silent stream gets a comment.")] = 15.0
    max_body_bytes: Annotated[Count, Help("Longest request body.")] = 4 * 1024**2
    log_level: Annotated[LogLevel, Help("Least severe lines to log.")] = "info"

    device: Annotated[Device, Help("Where the model runs; auto: the GPU if there is one.")] = "auto"
    dtype: Annotated[Dtype, Help("Of weights and KV pages; auto: the checkpoint's.")] = "auto"
    quantization: Annotated[Quantization | None, Help("Weight format, made at load; none: the checkpoint's.")] = None
    quantize_mamba: Annotated[bool, Help("Quantize the Mamba mixers' in_proj and out_proj, too.")] = False
    load_format: Annotated[LoadFormat, Help("dummy: seeded random weights, no file is read.")] = "auto"
    max_model_len: Annotated[Count | None, Help("Longest prompt with its reply; none: the model's.")] = None
    max_num_seqs: Annotated[Count, Help("Sequences that run at once.")] = 64
    max_num_batched_tokens: Annotated[
        Count | None, Help("Prompt tokens a step, beside one of every reply; none: 128 on a CPU, 8192 on a GPU.")
    ] = None
    kv_cache_dtype: Annotated[KvCacheDtype, Help("Of KV pages; fp8: half the memory; auto: --dtype.")] = "auto"
    kv_cache_memory_bytes: Annotated[Count | None, Help("For KV pages; none: what fits.")] = None
    state_cache_memory_bytes: Annotated[
        Number | None, Help("For saved states; none: a quarter of the caches.", formerly="checkpoint_memory_bytes")
    ] = None
    state_cache_dtype: Annotated[
        StateCacheDtype,
        Help("Of saved states; int8: two fifths of the memory, cache hits are not exact.", formerly="checkpoint_dtype"),
    ] = "auto"
    block_size: Annotated[Count, Help("Tokens a KV page.")] = 16
    gpu_memory_utilization: Annotated[Share, Help("Of a GPU's memory that may be in use.")] = 0.92
    enforce_eager: Annotated[bool, Help("No graphs of decoding steps: Python launches every kernel.")] = False
    async_scheduling: Annotated[bool | None, Help("Launch a step before the last is read; none: on a GPU.")] = None
    enable_prefix_caching: Annotated[bool, Help("Compute prefixes that requests share once.")] = True
    enable_priority: Annotated[bool, Help("Obey the field priority of requests.")] = False
    tensor_parallel_size: Annotated[Count, Help("GPUs that share the model; more than 1 is not supported yet.")] = 1
    seed: Annotated[int, Help("Of the random weights of --load-format dummy.")] = 0
    threads: Annotated[Count | None, Help("CPU threads of the engine; none: one a core.")] = None
    batch_invariant: Annotated[
        bool | None, Help("The same bits in every batch; --no-batch-invariant: faster kernels.", formerly="exact")
    ] = None
    kernels: Annotated[dict[str, str], Help("OP=IMPLEMENTATION, see `jamba doctor`; repeatable.")] = field(
        default_factory=dict[str, str]
    )

    def engine(self, model: Path) -> EngineConfig:
        """What the engine is asked to be, with the checkpoint in the folder `model`."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in EngineConfig.__struct_fields__}
        settings["model"] = str(model)
        return EngineConfig(**settings)

    def non_defaults(self) -> dict[str, object]:
        """What somebody has set, secrets masked."""
        values = ((option, getattr(self, option.name)) for option in OPTIONS.values())
        return {option.name: option.show(value) for option, value in values if value != option.default}

    def check(self) -> None:
        """Raises ConfigError for choices that cannot be met."""
        if self.quantize_mamba and self.quantization is None:
            raise ConfigError(f"quantize_mamba needs quantization: {' or '.join(OPTIONS['quantization'].choices)}.")
        if self.tensor_parallel_size > 1:
            raise ConfigError(f"tensor_parallel_size {self.tensor_parallel_size} is not supported yet; the limit is 1.")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("ssl_keyfile and ssl_certfile go together: give both or none.")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path is {self.root_path!r}; it must begin with a slash and not end with one.")
        for name in ("chat_template", "ssl_keyfile", "ssl_certfile"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name} is {path!r}; there is no such file.")


OPTIONS: Mapping[str, Option] = {option.name: option for option in options_of(ServerConfig)}
FORMER_NAMES: Mapping[str, str] = {o.help.formerly: o.name for o in OPTIONS.values() if o.help.formerly}


def present_name(name: str, shown: str) -> str:
    """The name of the option that was called `name` in the version before, with a warning; else `name` as it is.
    `shown` is how the user wrote it."""
    if (present := FORMER_NAMES.get(name)) is None:
        return name
    logger.warning("%s is now called %s; the next version reads only that name.", shown, present)
    return present


def load_config(flags: Mapping[str, object], environ: Mapping[str, str], path: Path | None = None) -> ServerConfig:
    """Flags (None: not given) go before variables, these before the YAML file, this before defaults.

    `path` is the YAML file, else JAMBA_CONFIG names it. Raises ConfigError naming key, value and what is allowed.
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
    """Keys as in `ServerConfig`, also with dashes; null leaves the default."""
    try:
        document: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(document, dict | None):
        raise ConfigError(f"--config {path} holds a {type(document).__name__}; keys with values are expected.")
    values: dict[str, Any] = {}
    for key, value in cast("dict[object, object]", document or {}).items():
        name = present_name(str(key).replace("-", "_"), f"{path}: {key}")
        if name not in OPTIONS:
            raise ConfigError(f"{path}: {key!r} is no option{_suggestion(name)}")
        if value is not None:
            values[name] = OPTIONS[name].cast(value, f"{path}: {name}")
    return values


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """The JAMBA_* variables. An empty one counts as not set, as compose files leave it."""
    variables = {option.variable: option for option in OPTIONS.values()}
    values: dict[str, Any] = {}
    injected: list[str] = []
    for name, text in sorted(environ.items()):
        if not name.startswith(ENV_PREFIX) or name == CONFIG_VARIABLE or not text:
            continue
        if _INJECTED_VALUE.match(text) or _INJECTED_NAME.search(name):
            injected.append(name)
        elif (option := variables.get(_present_variable(name))) is None:
            raise ConfigError(f"The variable {name} is no option{_suggestion(name)}")
        else:
            values[option.name] = option.cast(text, name)
    if injected:
        logger.warning("ignored variables, which Kubernetes sets for services: %s", ", ".join(injected))
    return values


def _present_variable(name: str) -> str:
    former = name.removeprefix(ENV_PREFIX).lower()
    return ENV_PREFIX + present_name(former, name).upper() if former in FORMER_NAMES else name


def _suggestion(unknown: str) -> str:
    """Names the option nearest to a key or, in capitals, to a variable."""
    near = difflib.get_close_matches(unknown.removeprefix(ENV_PREFIX).lower(), OPTIONS, n=1)
    if not near:
        return "; `jamba serve --help` lists them."
    return f"; did you mean {OPTIONS[near[0]].variable if unknown.isupper() else near[0]}?"


def _within(field: str) -> Meta:
    low, high, is_open = RANGES[field]
    return Meta(gt=low, le=high) if is_open else Meta(ge=low, le=high)


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling parameters of requests that leave them out: those of the checkpoint's generation_config.json, under its
    names, else OpenAI's. As in vLLM, `do_sample` says nothing: every request samples with its own temperature."""

    temperature: Annotated[float, _within("temperature")] = 1.0
    top_p: Annotated[float, _within("top_p")] = 1.0
    top_k: Annotated[int, _within("top_k")] = 0
    min_p: Annotated[float, _within("min_p")] = 0.0
    repetition_penalty: Annotated[float, _within("repetition_penalty")] = 1.0

    @classmethod
    def of(cls, folder: Path) -> GenerationDefaults:
        """Reads a checkpoint folder. Raises CheckpointError naming file, key and limit."""
        path = folder / "generation_config.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
        if not isinstance(document, dict):
            raise CheckpointError(f"{path} holds a JSON {type(document).__name__}; an object is expected.")
        values = {k: v for k, v in cast("dict[str, object]", document).items() if v is not None}
        if values.get("top_k") == -1:  # "all" in some checkpoints
            del values["top_k"]
        try:
            return msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"{path}: {error}.") from error

    def non_defaults(self) -> dict[str, float]:
        """What the checkpoint says, where it differs from OpenAI's defaults."""
        plain = GenerationDefaults()
        return {n: v for n in self.__struct_fields__ if (v := getattr(self, n)) != getattr(plain, n)}
