"""The fingerprint of a model and its configuration: two engines with the same fingerprint compute the same bits.

The prefix cache's disk tier stores what one engine has computed for later ones, so it must know whether they agree. The
weights are hashed by a thread while they load. The disk tier opens when the thread has finished.
"""

from __future__ import annotations

import json
import platform
import threading
from collections.abc import Iterable, Mapping
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

from jamba_server.engine.cache.layout import CacheLayout
from jamba_server.engine.checkpoint import Folder, open_checkpoint, read_text
from jamba_server.engine.config import EngineConfig
from jamba_server.engine.disk_tier.worker import give_way
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.weight_files import weight_files
from jamba_server.kernels.cpu.library import library
from jamba_server.kernels.ops import Kernels, KernelUnavailable

_CHUNK: Final = 1 << 24


class WeightHash:
    """Hashes the weights of a checkpoint in a thread. XXH3 is used because it is faster than a disk; it tells apart
    files that differ by accident or by training, not files that somebody has made to collide."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._digest = ""
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="weight hash", daemon=True)
        self._thread.start()

    def digest(self) -> str:
        """Waits for the thread and returns the hash as a hexadecimal text. Raises OSError."""
        self._thread.join()
        if self._error is not None:
            raise OSError(f"the weights cannot be hashed: {self._error}") from self._error
        return self._digest

    def _run(self) -> None:
        give_way()
        try:
            self._digest = weight_hash(self._config)
        except (OSError, CheckpointError) as error:
            self._error = error


def weight_hash(config: EngineConfig) -> str:
    """Returns a hash of the weights and of config.json. Raises OSError or CheckpointError."""
    path = Path(config.model)
    checkpoint = open_checkpoint(path)
    found = xxhash.xxh3_128((read_text(checkpoint, "config.json") or "").encode())
    if config.load_format == "dummy":
        found.update(f"dummy weights of seed {config.seed}".encode())
        return found.hexdigest()
    files = weight_files(path) if isinstance(checkpoint, Folder) else [path]
    for part in _chunks(sorted(files)):
        found.update(part)
    return found.hexdigest()


def _chunks(files: Iterable[Path]) -> Iterable[bytes | memoryview]:
    buffer = memoryview(bytearray(_CHUNK))
    for path in files:
        yield f"{path.name} {path.stat().st_size} ".encode()
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]


def fingerprint(
    weights: str,
    config: EngineConfig,
    device: torch.device,
    kernels: Kernels,
    layout: CacheLayout,
    choices: Mapping[str, Any],
) -> str:
    """Returns the fingerprint as a hexadecimal text. `weights` is the hash of the weights. `choices` has what the
    engine chose where `config` leaves it open: dtype, formats of the weights and activations.

    Versions of this package and of torch are part of it, because another version may add numbers in another order. So
    is the instruction set, on which sums of bfloat16 products depend. The number of threads and the batch are not:
    batch-invariant kernels give the same bits for all of them.
    """
    parts: dict[str, Any] = {
        "weights": weights,
        "choices": dict(choices),
        "layout": [layout.block_size, *(sorted(map(str, layer.page.items())) for layer in layout.layers)],
        "state": [sorted(map(str, layer.slot.items())) for layer in layout.layers],
        "kernels": dict(sorted(kernels.names.items())),
        "batch_dependent": sorted(kernels.batch_dependent_ops),
        "requested_kernels": dict(sorted(config.kernels.items())),
        "processor": processor_of(device),
        "versions": [_version("jamba-server"), torch.__version__],
    }
    return sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def processor_of(device: torch.device) -> list[str]:
    """Returns what the bits of the kernels depend on: the instruction sets in use and the compiled library, or the kind
    of GPU."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device)]
    names = [platform.machine(), torch.backends.cpu.get_cpu_capability()]
    try:
        native = library()
    except KernelUnavailable:
        return names
    return [*names, native.level(), sha256(native.path.read_bytes()).hexdigest()]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
