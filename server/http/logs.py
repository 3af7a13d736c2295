"""Writes the throughput and the load of the engine to the log. While requests run or wait, it writes a line every 10
seconds."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from jamba_server.engine.process.client import Engine
from jamba_server.engine.types import EngineStats
from jamba_server.server.http.metrics import Metrics

logger = logging.getLogger(__name__)

STATS_INTERVAL_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The token counts and the engine's statistics at one moment. The throughput is computed from two snapshots."""

    prompt_tokens: int
    generation_tokens: int
    stats: EngineStats

    @classmethod
    def take(cls, metrics: Metrics, engine: Engine) -> Snapshot:
        return cls(metrics.prompt_tokens, metrics.generation_tokens, engine.stats)


def describe_interval(before: Snapshot, after: Snapshot, seconds: float) -> str | None:
    """Returns the log line for the time between two snapshots.

    Returns None if no tokens were processed in this time and no requests run or wait. The argument `seconds` is the
    length of this time.
    """
    prompt_tokens = after.prompt_tokens - before.prompt_tokens
    generation_tokens = after.generation_tokens - before.generation_tokens
    now = after.stats
    if not (prompt_tokens or generation_tokens or now.num_running or now.num_waiting):
        return None
    queries = now.prefix_queries_total - before.stats.prefix_queries_total
    hits = now.prefix_hits_total - before.stats.prefix_hits_total
    return (
        f"prompt {prompt_tokens / seconds:.1f} tok/s, generation {generation_tokens / seconds:.1f} tok/s, "
        f"running {now.num_running}, waiting {now.num_waiting}, "
        f"KV cache {now.kv_blocks_used / now.kv_blocks_capacity:.1%}, "
        f"state slots {now.state_slots_used}/{now.state_slots_capacity}, "
        f"prefix cache hits {f'{hits / queries:.1%}' if queries else '-'}"
    )


async def log_stats(metrics: Metrics, engine: Engine, *, interval: float = STATS_INTERVAL_SECONDS) -> None:
    """Writes a line to the log every `interval` seconds, except after an interval in which the server was idle.

    Runs until its task is cancelled.
    """
    loop = asyncio.get_running_loop()
    before, since = Snapshot.take(metrics, engine), loop.time()
    while True:
        await asyncio.sleep(interval)
        after, now = Snapshot.take(metrics, engine), loop.time()
        if line := describe_interval(before, after, now - since):
            logger.info("%s", line)
        before, since = after, now
