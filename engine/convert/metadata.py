"""Makes the metadata of a GGUF file from a model's configuration and the documents of its checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from jamba_server.engine.checkpoint import MAX_TOKENIZER_BYTES, TOKENIZER_FILE, Checkpoint, read_object, read_text
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.files import parse_object
from jamba_server.engine.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED
from jamba_server.engine.model_config import JambaConfig

# Maps the types that a file can have to the number that llama.cpp uses for the key general.file_type.
FILE_TYPES: Final[Mapping[str, int]] = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}
_BYTE_NAME: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# The score of a piece that no merge makes. It is lower than every score that a merge gives.
_NEVER: Final = -1e6


def make_metadata(config: JambaConfig, checkpoint: Checkpoint, kind: str, name: str) -> dict[str, Any]:
    """Returns the metadata for a file of the type `kind`, with the model's name. Raises CheckpointError if the model
    has no tokenizer that a GGUF file can hold."""
    layers = range(config.num_hidden_layers)
    kv_heads = [config.num_key_value_heads if config.is_attention(i) else 0 for i in layers]
    metadata: dict[str, Any] = {
        "general.architecture": "jamba",
        "general.name": name,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        "jamba.block_count": config.num_hidden_layers,
        "jamba.context_length": config.max_position_embeddings,
        "jamba.embedding_length": config.hidden_size,
        "jamba.feed_forward_length": config.intermediate_size,
        "jamba.attention.head_count": config.num_attention_heads,
        "jamba.attention.head_count_kv": kv_heads,
        "jamba.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "jamba.ssm.conv_kernel": config.mamba_d_conv,
        "jamba.ssm.inner_size": config.d_inner,
        "jamba.ssm.state_size": config.mamba_d_state,
        "jamba.ssm.time_step_rank": config.mamba_dt_rank,
        "jamba.expert_count": config.num_experts if config.num_experts > 1 else 0,
        "jamba.expert_used_count": config.num_experts_per_tok if config.num_experts > 1 else 0,
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        metadata |= {f"jamba.attention.{name}_length": config.head_dim for name in ("key", "value")}
    return metadata | _vocabulary(config, checkpoint)


def _vocabulary(config: JambaConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    where = checkpoint.where(TOKENIZER_FILE)
    data = checkpoint.document(TOKENIZER_FILE, MAX_TOKENIZER_BYTES)
    if data is None:
        raise CheckpointError(f"{checkpoint.path} has no {TOKENIZER_FILE}, which a GGUF file must have.")
    tokenizer = parse_object(where, data)
    try:
        model, added = tokenizer["model"], {token["id"]: token for token in tokenizer.get("added_tokens") or []}
        if model["type"] != "BPE" or not model.get("byte_fallback"):
            raise CheckpointError(f"{where} is no byte-pair vocabulary with byte fallback, the only kind converted.")
        ids: dict[str, int] = {**model["vocab"], **{token["content"]: id for id, token in added.items()}}
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        made = [ids["".join(merge)] for merge in merges]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is not a tokenizer that can be converted: {error!r}.") from error
    if (highest := max(ids.values(), default=-1)) >= config.vocab_size:
        raise CheckpointError(f"{where} has the token id {highest}; the model has {config.vocab_size} tokens.")
    pieces = [f"[PAD{id}]" for id in range(config.vocab_size)]
    types, scores = [UNUSED] * len(pieces), [_NEVER] * len(pieces)
    for piece, id in ids.items():
        pieces[id], types[id] = piece, BYTE if _BYTE_NAME.fullmatch(piece) else NORMAL
    for id, token in added.items():
        types[id] = CONTROL if token.get("special") else USER_DEFINED
    for rank, id in reversed(list(enumerate(made))):  # the first merge of a piece comes last and stays
        scores[id] = -float(rank)
    names = read_object(checkpoint, "tokenizer_config.json") or {}
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": tokenizer.get("post_processor") is not None,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": '"Prepend"' in json.dumps(tokenizer.get("normalizer")),
    }
    metadata |= _special_ids(config, names, ids)
    template = read_text(checkpoint, "chat_template.jinja") or names.get("chat_template")
    return metadata | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def _special_ids(config: JambaConfig, names: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    def named(key: str, default: int | None) -> int | None:
        value = names.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        return ids.get(content, default) if isinstance(content, str) else default

    stops = config.eos_token_ids
    eos = named("eos_token", stops[0] if stops else None)
    others = [id for id in stops if id != eos]
    found = {
        "bos": named("bos_token", config.bos_token_id),
        "eos": eos,
        "eot": others[0] if others else None,
        "unknown": named("unk_token", None),
        "padding": named("pad_token", config.pad_token_id),
    }
    return {f"tokenizer.ggml.{name}_token_id": id for name, id in found.items() if id is not None}
