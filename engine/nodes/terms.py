"""What all nodes of an engine must have in common: options, versions and the model.

Node 0 compares its terms with those of every node that joins, and refuses a node whose terms differ.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgspec
import xxhash

import jamba_server
from jamba_server.engine.checkpoint import TOKENIZER_FILE, Folder, open_checkpoint
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.weight_files import weight_files

# These options may differ between nodes. The paths of the model and the tokenizer must lead to the same contents.
OWN_OPTIONS: Final = ("model", "tokenizer", "threads", "numa", "cpu_memory_bytes", "gpu_memory_utilization")
# Of each file of the model, _SAMPLE_BYTES bytes at every multiple of _SAMPLE_STRIDE are compared. A comparison of all
# bytes would take as long as loading the whole model, of which a node reads only a part.
_SAMPLE_BYTES: Final = 1 << 16
_SAMPLE_STRIDE: Final = 4 << 20


class Terms(msgspec.Struct, frozen=True):
    """`versions` has the version of each package, and a hash of this project's source. `options` has the options by
    name. `files` has a hash of each file of the model by name."""

    nnodes: int
    versions: dict[str, str]
    options: dict[str, Any]
    files: dict[str, str]


def terms_of(config: EngineConfig) -> Terms:
    """Returns the terms of a node. It reads parts of the model's files. Raises CheckpointError if they cannot be
    read."""
    options = msgspec.to_builtins(config)
    return Terms(
        nnodes=config.nnodes,
        versions={"jamba-server": _version("jamba-server"), "torch": _version("torch"), "source": _source_hash()},
        options={name: value for name, value in options.items() if name not in OWN_OPTIONS},
        files=_file_hashes(config),
    )


def difference(first: Terms, other: Terms, node: int) -> str | None:
    """Returns a sentence on the first difference between the terms of node 0 and those of another node, or None if
    there is none."""
    if first.nnodes != other.nnodes:
        return f"nnodes is {other.nnodes} on node {node}, but {first.nnodes} on node 0; they must be the same."
    if name := _differing(first.versions, other.versions):
        theirs, ours = other.versions.get(name), first.versions.get(name)
        if name == "source":
            return f"the source code of jamba-server on node {node} differs from that on node 0."
        return f"the version of {name} is {theirs} on node {node}, but {ours} on node 0; they must be the same."
    if name := _differing(first.options, other.options):
        theirs, ours = other.options.get(name), first.options.get(name)
        return f"{name} is {theirs!r} on node {node}, but {ours!r} on node 0; they must be the same."
    if name := _differing(first.files, other.files):
        if name not in other.files or name not in first.files:
            has, lacks = (node, 0) if name in other.files else (0, node)
            return f"the model of node {has} has a file {name}, but that of node {lacks} has none."
        return f"the model's file {name} on node {node} differs from that on node 0."
    return None


def own_options(config: EngineConfig) -> dict[str, Any]:
    """Returns the options that a node's ranks have from their own node instead of node 0."""
    return {name: getattr(config, name) for name in OWN_OPTIONS}


def _differing(first: dict[str, Any], other: dict[str, Any]) -> str | None:
    names = [*first, *(name for name in other if name not in first)]
    return next((name for name in names if first.get(name) != other.get(name)), None)


def _file_hashes(config: EngineConfig) -> dict[str, str]:
    path = Path(config.model)
    files = [path]
    if isinstance(open_checkpoint(path), Folder):
        files = [path / "config.json", path / TOKENIZER_FILE]
        files += [] if config.load_format == "dummy" else weight_files(path)
    if config.tokenizer is not None:
        files = [Path(config.tokenizer) / TOKENIZER_FILE, *(file for file in files if file.name != TOKENIZER_FILE)]
    try:
        return {file.name: _sampled_hash(file) for file in files if file.exists()}
    except OSError as error:
        raise CheckpointError(f"{error.filename or path} cannot be read: {error.strerror}.") from error


def _sampled_hash(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        found = xxhash.xxh3_128(str(size).encode())
        for offset in range(0, size, _SAMPLE_STRIDE):
            found.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))
    return found.hexdigest()


def _source_hash() -> str:
    """Returns a hash of the Python files of the engine and the kernels."""
    found = sha256()
    for path in sorted(_source_files(Path(jamba_server.__file__).parent)):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def _source_files(package: Path) -> Iterator[Path]:
    for part in ("engine", "kernels"):
        for folder, _, names in os.walk(package / part):
            yield from (Path(folder) / name for name in names if name.endswith(".py"))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
