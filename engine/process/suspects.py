"""Finds the request that makes the engine process die.

If an engine process dies, any request that the process was adding or computing may be the cause. A request becomes a
suspect after SUSPECT_DEATHS successive deaths of this kind, if it made too little progress between them. The next
engine process does not get all suspects at once: it gets one half of them, which is called the trial here. If the
process survives, the other suspects follow. If the process dies, the cause is in the trial, and the next trial is one
half of it. A request fails if the engine died while this request was the only possible cause.

A kill by another process says nothing about the requests. But such kills are counted too, because a program that
guards the memory of the machine may kill the engine each time that it runs a certain request.
"""

from __future__ import annotations

from collections.abc import Collection

from jamba_server.engine.process.streams import LiveRequest

SUSPECT_DEATHS = 2
KILLS_PER_DEATH = 10  # this number of kills by other processes, without progress between them, counts as one death
CLEAR_UPDATES = 8  # a request is no longer a suspect after this number of updates from the present engine process
# If a few suspected requests run as a test (a trial), the trial ends after this number of steps, even if its requests
# have not got CLEAR_UPDATES updates. The limit keeps a long prompt from delaying other requests.
TRIAL_STEPS = 64


class Suspects:
    """Decides which requests the engine process gets, and which request is the cause of its death."""

    def __init__(self) -> None:
        self._trial: list[LiveRequest] = []
        self._alone = False  # says whether the request of the present trial must run without any other request
        # The engine has finished this number of steps since it got the requests of the present trial.
        self._num_steps = 0

    @property
    def on_trial(self) -> bool:
        """Returns whether the engine is running a trial: a part of the requests that are suspected of making it die. If
        the engine dies during a trial, the cause is among these requests."""
        return bool(self._trial)

    def select(self, unsent: Collection[LiveRequest], *, idle: bool) -> list[LiveRequest]:
        """Returns the requests among `unsent` that must be sent to the engine process now. `idle` says whether the
        process has no request yet.

        A trial is a part of the suspected requests. If a trial has several requests, all requests that are not
        suspected run at the same time. If the first trial of an engine process has only one request, this request runs
        alone until the trial ends. If the engine then dies, no other request can be the cause.
        """
        others = [r for r in unsent if not _is_suspect(r)]
        if self._update_trial():
            return [] if self._alone else others
        suspects = [r for r in unsent if _is_suspect(r)]
        self._trial, self._num_steps = suspects[: (len(suspects) + 1) // 2], 0
        self._alone = len(self._trial) == 1 and idle
        return self._trial if self._alone else [*self._trial, *others]

    def stepped(self) -> bool:
        """Must be called after each finished step of the engine. Returns whether a trial of suspected requests has just
        ended, so that other requests may be sent."""
        if not self._trial:
            return False
        self._num_steps += 1
        return not self._update_trial()

    def blame(self, live: Collection[LiveRequest], *, from_outside: bool) -> LiveRequest | None:
        """Must be called when the engine process has died. `live` has all requests that have not ended, and
        `from_outside` says whether another process killed the engine. Returns the request that caused the death, or
        None if the cause is not known."""
        trial, self._trial = [r for r in self._trial if not _is_clear(r)], []
        handled = [r for r in live if r.is_handled]
        for request in handled:
            if _is_clear(request):
                _clear(request)
        unproven = [r for r in handled if not _is_clear(r)]
        if from_outside:
            for request in unproven:
                request.kills += 1
        else:
            for request in [r for r in trial if r.is_handled] or handled:
                request.deaths += 1
            # If the engine was handling no request when it died, the death tells nothing about any request.
            for request in live if handled else ():
                if not request.is_handled:
                    _clear(request)  # the engine died although it was not handling this request
        if len(unproven) != 1 or _num_deaths(unproven[0]) <= SUSPECT_DEATHS:
            return None
        return None if from_outside and unproven[0].kills % KILLS_PER_DEATH else unproven[0]

    def _update_trial(self) -> bool:
        """Removes from the present trial all requests that are no longer suspected. Returns whether the trial still has
        a request."""
        for request in self._trial:
            if _is_clear(request):
                _clear(request)
        if self._num_steps >= TRIAL_STEPS:
            self._trial = []
        self._trial = [r for r in self._trial if r.sent and _is_suspect(r)]
        return bool(self._trial)


def _num_deaths(request: LiveRequest) -> int:
    return request.deaths + request.kills // KILLS_PER_DEATH


def _is_suspect(request: LiveRequest) -> bool:
    return _num_deaths(request) >= SUSPECT_DEATHS


def _is_clear(request: LiveRequest) -> bool:
    """Returns whether the request has got enough updates from the present engine process to be no longer suspected of
    making it die."""
    return request.num_updates >= CLEAR_UPDATES


def _clear(request: LiveRequest) -> None:
    request.deaths = request.kills = 0
