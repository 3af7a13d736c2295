"""Checks whether a path is a checkpoint folder in Hugging Face format. For other paths, such as GGUF files, the error
text tells the user what the path is and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Final

from jamba_server.engine.errors import CheckpointError, shown
from jamba_server.engine.files import read_object
from jamba_server.engine.quantization.methods import METHOD_FILES, refuse_file

_WANTED: Final = "a checkpoint folder in Hugging Face format (config.json, tokenizer.json, *.safetensors)"
_GGUF: Final = "a GGUF file; give the path of the file instead of the folder"
_GGML: Final = f"a file of an old version of llama.cpp, which this server does not read; give {_WANTED}"
_EXPORT: Final = f"an export for another runtime, which this server does not read; give {_WANTED}"
_PICKLE: Final = "not a safetensors file; load it with transformers and write a folder with save_pretrained"
_ARCHIVE: Final = "an archive; unpack it and give the folder"
# Maps the suffix of a file to the part of the error text that says what the file is and what to do.
_SUFFIXES: Final[Mapping[str, str]] = {
    ".gguf": _GGUF,
    ".ggml": _GGML,
    ".onnx": _EXPORT,
    ".tflite": _EXPORT,
    ".mlpackage": _EXPORT,
    ".nemo": _EXPORT,
    ".safetensors": "a file of weights; give the folder that it is in, with its config.json and tokenizer.json",
    ".bin": _PICKLE,
    ".pt": _PICKLE,
    ".pth": _PICKLE,
    ".ckpt": _PICKLE,
    ".h5": _PICKLE,
    ".msgpack": _PICKLE,
    ".zip": _ARCHIVE,
    ".tar": _ARCHIVE,
    ".gz": _ARCHIVE,
    ".zst": _ARCHIVE,
    ".json": "one file of a checkpoint; give the folder that it is in",
}
_CONFIG, _ADAPTER = "config.json", "adapter_config.json"
_ENTRIES: Final = 1000  # at most this many entries of a folder are examined, because a folder may have millions
_NAMES_SHOWN: Final = 3


def names_a_file(name: str) -> bool:
    """Returns whether `name` has one of the suffixes in `_SUFFIXES`. A name with such a suffix, for example `x/y.gguf`,
    is taken for a file, although the id of a model on the Hugging Face hub may end in the same way."""
    return Path(name).suffix.lower() in _SUFFIXES


def refuse_foreign(path: Path) -> None:
    """Raises CheckpointError if `path` is not a checkpoint folder in Hugging Face format. The error says what the user
    should do."""
    try:
        if not path.is_dir():
            raise _no_folder(path)
        if reason := _foreign_folder(path):
            raise CheckpointError(f"{path} {reason}.")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if files := [path / name for name in METHOD_FILES if (path / name).is_file()]:
        # The import is made only here, because the imported module loads numpy.
        from jamba_server.engine.prequantized.table import is_known

        if not is_known(path):
            raise refuse_file(files[0])


def _no_folder(path: Path) -> CheckpointError:
    what = _SUFFIXES.get(path.suffix.lower())
    if not path.exists():
        beside = "" if what is None else f"; by its name it would be {what}"
        return CheckpointError(f"There is no folder or file {path}{beside}.")
    return CheckpointError(f"{path} is {what or f'not a folder; give {_WANTED}'}.")


def _foreign_folder(folder: Path) -> str | None:
    """Returns None if a folder is a checkpoint. Otherwise returns the error text, which says what the folder is and
    what the user should do."""
    if (folder / _ADAPTER).is_file():
        return _adapter(folder)
    if (folder / _CONFIG).exists():
        return None
    entries = sorted(islice(folder.iterdir(), _ENTRIES))
    if not entries:
        return f"is empty; give {_WANTED}"
    if models := [entry for entry in entries if (entry / _CONFIG).is_file()]:
        names = ", ".join(str(model) for model in models[:_NAMES_SHOWN])
        more = f" or one of {len(models) - _NAMES_SHOWN} more" if len(models) > _NAMES_SHOWN else ""
        return f"has no config.json itself, but folders in it have one; give {names}{more}"
    # the folder of a model in huggingface_hub's cache has this layout
    if snapshots := sorted(folder.glob(f"snapshots/*/{_CONFIG}")):
        return f"is an entry of a hub cache; give the hub id, or {snapshots[-1].parent}"
    for suffix, what in _SUFFIXES.items():
        if suffix not in (".safetensors", ".json") and (found := [e.name for e in entries if e.suffix == suffix]):
            return f"has no config.json; {found[0]} in it is {what}"
    return f"has no config.json, so it is not {_WANTED}; if its download was interrupted, finish it"


def _adapter(folder: Path) -> str:
    """Returns the error text for a folder with a LoRA adapter, with or without a model in the same folder. transformers
    would apply the adapter to that model; this server does not."""
    base = (read_object(folder / _ADAPTER) or {}).get("base_model_name_or_path")
    of_base = f" of {shown(base)}" if isinstance(base, str) else ""
    merge = "merge it into its base model (PEFT: merge_and_unload, then save_pretrained) and serve that folder"
    if (folder / _CONFIG).exists():
        return (
            f"has a LoRA adapter{of_base} beside the model ({_ADAPTER}), which this server would not apply: {merge}, "
            "or remove the adapter's files"
        )
    return f"is a LoRA adapter{of_base} ({_ADAPTER}), which is not a model by itself: {merge}"
