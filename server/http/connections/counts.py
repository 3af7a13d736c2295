"""How many connections are open, for the metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ConnectionCounts:
    """`num_open` connections are open now, those included that are being refused. `num_refused` have been refused since
    the start of the server."""

    num_open: int = 0
    num_refused: int = 0
