"""Finds the models in the hub cache, and says of each whether this server can load it and whether it fits into the
memory of this machine. Nothing here needs the network or torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import CachedRepoInfo, CachedRevisionInfo, HFCacheInfo, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from jamba_server.engine.errors import CheckpointError, ConfigError
from jamba_server.engine.files import read_object
from jamba_server.engine.gguf.recognition import is_gguf
from jamba_server.engine.model_cache import wanted_layout
from jamba_server.engine.model_config import JambaConfig
from jamba_server.engine.start.contents import read_model, read_plan
from jamba_server.engine.start.memory_plan import plan_memory
from jamba_server.engine.weight_sizes import policy_of, weight_bytes
from jamba_server.server.cli.decode_limit import DTYPE_BYTES
from jamba_server.server.cli.gguf_choice import quantizations
from jamba_server.server.cli.plan import find_memory
from jamba_server.server.config import ServerConfig

_NAME_SHOWN = 60  # maximum number of characters that are shown of a name in a file of somebody else


@dataclass(frozen=True, slots=True)
class Machine:
    """The memory that a server with the options `config` may use: `available` bytes on `device`."""

    config: ServerConfig
    device: str
    available: int

    @classmethod
    def here(cls, config: ServerConfig) -> Machine:
        """Asks this machine how much memory is free. Raises ConfigError."""
        return cls(config, *find_memory(config.device, None, config.gpu_memory_utilization))


@dataclass(frozen=True, slots=True)
class Description:
    """What a model is. `fits` says whether a server with this model would start, as far as its files and the memory of
    the machine are concerned. `reason` is a sentence that says why not, or ""."""

    architecture: str
    quantization: str
    fits: Literal["yes", "no", "incomplete", "cannot be loaded"]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in the hub cache. `id` is what `jamba serve` takes, with the quantisation for a GGUF file. `refs` are the
    branches and tags that lead to the commit `revision`. `num_bytes` is the size of its files on the disk, some of
    which it may share with other revisions. `place` is its folder or GGUF file."""

    id: str
    revision: str
    refs: tuple[str, ...]
    num_bytes: int
    place: Path


def scan() -> HFCacheInfo | None:
    """Returns what the hub cache holds, or None if there is no cache yet. Raises ConfigError if it cannot be read."""
    try:
        return scan_cache_dir(Path(constants.HF_HUB_CACHE))
    except CacheNotFound:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"The hub cache {constants.HF_HUB_CACHE} cannot be read: {error}.") from None


def model_repositories(cache: HFCacheInfo | None) -> list[CachedRepoInfo]:
    """Returns the models of the cache in the order of their names, without data sets and the like."""
    repositories = [] if cache is None else [repo for repo in cache.repos if repo.repo_type == "model"]
    return sorted(repositories, key=lambda repo: repo.repo_id)


def models_of(repository: CachedRepoInfo) -> Iterator[CachedModel]:
    """Yields the models of a repository: one for each revision, and one for each quantisation of GGUF files."""
    for revision in sorted(repository.revisions, key=lambda revision: -revision.last_modified):
        refs = tuple(sorted(revision.refs))
        by_tag = gguf_files(revision)
        for tag, names in by_tag.items():
            size = sum(file.size_on_disk for file in revision.files if file.file_name in names)
            place = revision.snapshot_path / names[0]
            yield CachedModel(f"{repository.repo_id}:{tag}", revision.commit_hash, refs, size, place)
        if not by_tag or (revision.snapshot_path / "config.json").exists():
            place, size = revision.snapshot_path, revision.size_on_disk
            yield CachedModel(repository.repo_id, revision.commit_hash, refs, size, place)


def gguf_files(revision: CachedRevisionInfo) -> dict[str, list[str]]:
    """Maps each quantisation of the GGUF files of a revision to the names of its file, or of the pieces of its
    file."""
    return quantizations(path.name for path in revision.snapshot_path.glob("*.gguf"))


def describe(place: Path, machine: Machine) -> Description:
    """Reads the headers of a model's files. `place` is a folder or a GGUF file."""
    try:
        model = (read_model(place) if is_gguf(place) else read_plan(place)).config
    except CheckpointError as error:
        if place.is_dir() and not (place / "config.json").exists():
            return Description("-", "-", "incomplete", str(error))
        return Description(_architecture(place), "-", "cannot be loaded", str(error))
    form = _format(model)
    try:
        read_model(place)  # unlike `read_plan`, this needs all weight files
    except CheckpointError as error:
        return Description(model.architecture, form, "incomplete", str(error))
    try:
        check_memory(place, model, machine)
    except ConfigError as error:
        return Description(model.architecture, form, "no", str(error))
    return Description(model.architecture, form, "yes")


def _architecture(place: Path) -> str:
    """Returns the architecture of a model that this server cannot load, or "-" if its files do not tell."""
    try:
        values = read_object(place / "config.json") if place.is_dir() else None
    except CheckpointError:
        return "-"
    match (values or {}).get("architectures"):
        case [str(name), *_]:
            return name[:_NAME_SHOWN]
        case _:
            return "-"


def _format(model: JambaConfig) -> str:
    """Returns the number format of the weights: the quantisations, the one of the most matrices first, or the dtype."""
    if model.quantized_roles:
        return model.stored_format
    kinds = Counter(entry.kind for entry in model.stored.values())
    return ", ".join(kind for kind, _ in kinds.most_common()) or model.made_at_load or model.dtype


def check_memory(place: Path, model: JambaConfig, machine: Machine) -> None:
    """Raises ConfigError if the weights and one short sequence do not fit into the memory of the machine, or if an
    option does not fit to the model."""
    engine = machine.config.engine(place)
    policy = policy_of(engine, model)
    dtype = model.dtype if engine.dtype == "auto" else engine.dtype
    plan_memory(
        model,
        engine,
        wanted_layout(model, engine),
        weight_bytes=weight_bytes(model, DTYPE_BYTES[dtype], policy=policy),
        available_bytes=machine.available,
        device=machine.device,
    )
