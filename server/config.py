"""The options of the server.

An option is one field of `ServerConfig`. The field gives the flag (`--max-model-len`), the YAML key (`max_model_len`),
the variable (`JAMBA_MAX_MODEL_LEN`), the allowed values and the help text. Options that the engine needs have the same
name in `EngineConfig`. The module `config_sources` reads the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from jamba_server.engine.config import (
    DISK_BYTES,
    ActivationQuantization,
    Device,
    Dtype,
    EngineConfig,
    KvCacheDtype,
    LoadFormat,
    Numa,
    Quantization,
    StateCacheDtype,
)
from jamba_server.engine.errors import ConfigError
from jamba_server.engine.nodes.options import NodeOptions
from jamba_server.engine.parallel.device_map import read_device_map
from jamba_server.engine.types import Pooling
from jamba_server.server.option_values import (
    DTYPE_ALIASES,
    Count,
    LogFormat,
    LogLevel,
    MetricsNames,
    Number,
    Port,
    ReasoningParser,
    Role,
    Seconds,
    Share,
    ToolCallParser,
    UnknownFields,
    is_http_url,
)
from jamba_server.server.options import Help, Option, options_of


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The value of every option of the server. If an option is a size that does not fit into memory, the engine reduces
    it and logs one warning. For every other option, a value that the server cannot use is an error."""

    model: Annotated[
        str | None,
        Help("model", "Folder, GGUF file or hub id of the model to load", "MODEL", "a small demonstration model"),
    ] = None
    revision: Annotated[
        str | None, Help("model", "Branch, tag or commit of a hub id", "REVISION", "the main branch")
    ] = None
    tokenizer: Annotated[
        str | None,
        Help("model", "Folder with the tokenizer.json and tokenizer_config.json to use", "FOLDER", "the model's"),
    ] = None
    served_model_name: Annotated[
        tuple[str, ...], Help("server", "Name of the model in the API; may be repeated", "NAME", "MODEL")
    ] = ()
    host: Annotated[str, Help("server", "Address to listen on", "ADDRESS")] = "127.0.0.1"
    port: Annotated[Port, Help("server", "TCP port to listen on; 0 takes a free one", "PORT")] = 8000
    api_key: Annotated[
        tuple[str, ...],
        Help("server", "Key that every request must carry; may be repeated", "KEY", "none, no key needed", secret=True),
    ] = ()
    api_key_file: Annotated[
        str | None,
        Help(
            "server",
            "File with one key per line, plain or as JSON with a name and limits; read again when it changes",
            "PATH",
            "none, no key needed",
        ),
    ] = None
    chat_template: Annotated[
        str | None, Help("model", "Jinja file with the chat template to use", "PATH", "the model's")
    ] = None
    allow_request_templates: Annotated[
        bool, Help("model", "Allow requests to replace the chat template (`chat_template`)")
    ] = False
    tool_call_parser: Annotated[
        ToolCallParser,
        Help("model", "Form of the model's tool calls; auto finds it in the template and the vocabulary"),
    ] = "auto"
    reasoning_parser: Annotated[
        ReasoningParser, Help("model", "Whether thoughts are separated from the content; auto asks the chat template")
    ] = "auto"
    embedding_pooling: Annotated[
        Pooling,
        Help("model", "What an embedding is made of: the last token's hidden state, or the mean over all tokens"),
    ] = "last"
    classify_labels: Annotated[
        str, Help("model", "Words by which a language model answers /classify, separated by commas", "WORDS")
    ] = ""
    max_queue_requests: Annotated[
        Number, Help("server", "Replies that may wait for a free place before requests get 503; 0 is no limit")
    ] = 1024
    max_queue_tokens: Annotated[
        Number,
        Help("server", "Prompt tokens without a first reply token before requests get 503; 0 is no limit", "TOKENS"),
    ] = 4 * 1024**2
    startup_wait: Annotated[
        float, Meta(ge=0), Help("server", "Seconds that a request waits while the model is still loading", "SECONDS")
    ] = 30.0
    shutdown_timeout: Annotated[
        float, Meta(ge=0), Help("server", "Seconds that running requests have to finish after SIGTERM", "SECONDS")
    ] = 30.0
    send_timeout: Annotated[
        Seconds, Help("server", "Seconds after which a client that does not read its reply is cut off", "SECONDS")
    ] = 60.0
    max_kept_streams: Annotated[
        Number, Help("server", "Streams that are kept for clients that reconnect (X-On-Disconnect); 0 keeps none")
    ] = 256
    kept_stream_bytes: Annotated[
        Count, Help("server", "Bytes of events that are kept of one stream for a client that reconnects", "BYTES")
    ] = 1024**2
    resume_timeout: Annotated[
        Seconds, Help("server", "Seconds after which a stream without a connection is dropped and aborted", "SECONDS")
    ] = 60.0
    exit_on_dead: Annotated[
        bool, Help("server", "End with status 1 when the engine cannot be restarted, instead of answering 503")
    ] = True
    engine_timeout: Annotated[
        Seconds, Help("expert", "Seconds without a finished step after which the engine is restarted", "SECONDS")
    ] = 120.0
    load_timeout: Annotated[
        Seconds, Help("expert", "Seconds without progress after which an engine that loads is restarted", "SECONDS")
    ] = 600.0
    max_connections: Annotated[
        Count | None,
        Help("server", "Connections that are open at the same time", default="what the limit of open files allows"),
    ] = None
    header_timeout: Annotated[
        Seconds, Help("server", "Seconds in which a client must send the headers of a request", "SECONDS")
    ] = 20.0
    body_timeout: Annotated[
        Seconds, Help("server", "Seconds in which a client must send the body of a request", "SECONDS")
    ] = 120.0
    keep_alive_timeout: Annotated[
        Count, Help("server", "Seconds after which a connection without a request is closed", "SECONDS")
    ] = 75  # nginx reuses a connection within 60 s, so this server closes idle connections later than that
    allowed_origins: Annotated[
        tuple[str, ...], Help("server", "Origin of web pages that may call the server, or *; may be repeated", "ORIGIN")
    ] = ()
    root_path: Annotated[
        str, Help("server", "Path under which a proxy publishes the server, such as /jamba", "PATH")
    ] = ""
    ui: Annotated[bool, Help("server", "Show browsers a chat page at /; --no-ui leaves a list of links there")] = True
    ssl_keyfile: Annotated[
        str | None, Help("server", "Private key for HTTPS; needs --ssl-certfile", "PATH", "none, plain HTTP")
    ] = None
    ssl_certfile: Annotated[
        str | None, Help("server", "Certificate for HTTPS; needs --ssl-keyfile", "PATH", "none, plain HTTP")
    ] = None
    address_file: Annotated[
        str | None, Help("server", "File that holds the server's URL while it runs, for health checks", "PATH")
    ] = None
    metrics_public: Annotated[bool, Help("server", "Serve /metrics without an API key")] = False
    metrics_names: Annotated[
        MetricsNames, Help("server", "Names in /metrics: vllm serves vLLM's names too, for routers that read them")
    ] = "jamba"
    sse_keep_alive: Annotated[
        Seconds, Help("server", "Seconds of silence after which a stream gets a comment to stay open", "SECONDS")
    ] = 15.0
    max_body_bytes: Annotated[Count, Help("server", "Longest request body that is read, in bytes", "BYTES")] = (
        4 * 1024**2
    )
    body_memory_bytes: Annotated[
        Count, Help("server", "Bytes of the bodies of all requests together, before requests get 503", "BYTES")
    ] = 128 * 1024**2
    unknown_fields: Annotated[
        UnknownFields,
        Help("server", "Unknown request fields: ignore all that cannot change the answer, or reject every one"),
    ] = "ignore"
    data_dir: Annotated[
        str | None,
        Help(
            "server",
            "Folder for stored responses, files and batches",
            "PATH",
            "none, responses are kept in memory, files are refused",
        ),
    ] = None
    max_stored_responses: Annotated[
        Number, Help("server", "Responses of /v1/responses that are kept for later requests; 0 keeps none")
    ] = 10_000
    max_stored_bytes: Annotated[
        Number, Help("server", "Size of all stored responses; the ones not used for longest go first", "BYTES")
    ] = 64 * 1024**2
    max_file_bytes: Annotated[
        Number, Help("server", "Size of all files of /v1/files together; 0 refuses files and batches", "BYTES")
    ] = 1024**3
    max_batch_requests: Annotated[
        Count | None,
        Help("server", "Requests of all batches that are in flight at the same time", default="twice --max-num-seqs"),
    ] = None
    log_level: Annotated[LogLevel, Help("server", "Lowest severity of the lines in the log")] = "info"
    log_format: Annotated[LogFormat, Help("server", "Form of the log: lines of text, or one JSON object per line")] = (
        "text"
    )

    otlp_traces_endpoint: Annotated[
        str | None,
        Help("server", "URL of an OpenTelemetry collector that gets a span per request; needs the extra otel", "URL"),
    ] = None

    device: Annotated[Device, Help("model", "Device that runs the model; auto is the GPU if there is one")] = "auto"
    dtype: Annotated[
        Dtype, Help("model", "Number format of weights and KV pages; auto is the model's own", aliases=DTYPE_ALIASES)
    ] = "auto"
    quantization: Annotated[
        Quantization | None,
        Help(
            "model",
            "Format to which weights are quantised while they load",
            default="the model's own",
            elsewhere=(("experts_int8", "int8"),),
        ),
    ] = None
    quantize_mamba: Annotated[
        bool, Help("model", "Quantise in_proj and out_proj of the Mamba layers as well; needs --quantization")
    ] = False
    activation_quantization: Annotated[
        ActivationQuantization | None,
        Help(
            "model",
            "Rounding of the inputs of products with int8 or int4 weights to 8 bits, on a CPU",
            default="int8 where it is faster and costs little",
        ),
    ] = None
    load_format: Annotated[
        LoadFormat, Help("expert", "Source of the weights: auto reads the model's files, dummy draws random numbers")
    ] = "auto"
    max_model_len: Annotated[
        Count | None, Help("memory", "Maximum tokens per sequence, prompt and reply", "TOKENS", "the model's")
    ] = None
    max_num_seqs: Annotated[Count, Help("memory", "Maximum sequences that run at the same time")] = 64
    max_num_batched_tokens: Annotated[
        Count | None,
        Help(
            "memory",
            "Prompt tokens per step, on top of one token per running reply",
            "TOKENS",
            "by the time of a step on a CPU, 8192 on a GPU",
        ),
    ] = None
    max_num_mixed_tokens: Annotated[
        Count | None,
        Help(
            "memory",
            "Prompt tokens in a step that also computes replies",
            "TOKENS",
            "by the time of a step on a CPU, otherwise --max-num-batched-tokens",
        ),
    ] = None
    max_step_ms: Annotated[
        Count | None,
        Help("memory", "Time of a step with replies on a CPU that decides the prompt tokens per step", "MS", "24"),
    ] = None
    kv_cache_dtype: Annotated[
        KvCacheDtype, Help("memory", "Number format of KV pages; auto is --dtype, fp8 needs half the memory")
    ] = "auto"
    kv_cache_memory_bytes: Annotated[
        Count | None, Help("memory", "Memory for KV pages, such as 4GiB", "BYTES", "what fits")
    ] = None
    state_cache_memory_bytes: Annotated[
        Number | None,
        Help(
            "memory",
            "Memory for the saved states of shared prefixes, such as 1GiB",
            "BYTES",
            "a quarter of the caches",
            formerly="checkpoint_memory_bytes",
        ),
    ] = None
    state_cache_dtype: Annotated[
        StateCacheDtype,
        Help(
            "memory",
            "Number format of saved states; int8 needs two fifths of the memory but makes cache hits inexact",
            formerly="checkpoint_dtype",
        ),
    ] = "auto"
    state_cache_host_bytes: Annotated[
        Number, Help("memory", "Memory on the host for prefixes beyond the device's, such as 8GiB", "BYTES", "none")
    ] = 0
    state_cache_disk_path: Annotated[
        str | None, Help("memory", "Folder in which prefixes outlast a restart, conversations in clear", "PATH")
    ] = None
    state_cache_disk_bytes: Annotated[
        Count, Help("memory", "Size of this folder; the prefixes not used for longest go first", "BYTES")
    ] = DISK_BYTES
    block_size: Annotated[Count, Help("expert", "Tokens per KV page", "TOKENS")] = 16
    gpu_memory_utilization: Annotated[
        Share, Help("memory", "Share of the GPU's memory the server may use", "FRACTION")
    ] = 0.92
    cpu_memory_bytes: Annotated[
        Count | None,
        Help("memory", "Memory for weights and caches on a CPU, such as 16GiB", "BYTES", "what is available"),
    ] = None
    enforce_eager: Annotated[bool, Help("expert", "Launch kernels from Python instead of replaying graphs")] = False
    async_scheduling: Annotated[
        bool | None, Help("expert", "Start the next step before the last results are read", default="on for a GPU")
    ] = None
    enable_prefix_caching: Annotated[bool, Help("memory", "Compute a prefix that several requests share only once")] = (
        True
    )
    share_prefix_cache: Annotated[
        bool, Help("memory", "Share cached prefixes among all API keys; otherwise each key has prefixes of its own")
    ] = False
    enable_priority: Annotated[bool, Help("server", "Run requests with a lower `priority` field first")] = False
    role: Annotated[
        Role,
        Help(
            "server",
            "prefill computes prompts for decode servers, decode has long prompts computed there, both does all itself",
        ),
    ] = "both"
    prefill_url: Annotated[
        tuple[str, ...],
        Help(
            "server", "Address of a prefill server for --role decode, such as http://host:8000; may be repeated", "URL"
        ),
    ] = ()
    prefill_api_key: Annotated[
        str | None, Help("server", "API key that the prefill servers ask for", "KEY", "none", secret=True)
    ] = None
    prefill_min_tokens: Annotated[
        Count,
        Help(
            "server", "Tokens that a prompt must lack in the prefix cache to be computed by a prefill server", "TOKENS"
        ),
    ] = 512
    prefill_timeout: Annotated[
        Seconds, Help("server", "Seconds after which a decode server computes a prompt itself", "SECONDS")
    ] = 30.0
    prefill_max_bytes: Annotated[
        Count, Help("server", "Bytes of segments that may arrive from prefill servers at the same time", "BYTES")
    ] = 1024**3
    data_parallel_size: Annotated[
        Count, Help("memory", "Engines with a copy of the model each, which share the requests and the machine")
    ] = 1
    tensor_parallel_size: Annotated[
        Count, Help("memory", "Processes that divide the model among each other, each on its own GPU: 1, 2, 4 or 8")
    ] = 1
    tensor_parallel_exact: Annotated[
        bool | None,
        Help("expert", "Compute the same bits with 1, 2, 4 and 8 processes", default="with more than one process"),
    ] = None
    pipeline_parallel_size: Annotated[
        Count, Help("memory", "Stages that divide the layers among each other, each on its own GPU or process")
    ] = 1
    device_map: Annotated[
        str | None,
        Help("memory", "JSON file with the device of each module, as in transformers, for unequal stages", "PATH"),
    ] = None
    nnodes: Annotated[
        Count, Help("memory", "Machines among which these processes are divided evenly; each runs `jamba serve`")
    ] = 1
    node_rank: Annotated[
        Number, Help("memory", "Number of this machine, from 0; node 0 takes the requests and starts the others")
    ] = 0
    master_addr: Annotated[
        str | None, Help("memory", "Address of node 0, at which it listens for the other nodes", "ADDRESS")
    ] = None
    master_port: Annotated[Port, Help("memory", "TCP port at which node 0 listens for the other nodes", "PORT")] = 29501
    node_timeout: Annotated[
        Seconds, Help("expert", "Seconds that a node waits for another one before it ends with status 1", "SECONDS")
    ] = 600.0
    seed: Annotated[int, Help("expert", "Seed of the random weights of --load-format dummy")] = 0
    threads: Annotated[Count | None, Help("expert", "CPU threads of each engine process", "N", "one per core")] = None
    numa: Annotated[Numa, Help("expert", "Divide threads and weights among memory nodes; auto: if several")] = "auto"
    batch_invariant: Annotated[
        bool | None,
        Help(
            "expert",
            "Require kernels whose results do not depend on the batch; --no-batch-invariant takes the fastest",
            default="batch-invariant kernels where there are any",
            formerly="exact",
        ),
    ] = None
    kernels: Annotated[
        dict[str, str],
        Help(
            "expert",
            "Implementation of one operation, as `jamba doctor` names both; may be repeated",
            "OP=IMPLEMENTATION",
            "the first that runs",
        ),
    ] = field(default_factory=dict[str, str])

    def engine(self, model: Path) -> EngineConfig:
        """Returns the options that the engine needs. `model` is the folder or the GGUF file that holds the model.

        Raises ConfigError if the device map cannot be read."""
        settings: dict[str, Any] = {name: getattr(self, name) for name in EngineConfig.__struct_fields__}
        settings["model"] = str(model)
        settings["device_map"] = None if self.device_map is None else read_device_map(Path(self.device_map))
        return EngineConfig(**settings)

    def nodes(self) -> NodeOptions | None:
        """Returns the place of this machine among several, or None if there is one machine."""
        if self.nnodes == 1 or self.master_addr is None:
            return None
        return NodeOptions(
            count=self.nnodes,
            rank=self.node_rank,
            address=self.master_addr,
            port=self.master_port,
            timeout=self.node_timeout,
        )

    @property
    def label_words(self) -> tuple[str, ...]:
        """The words in `classify_labels`. A space at the beginning of a word is part of it."""
        return tuple(word for word in self.classify_labels.split(",") if word)

    @property
    def needs_key(self) -> bool:
        """Returns whether requests must carry an API key."""
        return bool(self.api_key or self.api_key_file)

    def non_defaults(self) -> dict[str, object]:
        """Returns the options whose values differ from their defaults, by name. Secrets are masked."""
        values = ((option, getattr(self, option.name)) for option in OPTIONS.values())
        return {option.name: option.show(value) for option, value in values if value != option.default}

    def check(self) -> None:
        """Raises ConfigError for options that contradict each other, are not supported or name missing files."""
        if self.quantize_mamba and self.quantization is None:
            raise ConfigError(f"quantize_mamba needs quantization: {' or '.join(OPTIONS['quantization'].choices)}.")
        if len(set(self.label_words)) < len(self.label_words):
            raise ConfigError(f"classify_labels is {self.classify_labels!r}; each word may be there only once.")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ConfigError("ssl_keyfile and ssl_certfile go together: give both of them or neither.")
        if self.body_memory_bytes < self.max_body_bytes:
            raise ConfigError(
                f"body_memory_bytes is {self.body_memory_bytes}; it must be at least max_body_bytes, which is "
                f"{self.max_body_bytes}."
            )
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(f"root_path is {self.root_path!r}; it must begin with a slash and not end with one.")
        self._check_role()
        self._check_nodes()
        for name in ("chat_template", "ssl_keyfile", "ssl_certfile", "api_key_file"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name} is {path!r}; there is no such file.")

    def _check_role(self) -> None:
        if self.role != "both" and self.state_cache_disk_path is None:
            raise ConfigError(f"role '{self.role}' needs state_cache_disk_path, the folder through which prompts pass.")
        if (self.role == "decode") != bool(self.prefill_url):
            raise ConfigError(
                f"role is '{self.role}' and prefill_url is {', '.join(self.prefill_url) or 'empty'}; role 'decode' and "
                "prefill_url go together."
            )
        for url in self.prefill_url:
            if not is_http_url(url):
                raise ConfigError(f"prefill_url is {url!r}; it must be like http://host:8000 or https://host.")
        if self.role == "prefill" and self.data_dir is not None:
            raise ConfigError("data_dir is for stored responses and batches, which a server of role 'prefill' has not.")

    def _check_nodes(self) -> None:
        if self.node_rank >= self.nnodes:
            raise ConfigError(f"node_rank is {self.node_rank}; it must be less than nnodes, which is {self.nnodes}.")
        if self.nnodes > 1 and self.master_addr is None:
            raise ConfigError(f"nnodes is {self.nnodes}; it needs master_addr, which is the address of node 0.")
        if self.nnodes == 1 and self.master_addr is not None:
            raise ConfigError(f"master_addr is {self.master_addr!r}, but nnodes is 1; leave it out or set nnodes.")
        if self.node_rank > 0 and self.master_port == 0:
            raise ConfigError("master_port is 0, which is for node 0 only; give the port at which node 0 listens.")
        if self.nnodes > 1 and self.data_parallel_size > 1:
            raise ConfigError(
                f"data_parallel_size {self.data_parallel_size} does not work with nnodes {self.nnodes} yet; leave one "
                "out."
            )


OPTIONS: Mapping[str, Option] = {option.name: option for option in options_of(ServerConfig)}
