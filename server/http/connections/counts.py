"""Counts the open connections and the refused connections, for the metrics and for the limit on connections."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ConnectionCounts:
    """`num_open` is the number of connections that are open now. It includes those that are being refused.
    `num_refused` is the number of connections that have been refused since the start of the server."""

    num_open: int = 0
    num_refused: int = 0
