"""The folder of the engine's disk tier, as the HTTP process sees it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import anyio
import anyio.to_thread

from jamba_server.engine.cache.layout import Kept
from jamba_server.engine.cache.tiers.segment import SegmentLayout
from jamba_server.engine.disk_tier.folder import SegmentFolder
from jamba_server.engine.disk_tier.format import Header
from jamba_server.engine.process.client import Engine
from jamba_server.server.config import ServerConfig

CHUNK_BYTES = 256 * 1024
# How long an export waits for segments that are not on the disk yet, and an import until the engine has found them.
PATIENCE_SECONDS = 3.0
_POLLS = 150


def open_folder(config: ServerConfig, engine: Engine) -> SegmentFolder | None:
    """Returns the folder that the engine has opened, or None. Blocks, and raises OSError."""
    tiers, info = engine.stats.tiers, engine.info
    if config.state_cache_disk_path is None or tiers is None or not tiers.fingerprint:
        return None
    layout = SegmentLayout(
        block_size=info.block_size,
        page={name: _kept(*kept) for name, kept in info.segment_page.items()},
        state={name: _kept(*kept) for name, kept in info.segment_state.items()},
    )
    folder = SegmentFolder(
        Path(config.state_cache_disk_path), tiers.fingerprint, layout, int(config.state_cache_disk_bytes)
    )
    folder.open()
    return folder


def _kept(shape: tuple[int, ...], dtype: str) -> Kept:
    return Kept(tuple(shape), dtype)  # pyright: ignore[reportArgumentType]  # the engine has sent one of its own dtypes


def found_segments(engine: Engine) -> int:
    """Returns how many files the engine has found that it has not written itself."""
    return 0 if engine.stats.tiers is None else engine.stats.tiers.found_segments_total


async def until_found(engine: Engine, number: int) -> None:
    """Waits until the engine has found `number` files, for at most PATIENCE_SECONDS seconds. If that is not enough, it
    finds the files later."""
    await _until(lambda: found_segments(engine) >= number)


async def until_written(engine: Engine) -> None:
    """Waits until the engine has written all segments, for at most PATIENCE_SECONDS seconds."""
    await _until(lambda: engine.stats.tiers is None or not engine.stats.tiers.staged_bytes)


async def _until(done: Callable[[], bool]) -> None:
    for _ in range(_POLLS):
        if done():
            return
        await anyio.sleep(PATIENCE_SECONDS / _POLLS)


async def contents_of(folder: SegmentFolder, headers: Sequence[Header]) -> AsyncGenerator[bytes]:
    """Yields the files of segments. Raises OSError if one of them was deleted meanwhile."""
    for header in headers:
        path = folder.path_of(header.entry.key)
        file: BinaryIO = await anyio.to_thread.run_sync(path.open, "rb")  # pyright: ignore[reportAssignmentType]
        with file:
            while chunk := await anyio.to_thread.run_sync(file.read, CHUNK_BYTES):
                yield chunk
