"""The folder of the engine's disk tier, which is opened once."""

from __future__ import annotations

import asyncio

import anyio.to_thread

from jamba_server.engine.disk_tier.folder import SegmentFolder
from jamba_server.engine.process.client import Engine
from jamba_server.server.config import ServerConfig
from jamba_server.server.http.session_files.disk import open_folder


class TierFolder:
    """Opens the folder after the engine has opened it. The engine opens it when the weights are hashed, because the
    folder is named after the fingerprint of the model, which depends on this hash."""

    def __init__(self, config: ServerConfig, engine: Engine) -> None:
        self._config, self._engine = config, engine
        self._folder: SegmentFolder | None = None
        self._opening = asyncio.Lock()

    async def open(self) -> SegmentFolder | None:
        """Returns the folder, or None if the engine has not opened it yet. Raises OSError."""
        if self._folder is None:
            async with self._opening:
                if self._folder is None:
                    self._folder = await anyio.to_thread.run_sync(open_folder, self._config, self._engine)
        return self._folder
