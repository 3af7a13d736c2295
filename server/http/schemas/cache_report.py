"""The object `jamba_cache` of replies, which explains what the prefix cache had for a prompt."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jamba_server.engine.types import CacheReport, CacheTier, MissReason
from jamba_server.server.http.schemas.base import Reply


class JambaCache(Reply):
    """What the prefix cache had for the prompt when the request was started. All numbers but `restore_ms` are numbers
    of prompt tokens."""

    kv_tokens: Annotated[int, Field(description="Tokens whose keys and values were cached.")]
    state_tokens: Annotated[int, Field(description="Tokens before the last saved state of this prefix.")]
    used_tokens: Annotated[int, Field(description="Tokens that were not computed again.")]
    tier: Annotated[CacheTier | None, Field(description="Where the state was stored. null if no token was used.")]
    restore_ms: Annotated[
        float, Field(description="Time to bring the prefix from its tier, and to copy its state, in milliseconds.")
    ]
    reason: Annotated[MissReason, Field(description="Why no more tokens were used.")]
    missed_tokens: Annotated[
        dict[MissReason, int], Field(description="Tokens computed again that are or were in the cache, by reason.")
    ]
    differs_at_message: Annotated[
        int | None,
        Field(
            description="The first message, counted from 0, that differs from the longest cached text. null if the "
            "prompt continues this text, or has no messages."
        ),
    ]
    waited: Annotated[
        bool, Field(description="Whether the request waited until another one had computed the common prefix.")
    ]
    pinned_tokens: Annotated[
        int | None, Field(description="Tokens that `cache.pin` protects now. null if the request pins nothing.")
    ]


def jamba_cache(report: CacheReport, message_starts: tuple[int, ...], num_pinned: int | None) -> JambaCache:
    """Returns the object for a reply. `message_starts` are the positions in the prompt, in tokens, at which the
    messages begin."""
    differs = None
    if message_starts and report.differs:
        differs = max(sum(start <= report.kv_tokens for start in message_starts) - 1, 0)
    return JambaCache(
        kv_tokens=report.kv_tokens,
        state_tokens=report.state_tokens,
        used_tokens=report.used_tokens,
        tier=report.tier,
        restore_ms=1000 * report.restore_seconds,
        reason=report.reason,
        missed_tokens=report.missed,
        differs_at_message=differs,
        waited=report.waited,
        pinned_tokens=num_pinned,
    )
