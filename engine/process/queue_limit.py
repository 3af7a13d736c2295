"""The limit on how many choices may wait to be run (--max-queue-requests)."""

from __future__ import annotations

from typing import NamedTuple

from jamba_server.engine.errors import Overloaded, RequestRejected


class Load(NamedTuple):
    """What an engine has to do, without requests in the background: `waiting` choices have not started, `started` ones
    have. The engine runs up to `places` sequences at the same time; 0 if that is not known yet."""

    waiting: int
    started: int
    places: int

    @property
    def free(self) -> int:
        return max(0, self.places - self.started)


def check_queue(limit: int, num_choices: int, loads: list[Load]) -> None:
    """Raises Overloaded if a request with `num_choices` choices would make more than `limit` choices wait. `loads` are
    those of the engines that share the queue. A `limit` of 0 means no limit.

    Choices for which there is a free place do not count as waiting, even if they have not started yet, for example at
    the beginning of a burst of requests. Raises RequestRejected for more choices than the queue may have: such a
    request could never be admitted, and the status 503, which means that the client may try again, would mislead.
    """
    if limit and num_choices > limit:
        raise RequestRejected(
            f"The request asks for {num_choices} choices; the limit (--max-queue-requests) is {limit}.", param="n"
        )
    waiting, free = sum(load.waiting for load in loads), sum(load.free for load in loads)
    if limit and waiting + num_choices > limit + free:
        places = sum(load.places for load in loads)
        raise Overloaded(
            f"{waiting} choices are waiting and the request has {num_choices}; {free} places are free, "
            f"and the limit (--max-queue-requests) is {limit}.",
            retry_after=1 + waiting // max(1, places),
        )
