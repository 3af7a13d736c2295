"""Translates the metadata of a GGUF file to the keys of a config.json in Hugging Face format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.gguf.names import EMBEDDING, HEAD, in_layer
from jamba_server.engine.gguf.reader import GgufFile, value_shown
from jamba_server.engine.gguf.vocabulary import Vocabulary

ARCHITECTURE: Final = "jamba"
_MAX_LAYERS: Final = 1024
_SLICE: Final = 4 << 20  # two tensors are compared in pieces of this many bytes


def read_settings(file: GgufFile, vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns the keys of a config.json. The values are as the file has them; the reader of config.json checks their
    ranges. Raises CheckpointError if a value is missing or has a wrong type, or if this server cannot run the model."""
    reader = _Metadata(file)
    if (found := file.metadata.get("general.architecture")) != ARCHITECTURE:
        raise reader.refusal("general.architecture", f'this server runs "{ARCHITECTURE}" models only', found)
    hidden, inner = reader.integer("embedding_length"), reader.integer("ssm.inner_size")
    if hidden < 1:
        raise reader.refusal("embedding_length", "a whole number of at least 1 is expected", hidden)
    if inner % hidden:
        raise reader.refusal("ssm.inner_size", f"a multiple of embedding_length, {hidden}, is expected", inner)
    attention, experts = reader.attention_layers(), reader.expert_layers()
    settings: dict[str, Any] = {
        "model_type": "jamba",
        "architectures": ["JambaForCausalLM"],
        "dtype": _dtype(file),
        "vocab_size": _rows(file, EMBEDDING),
        "hidden_size": hidden,
        "intermediate_size": reader.integer("feed_forward_length"),
        "num_hidden_layers": reader.num_layers,
        "num_attention_heads": reader.integer("attention.head_count"),
        "num_key_value_heads": reader.key_value_heads(attention),
        "head_dim": reader.optional_integer("attention.key_length"),
        "num_experts": reader.integer("expert_count") if experts else 1,
        "num_experts_per_tok": reader.integer("expert_used_count") if experts else 1,
        "mamba_d_state": reader.integer("ssm.state_size"),
        "mamba_d_conv": reader.integer("ssm.conv_kernel"),
        "mamba_expand": inner // hidden,
        "mamba_dt_rank": reader.integer("ssm.time_step_rank"),
        "mamba_conv_bias": any(name.endswith(".ssm_conv1d.bias") for name in file.tensors),
        "rms_norm_eps": reader.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": _is_tied(file),
        "max_position_embeddings": reader.integer("context_length"),
        "bos_token_id": vocabulary.bos,
        "eos_token_id": list(vocabulary.stops),
        "pad_token_id": vocabulary.pad,
    }
    settings |= reader.schedule("attn_layer", attention, "attention")
    return settings | (reader.schedule("expert_layer", experts, "expert") if experts else {})


class _Metadata:
    """Reads the values under the prefix of the architecture. Every error names the file, the key and the value."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.num_layers = self.integer("block_count")
        if not 0 < self.num_layers <= _MAX_LAYERS:
            raise self.refusal("block_count", f"1 to {_MAX_LAYERS} layers are expected", self.num_layers)

    def refusal(self, key: str, rule: str, value: Any) -> CheckpointError:
        name = key if key.startswith("general.") else f"{ARCHITECTURE}.{key}"
        return CheckpointError(f"{self._file.path}: {name} is {value_shown(value)}; {rule}.")

    def integer(self, key: str) -> int:
        if (value := self.optional_integer(key)) is None:
            raise self.refusal(key, "a whole number is expected", value)
        return value

    def optional_integer(self, key: str) -> int | None:
        value = self._file.metadata.get(f"{ARCHITECTURE}.{key}")
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self.refusal(key, "a whole number is expected", value)
        return value

    def number(self, key: str) -> float:
        value = self._file.metadata.get(f"{ARCHITECTURE}.{key}")
        if not isinstance(value, float):
            raise self.refusal(key, "a number is expected", value)
        # A GGUF file has this number in float32. Its decimal form with seven digits is the number in config.json.
        return float(f"{value:.7g}")

    def attention_layers(self) -> list[int]:
        """Returns the numbers of the layers that have attention tensors. The array head_count_kv must say the same."""
        key = "attention.head_count_kv"
        layers = [i for i in range(self.num_layers) if in_layer(i, "attn_q.weight") in self._file.tensors]
        counts = self._file.metadata.get(f"{ARCHITECTURE}.{key}")
        if isinstance(counts, np.ndarray):
            if len(counts) != self.num_layers or counts.dtype.kind not in "iu":
                raise self.refusal(key, f"a whole number for each of {self.num_layers} layers is expected", counts)
            if (named := np.flatnonzero(counts).tolist()) != layers:
                raise self.refusal(
                    key, f"it says attention in layers {_few(named)}, the tensors {_few(layers)}", counts
                )
        return layers

    def key_value_heads(self, layers: Sequence[int]) -> int:
        """Returns the number of KV heads, which is the same in all attention layers."""
        key = "attention.head_count_kv"
        counts = self._file.metadata.get(f"{ARCHITECTURE}.{key}")
        if not isinstance(counts, np.ndarray):
            return self.integer(key)
        heads = {int(counts[layer]) for layer in layers}
        if len(heads) != 1:
            raise self.refusal(key, f"one number of heads is expected, not {_few(sorted(heads))}", counts)
        return heads.pop()

    def expert_layers(self) -> list[int]:
        return [i for i in range(self.num_layers) if in_layer(i, "ffn_gate_inp.weight") in self._file.tensors]

    def schedule(self, name: str, layers: Sequence[int], what: str) -> dict[str, int]:
        """Returns the period and the offset of the layers in `layers`, as config.json has them. A single layer has the
        number of all layers as its period."""
        if not layers:
            raise CheckpointError(f"{self._file.path} has no {what} layer, so it is no model that this server runs.")
        period = layers[1] - layers[0] if len(layers) > 1 else self.num_layers
        offset = layers[0] % period
        if list(layers) != list(range(offset, self.num_layers, period)):
            raise CheckpointError(
                f"{self._file.path} has {what} layers {_few(layers)} of {self.num_layers}; this server runs models "
                "whose layers repeat at a fixed distance."
            )
        return {f"{name}_period": period, f"{name}_offset": offset}


def _few(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} and {len(numbers) - 8} more" if len(numbers) > 8 else shown or "none"


def _rows(file: GgufFile, name: str) -> int:
    if (tensor := file.tensors.get(name)) is None or len(tensor.shape) != 2:
        raise CheckpointError(f"{file.path} has no matrix {name}, which every model has.")
    return tensor.shape[0]


def _dtype(file: GgufFile) -> str:
    """Returns the dtype in which the model runs if the user names none: that of the matrices if they are plain
    numbers, else bfloat16. Norms and the Mamba parameters are float32 in every file and do not count."""
    kinds = {tensor.kind.name for tensor in file.tensors.values() if len(tensor.shape) > 1 and _is_matrix(tensor.name)}
    if kinds == {"F16"}:
        return "float16"
    return "float32" if kinds == {"F32"} else "bfloat16"


def _is_matrix(name: str) -> bool:
    """Returns whether a tensor is one of the matrices whose type converters choose. Converters keep the convolution,
    the router and A in float32."""
    return not name.endswith((".ssm_conv1d.weight", ".ssm_a", ".ffn_gate_inp.weight"))


def _is_tied(file: GgufFile) -> bool:
    """Returns whether the head is the embedding: the file has no head, or one with the same bytes."""
    if (head := file.tensors.get(HEAD)) is None:
        return True
    embedding = file.tensors[EMBEDDING]
    if (head.kind, head.shape) != (embedding.kind, embedding.shape):
        return False
    parts = ((start, min(_SLICE, head.num_bytes - start)) for start in range(0, head.num_bytes, _SLICE))
    return all(np.array_equal(head.read(*part), embedding.read(*part)) for part in parts)
