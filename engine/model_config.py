"""JambaConfig: the sizes and options of a model, read from a checkpoint. This module does not import torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

from jamba_server.engine.checkpoint import Checkpoint, Folder, open_checkpoint, read_object
from jamba_server.engine.config import Quantization
from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.foreign import refuse_foreign
from jamba_server.engine.quantization import Role, converted, methods
from jamba_server.engine.quantization.blocks import StoredMatrix
from jamba_server.engine.quantization.compressed_tensors import fp8_roles

# The supported values of the key `architectures` in config.json. The package `engine.models` maps each value to a model
# class.
CAUSAL_LM: Final = "JambaForCausalLM"
SEQUENCE_CLASSIFICATION: Final = "JambaForSequenceClassification"
ARCHITECTURES: Final = (CAUSAL_LM, SEQUENCE_CLASSIFICATION)
DTYPES: Final = ("bfloat16", "float16", "float32")
# The values of transformers' key `problem_type`, which says what the outputs of a classifier's head mean.
PROBLEM_TYPES: Final = ("regression", "single_label_classification", "multi_label_classification")
_EXAMPLE: Final = "ai21labs/AI21-Jamba-Reasoning-3B"

# These limits are far above the sizes of all published models. A larger number in a config.json is a mistake or an
# attack: loops over so many layers or experts would hang the server.
_MAX_LAYERS: Final = 1024
_MAX_EXPERTS: Final = 1024
_MAX_SIZE: Final = 1 << 20  # largest allowed value of a dimension such as hidden_size, in elements
_MAX_TOKENS: Final = 1 << 30  # largest allowed context length in tokens
_MAX_VOCABULARY: Final = 1 << 24
_MAX_LABELS: Final = 1 << 16

# Keys of config.json that change what the model computes. This table maps each key to the only value that this server
# implements. If a key is absent, this value is assumed.
_IMPLEMENTED: Final[Mapping[str, object]] = {
    "hidden_act": "silu",
    "sliding_window": None,
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "mamba_inner_layernorms": True,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class JambaConfig:
    """The checked values of a `config.json`. Most fields have the name of their key in the file.

    `mamba_dt_rank` is a number even if the file says "auto". `eos_token_ids` come from `generation_config.json` if it
    has any, else from `config.json`. `dtype` is that of the checkpoint, one of `DTYPES`. `labels` are the names of a
    classifier's labels, and `score_bias` says whether its head has a bias, which only the weight files tell. Two fields
    come from
    `quantization_config`: `quantized_roles` names the parts of the model whose weights have the format
    `stored_format` in the checkpoint, and
    `made_at_load` is a method by which another server would quantise plain weights as it loads them. `stored` maps the
    names of weights that the checkpoint stores in blocks of integers to what is stored.
    """

    architecture: str
    dtype: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    expert_layer_period: int
    expert_layer_offset: int
    attn_layer_period: int
    attn_layer_offset: int
    mamba_d_state: int
    mamba_d_conv: int
    mamba_expand: int
    mamba_dt_rank: int
    mamba_conv_bias: bool
    mamba_proj_bias: bool
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    labels: tuple[str, ...]
    problem_type: str = ""
    score_bias: bool = False
    quantized_roles: frozenset[Role] = frozenset()
    stored_format: Quantization = "fp8"
    made_at_load: str | None = None
    stored: Mapping[str, StoredMatrix] = field(default_factory=dict[str, StoredMatrix], hash=False, repr=False)

    @property
    def d_inner(self) -> int:
        """Returns the number of channels of a Mamba layer."""
        return self.mamba_expand * self.hidden_size

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self.is_attention(i))

    @property
    def mamba_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if not self.is_attention(i))

    @property
    def is_classifier(self) -> bool:
        return self.architecture == SEQUENCE_CLASSIFICATION

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    def is_attention(self, layer: int) -> bool:
        return layer % self.attn_layer_period == self.attn_layer_offset

    def is_moe(self, layer: int) -> bool:
        return self.num_experts > 1 and layer % self.expert_layer_period == self.expert_layer_offset

    def num_parameters(self) -> int:
        """Returns the number of the model's parameters. An output head that shares its weight with the embedding is not
        counted a second time."""
        h, attention, mamba = self.hidden_size, len(self.attention_layers), len(self.mamba_layers)
        moe = sum(self.is_moe(i) for i in range(self.num_hidden_layers))
        mlp = 3 * h * self.intermediate_size
        feed_forward = moe * self.num_experts * (mlp + h) + (self.num_hidden_layers - moe) * mlp
        norms = (2 * self.num_hidden_layers + 1) * h
        layers = attention * self._attention_parameters() + mamba * self._mamba_parameters() + feed_forward + norms
        return layers + self.vocab_size * h + self._head_parameters()

    def _attention_parameters(self) -> int:
        return 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)

    def _mamba_parameters(self) -> int:
        h, d, s, r = self.hidden_size, self.d_inner, self.mamba_d_state, self.mamba_dt_rank
        projections = 3 * d * h + d * (r + 2 * s) + d * r + self.mamba_proj_bias * (2 * d + h)
        convolution = d * (self.mamba_d_conv + self.mamba_conv_bias)
        return projections + convolution + d * scan_parameters(self) + r + 2 * s

    def _head_parameters(self) -> int:
        if self.is_classifier:
            return self.num_labels * (self.hidden_size + self.score_bias)
        return 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size


def linear_modules(config: JambaConfig) -> Iterator[tuple[str, Role]]:
    """Yields a pair (name, role) for every linear module. The name is that of the module's weight in the checkpoint's
    files, without the suffix `.weight`. The role is the part of the model that has the module, for example "attention";
    a quantisation policy chooses the format of the weight by the role."""
    for i in range(config.num_hidden_layers):
        layer, feed_forward = f"model.layers.{i}.", f"model.layers.{i}.feed_forward."
        if config.is_attention(i):
            yield from _projections(f"{layer}self_attn.", ("q", "k", "v", "o"), "attention")
        else:
            yield from _projections(f"{layer}mamba.", ("in", "out"), "mamba")
            yield from _projections(f"{layer}mamba.", ("x", "dt"), "other")
        if config.is_moe(i):
            yield f"{feed_forward}router", "other"
            for e in range(config.num_experts):
                yield from _projections(f"{feed_forward}experts.{e}.", ("gate", "up", "down"), "experts")
        else:
            yield from _projections(feed_forward, ("gate", "up", "down"), "mlp")
    if config.is_classifier:
        yield "score", "other"
    elif not config.tie_word_embeddings:
        yield "lm_head", "head"


def _projections(prefix: str, names: tuple[str, ...], role: Role) -> Iterator[tuple[str, Role]]:
    for name in names:
        yield f"{prefix}{name}_proj", role


def scan_parameters(config: JambaConfig) -> int:
    """Returns how many parameters of one channel of a Mamba layer are always in float32: those of A_log, D and the dt
    bias."""
    return config.mamba_d_state + 2


def load_model_config(folder: Path, *, own_head: bool = False) -> JambaConfig:
    """Reads `config.json` of the checkpoint at `folder`, and `generation_config.json` if it exists. The checkpoint is a
    folder, or a file from which these documents can be made.

    Absent keys have the defaults of transformers' JambaConfig. `own_head` means that the weights have a head which
    differs from the embedding, so that `tie_word_embeddings` is ignored. Raises CheckpointError, with file, key and
    value, for a value that is missing, out of range or not implemented, and for other kinds of models.
    """
    checkpoint = open_checkpoint(folder)
    if isinstance(checkpoint, Folder):
        refuse_foreign(folder)
    file = _ConfigFile.read(checkpoint, "config.json")
    architecture = _architecture(file)
    for key, value in _IMPLEMENTED.items():
        if file.values.get(key, value) != value:
            raise file.refusal(key, f"this server implements only {json.dumps(value)}")
    layout = checkpoint.layout() if isinstance(checkpoint, Folder) else None
    if layout is None:
        methods.refuse_foreign(file.path, file.values)
    config = _read_config(file, architecture, eos_token_ids=_eos_token_ids(file, checkpoint))
    _check_schedules(file, config)
    stored = checkpoint.stored() if layout is None else {name: m.stored for name, m in layout.matrices.items()}
    config = replace(config, stored=stored)
    if own_head:
        config = replace(config, tie_word_embeddings=False)
    quantization = file.values.get("quantization_config")
    if quantization is None or layout is not None:
        return config
    if (method := methods.made_at_load(quantization)) is not None:
        return replace(config, made_at_load=method)
    if (own := converted.read(file.path, quantization)) is not None:
        return replace(config, stored_format=own.quantization, quantized_roles=own.roles)
    return replace(config, quantized_roles=fp8_roles(file.path, quantization, linear_modules(config)))


class _ConfigFile:
    """Reads values of given types from the JSON object in a file. The text of every exception names the file, the key
    and the value."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    @classmethod
    def read(cls, checkpoint: Checkpoint, name: str) -> _ConfigFile:
        path = checkpoint.where(name)
        if (values := read_object(checkpoint, name)) is None:
            raise CheckpointError(f"{path} does not exist; every Hugging Face checkpoint folder has this file.")
        return cls(path, values)

    def refusal(self, key: str, rule: str) -> CheckpointError:
        value = shown(self.values[key]) if key in self.values else "missing"
        return CheckpointError(f"{self.path}: {key} is {value}; {rule}.")

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = _MAX_SIZE) -> int:
        """Returns the whole number at `key`. If the key is missing, returns `default`, or raises an exception if no
        default is given."""
        value = self.values.get(key, default)
        if not _is_integer(value) or value < minimum:
            raise self.refusal(key, f"a whole number of at least {minimum} is expected")
        if value > maximum:
            raise self.refusal(key, f"at most {maximum} is expected")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false is expected")
        return value

    def share(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise self.refusal(key, "a number above 0 and at most 1 is expected")
        return float(value)

    def token_ids(self, key: str, default: int | None, *, vocab_size: int) -> tuple[int, ...]:
        """Returns the token ids at `key`. The value of the key is one token id, a list of token ids, or null if there
        is no token id."""
        value = self.values.get(key, default)
        many: list[Any] = [] if value is None else cast(list[Any], value) if isinstance(value, list) else [value]
        if not all(_is_integer(token) and 0 <= token < vocab_size for token in many):
            raise self.refusal(key, f"token ids from 0 to {vocab_size - 1} are expected")
        return tuple(dict.fromkeys(many))

    def token_id(self, key: str, default: int | None, *, vocab_size: int) -> int | None:
        ids = self.token_ids(key, default, vocab_size=vocab_size)
        if len(ids) > 1:
            raise self.refusal(key, "one token id is expected")
        return ids[0] if ids else None


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _architecture(file: _ConfigFile) -> str:
    """Returns the first name in the key `architectures` that this server supports. The key `model_type` is checked
    first, because it tells whether an unknown architecture is another model or a variant of Jamba."""
    if file.values.get("model_type") != "jamba":
        raise file.refusal("model_type", f'this server runs "jamba" models only, such as {_EXAMPLE}')
    named = file.values.get("architectures")
    known = [name for name in cast(list[Any], named) if name in ARCHITECTURES] if isinstance(named, list) else []
    if not known:
        raise file.refusal("architectures", f"one of {', '.join(ARCHITECTURES)} is expected")
    return known[0]


def _read_config(file: _ConfigFile, architecture: str, *, eos_token_ids: tuple[int, ...]) -> JambaConfig:
    vocab_size, hidden_size = _vocab_size(file), file.integer("hidden_size")
    heads = file.integer("num_attention_heads")
    return JambaConfig(
        architecture=architecture,
        dtype=_dtype(file),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=file.integer("intermediate_size"),
        num_hidden_layers=file.integer("num_hidden_layers", maximum=_MAX_LAYERS),
        num_attention_heads=heads,
        head_dim=_head_dim(file, hidden_size, heads),
        num_key_value_heads=_kv_heads(file, heads),
        num_experts=file.integer("num_experts", 16, maximum=_MAX_EXPERTS),
        num_experts_per_tok=file.integer("num_experts_per_tok", 2),
        expert_layer_period=file.integer("expert_layer_period", 2),
        expert_layer_offset=file.integer("expert_layer_offset", 1, minimum=0),
        attn_layer_period=file.integer("attn_layer_period", 8),
        attn_layer_offset=file.integer("attn_layer_offset", 4, minimum=0),
        mamba_d_state=file.integer("mamba_d_state", 16),
        # A convolution of width 1 has no state, and the convolution kernels support only widths of at least 2.
        mamba_d_conv=file.integer("mamba_d_conv", 4, minimum=2),
        mamba_expand=file.integer("mamba_expand", 2),
        mamba_dt_rank=_dt_rank(file, hidden_size),
        mamba_conv_bias=file.boolean("mamba_conv_bias", True),
        mamba_proj_bias=file.boolean("mamba_proj_bias", False),
        rms_norm_eps=file.share("rms_norm_eps", 1e-6),
        tie_word_embeddings=file.boolean("tie_word_embeddings", False),
        # Before transformers supported Jamba, Jamba's checkpoints came with their own model code, which calls this key
        # n_ctx.
        max_position_embeddings=file.integer(
            "max_position_embeddings", file.integer("n_ctx", 262144, maximum=_MAX_TOKENS), maximum=_MAX_TOKENS
        ),
        bos_token_id=file.token_id("bos_token_id", 1, vocab_size=vocab_size),
        eos_token_ids=eos_token_ids,
        pad_token_id=file.token_id("pad_token_id", 0, vocab_size=vocab_size),
        labels=_labels(file),
        problem_type=_problem_type(file),
    )


def _vocab_size(file: _ConfigFile) -> int:
    return file.integer("vocab_size", maximum=_MAX_VOCABULARY)


def _eos_token_ids(file: _ConfigFile, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Returns the end tokens that generation_config.json names. If generation_config.json names no end tokens, returns
    those of config.json. The method `generate` of the transformers library chooses end tokens in the same way."""
    vocab_size, name = _vocab_size(file), "generation_config.json"
    if (values := read_object(checkpoint, name)) is not None:
        generation = _ConfigFile(checkpoint.where(name), values)
        if ids := generation.token_ids("eos_token_id", None, vocab_size=vocab_size):
            return ids
    return file.token_ids("eos_token_id", 2, vocab_size=vocab_size)


def _dtype(file: _ConfigFile) -> str:
    """Returns the value of the key `dtype`, or of `torch_dtype`, which was the name of this key before transformers 5.
    If both keys are absent, returns float32, because no supported dtype has a higher precision."""
    key = "dtype" if file.values.get("dtype") is not None else "torch_dtype"
    value = file.values.get(key)
    if value is None:
        return "float32"
    if value not in DTYPES:
        raise file.refusal(key, f"one of {', '.join(DTYPES)} is expected")
    return value


def _kv_heads(file: _ConfigFile, heads: int) -> int:
    key = "num_key_value_heads"
    kv_heads = heads if file.values.get(key, 0) is None else file.integer(key, 8)
    if heads % kv_heads:
        raise file.refusal(key, f"it must divide num_attention_heads, {heads}")
    return kv_heads


def _head_dim(file: _ConfigFile, hidden_size: int, heads: int) -> int:
    if file.values.get("head_dim") is not None:
        return file.integer("head_dim")
    if hidden_size % heads:
        raise file.refusal("num_attention_heads", f"it must divide hidden_size, {hidden_size}")
    return hidden_size // heads


def _dt_rank(file: _ConfigFile, hidden_size: int) -> int:
    key = "mamba_dt_rank"
    if file.values.get(key, "auto") == "auto":
        return -(-hidden_size // 16)
    if not _is_integer(file.values[key]):
        raise file.refusal(key, '"auto" or a whole number of at least 1 is expected')
    return file.integer(key)


def _labels(file: _ConfigFile) -> tuple[str, ...]:
    """Returns the names of a classifier's labels. transformers writes `id2label` with an entry for each label, and
    omits `id2label` if there are two labels, which is the default number."""
    named = file.values.get("id2label")
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(file.integer("num_labels", 2, maximum=_MAX_LABELS)))
    numbers = cast(dict[str, Any], named) if isinstance(named, dict) else {}
    labels = [numbers.get(str(i)) for i in range(len(numbers))]
    if not labels or not all(isinstance(label, str) for label in labels):
        raise file.refusal(
            "id2label", "an object from label numbers to names is expected, where the numbers count from 0"
        )
    return tuple(str(label) for label in labels)


def _problem_type(file: _ConfigFile) -> str:
    kind = file.values.get("problem_type")
    if kind is not None and kind not in PROBLEM_TYPES:
        raise file.refusal("problem_type", f"one of {', '.join(PROBLEM_TYPES)} is expected")
    return kind or ""


def _check_schedules(file: _ConfigFile, config: JambaConfig) -> None:
    if config.attn_layer_offset >= config.attn_layer_period:
        raise file.refusal("attn_layer_offset", f"it must be below attn_layer_period, {config.attn_layer_period}")
    if config.expert_layer_offset >= config.expert_layer_period:
        raise file.refusal("expert_layer_offset", f"it must be below expert_layer_period, {config.expert_layer_period}")
    if config.num_experts > 1 and config.num_experts_per_tok > config.num_experts:
        raise file.refusal("num_experts_per_tok", f"there are {config.num_experts} experts (num_experts)")
    if not config.attention_layers or not config.mamba_layers:
        kind = "Mamba" if config.attention_layers else "attention"
        raise file.refusal(
            "attn_layer_period",
            f"attn_layer_offset {config.attn_layer_offset} and num_hidden_layers {config.num_hidden_layers} "
            f"leave it no {kind} layer, and this server only runs models with both kinds of layer",
        )
