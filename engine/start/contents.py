"""Reads the headers of the weight files in a checkpoint folder, and corrects the model's configuration where the
configuration contradicts the files. Works without torch, so that the command `jamba plan` does not need torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from jamba_server.engine.checkpoint import Folder, open_checkpoint
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.model_config import JambaConfig, load_model_config
from jamba_server.engine.quantization import QuantizationPolicy
from jamba_server.engine.quantization.blocks import StoredMatrix
from jamba_server.engine.start.machine import format_bytes
from jamba_server.engine.weight_files import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    files_in_index,
    header,
    names_in_index,
    weight_files,
)
from jamba_server.engine.weight_sizes import weight_matrices

EMBEDDING: Final = "model.embed_tokens.weight"
HEAD: Final = "lm_head.weight"
_CLASSIFIER_HEAD: Final = "score.weight"
_CLASSIFIER_BIAS: Final = "score.bias"


@dataclass(frozen=True, slots=True)
class StoredModel:
    """The configuration of a checkpoint, corrected by the contents of its weight files, and warnings to the user about
    these files."""

    config: JambaConfig
    warnings: tuple[str, ...] = ()


def read_model(folder: Path) -> StoredModel:
    """Reads the configuration and the headers of the weight files of the checkpoint at `folder`. Raises CheckpointError
    if a file is missing, incomplete or not in the expected format."""
    checkpoint = open_checkpoint(folder)
    if not isinstance(checkpoint, Folder):
        return StoredModel(load_model_config(folder))
    paths = weight_files(folder)
    tensors = {name: tensor for path in paths for name, tensor in header(path).items()}
    config, layout = load_model_config(folder), checkpoint.layout()
    warnings = [*_unread_files(folder), *_unused_tensors(config, tensors), *(layout.notes if layout else ())]
    tied = config.tie_word_embeddings and not config.is_classifier
    if tied and _has_own_head(tensors, config.stored):
        config = load_model_config(folder, own_head=True)
        warnings.append(
            f"config.json has tie_word_embeddings true, but {HEAD} differs from {EMBEDDING} in the files: the separate "
            "head is used, as in transformers; set tie_word_embeddings to false to hide this warning"
        )
    if config.is_classifier and _CLASSIFIER_BIAS in tensors:
        config = replace(config, score_bias=True)
    return StoredModel(config, tuple(warnings))


def _has_own_head(tensors: Mapping[str, StoredTensor], stored: Mapping[str, StoredMatrix]) -> bool:
    """Returns whether the files have a head that differs from the embedding. A head and an embedding that are quantised
    differ."""
    if HEAD in stored or EMBEDDING in stored:
        return HEAD in stored or HEAD in tensors
    return {EMBEDDING, HEAD} <= tensors.keys() and not tensors[HEAD].equals(tensors[EMBEDDING])


def read_plan(folder: Path) -> StoredModel:
    """Returns the same as `read_model`, but needs only config.json. If the weight files are missing or incomplete, the
    index file decides whether the model has a separate language model head."""
    config = load_model_config(folder)
    try:
        return read_model(folder)
    except CheckpointError:  # the weight files are absent, or replaced by Git LFS pointers
        names, warnings = names_in_index(folder), tuple[str, ...]()
    if config.tie_word_embeddings and not config.is_classifier and HEAD in names:
        config = load_model_config(folder, own_head=True)
        warnings = (
            f"config.json has tie_word_embeddings true, but {INDEX_FILE} names {HEAD}: it is counted as a separate "
            "head; loading leaves it out if it equals the embedding",
        )
    checkpoint = open_checkpoint(folder)
    stored = checkpoint.expected(weight_matrices(config), names) if isinstance(checkpoint, Folder) else {}
    if stored:
        warnings += ("the weight files are not here, so their formats are those that config.json lets expect",)
    return StoredModel(replace(config, stored=stored), warnings)


def conversions(config: JambaConfig, policy: QuantizationPolicy, dtype: str) -> tuple[str, ...]:
    """Returns a text that says which matrices are stored in blocks of integers but converted to `dtype` when they are
    loaded, and how much memory they take then. Returns no text if there are none."""
    if policy.quantization is not None:
        return ()
    entries = [entry for name, entry in config.stored.items() if name not in policy.blocks]
    if not entries:
        return ()
    kinds = ", ".join(f"{count} of type {kind}" for kind, count in sorted(Counter(e.kind for e in entries).items()))
    size = sum(entry.numbers for entry in entries) * (4 if dtype == "float32" else 2)
    return (
        f"{len(entries)} of {len(config.stored)} quantised matrices are converted to {dtype} ({kinds}): they take "
        f"{format_bytes(size)} of memory, and {format_bytes(sum(entry.num_bytes for entry in entries))} in the file",
    )


def _unread_files(folder: Path) -> list[str]:
    both = (folder / SINGLE_FILE).is_file() and (folder / INDEX_FILE).is_file()
    if both and files_in_index(folder) != {SINGLE_FILE}:  # mlx-lm writes an index for a single file, too
        return [f"the folder has both {SINGLE_FILE}, which is loaded, and {INDEX_FILE}, which is ignored"]
    return []


def _unused_tensors(config: JambaConfig, tensors: Mapping[str, StoredTensor]) -> list[str]:
    unused = HEAD if config.is_classifier else _CLASSIFIER_HEAD
    if unused in tensors:
        return [f"tensor {unused} is in the files, but {config.architecture} (config.json) does not use it"]
    return []
