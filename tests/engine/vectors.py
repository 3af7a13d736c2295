"""Runs requests for vectors on an engine without a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from jamba_server.engine.types import Request, SamplingParams
from jamba_server.llm import LLM

NO_REPLY = SamplingParams(max_tokens=0)


def wanted(prompt: Sequence[int], **fields: Any) -> Request:
    """A request for a vector. `run` gives it an id."""
    return Request(id="", prompt=list(prompt), params=NO_REPLY, **fields)


def run(llm: LLM, requests: Sequence[Request]) -> list[bytes]:
    """The vectors of requests that are submitted together, and nothing left behind."""
    named = {f"v{number}": request for number, request in enumerate(requests)}
    llm.core.inbox.submit([msgspec.structs.replace(request, id=name) for name, request in named.items()])
    found: dict[str, bytes] = {}
    while len(found) < len(requests) or llm.core.has_work:
        for update in llm.core.step().updates:
            assert (update.finish_reason, update.token_ids) == ("length", [])
            assert update.vector is not None
            found[update.request_id] = update.vector
    stats = llm.core.scheduler.stats
    assert (stats.kv_blocks_used, stats.state_slots_used) == (0, 0)
    return [found[name] for name in named]
