"""Where a machine is among the nodes of an engine, and how it finds node 0."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOptions:
    """There are `count` nodes, and this one has the number `rank`. Node 0 listens at `address` and `port`. A node ends
    if it has waited for another node for `timeout` seconds."""

    count: int
    rank: int
    address: str
    port: int
    timeout: float
