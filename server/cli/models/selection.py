"""Decides which files of a model on the hub a server needs, and says why the others are not downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Final

from jamba_server.engine.errors import CheckpointError
from jamba_server.server.cli.checkpoint import PATTERNS
from jamba_server.server.cli.download import HubFile
from jamba_server.server.cli.gguf_choice import NoSuchFile, choose

# Maps suffixes of files to the reason for which files with this suffix are not downloaded.
_REASONS: Final = {
    (".bin", ".pt", ".pth", ".ckpt", ".pkl"): "weights as pickle, which could run code; safetensors files are loaded",
    (".onnx", ".h5", ".msgpack", ".tflite", ".mlmodel", ".ot", ".nemo"): "weights for another runtime",
    (".py",): "code, which this server never runs",
    (".model",): "another form of the tokenizer; tokenizer.json is read",
}
_NOT_READ: Final = "not read by the server"


@dataclass(frozen=True, slots=True)
class Selection:
    """The files that are downloaded, and those that are not, each with the reason."""

    wanted: Sequence[HubFile]
    left_out: Sequence[tuple[HubFile, str]]

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.wanted)


def select(name: str, files: Iterable[HubFile], quantization: str | None) -> Selection:
    """Chooses among the files of the hub id `name`. If `quantization` is not None, the model is the GGUF file with this
    quantisation, as `gguf_choice.choose` explains. Raises CheckpointError if the files have no model that can be
    loaded."""
    files = sorted(files, key=lambda file: file.path)
    paths = [file.path for file in files if "/" not in file.path]
    gguf = [path for path in paths if path.endswith(".gguf")]
    if quantization is None:
        chosen = {path for path in paths if any(fnmatchcase(path, pattern) for pattern in PATTERNS)}
        if not any(path.endswith(".safetensors") for path in chosen):
            raise CheckpointError(f"{name} cannot be used: {_no_weights(name, gguf, files)}")
    else:
        try:
            chosen = set(choose(gguf, quantization)[0])
        except NoSuchFile as error:
            raise CheckpointError(f"{name} cannot be used: {error}.") from None
    wanted = [file for file in files if file.path in chosen]
    left_out = [(file, _reason(file.path, quantization)) for file in files if file.path not in chosen]
    return Selection(wanted, left_out)


def _no_weights(name: str, gguf: list[str], files: list[HubFile]) -> str:
    if gguf:
        return f"it has no safetensors files, but {len(gguf)} of GGUF; write {name}:Q4_K_M, or another quantisation."
    pickles = [file.path for file in files if PurePosixPath(file.path).suffix in (".bin", ".pt", ".pth")]
    beside = f"; {pickles[0]} would have to be converted with transformers first" if pickles else ""
    return f"it has no safetensors files{beside}."


def _reason(path: str, quantization: str | None) -> str:
    if "/" in path:
        return "in a subfolder"
    suffix = PurePosixPath(path).suffix.lower()
    if suffix == ".gguf":
        return "GGUF; named by its quantisation after a colon" if quantization is None else "another quantisation"
    if quantization is not None and any(fnmatchcase(path, pattern) for pattern in PATTERNS):
        return "in the GGUF file already"
    return next((reason for suffixes, reason in _REASONS.items() if suffix in suffixes), _NOT_READ)
