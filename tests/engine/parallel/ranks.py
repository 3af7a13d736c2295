"""Runs the ranks of a model as threads of this process, each with its own gloo group."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from jamba_server.engine.parallel.group import Group
from jamba_server.engine.parallel.shards import Shard

T = TypeVar("T")
CPU = torch.device("cpu")
TIMEOUT = timedelta(seconds=60)  # a rank that has failed must not leave the others waiting for ever


def on_ranks(size: int, run: Callable[[Group], T], *, exact: bool = True) -> list[T]:
    """Calls `run` with the group of each of `size` ranks, all at the same time, and returns the results."""
    if size == 1:
        return [run(Group(Shard(exact=exact)))]
    store = HashStore()

    def one(rank: int) -> T:
        torch.set_num_threads(1)
        return run(Group.join(Shard(rank, size, exact), store, CPU, TIMEOUT))

    with ThreadPoolExecutor(size) as pool:
        return [future.result(timeout=120) for future in [pool.submit(one, rank) for rank in range(size)]]
