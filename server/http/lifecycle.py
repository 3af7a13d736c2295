"""Whether the server takes new work."""

from __future__ import annotations

from jamba_server.engine.errors import Overloaded

RETRY_AFTER_SECONDS = 5  # by then another replica has the traffic, or this one is back


class Lifecycle:
    """Accepting until `drain`. From then on new work is refused, while what runs goes on to its end."""

    def __init__(self) -> None:
        self._draining = False

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self) -> None:
        self._draining = True

    def admit(self) -> None:
        """Raises Overloaded while draining."""
        if self._draining:
            raise Overloaded("The server is shutting down; send the request again.", retry_after=RETRY_AFTER_SECONDS)
