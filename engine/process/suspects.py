"""Finds the request that makes the engine process die.

If an engine process dies, any request that it handled may be the cause. A request is a suspect if it was handled
during SUSPECT_DEATHS successive deaths and made too little progress between them. The next engine process does not get
all suspects at once: it gets a part of them, which is called the trial here. If the process goes on, the next part
follows. If it dies, the cause is in the trial, so the next trial is a part of it. A request fails if the engine died
while this request was the only possible cause.

A death that no request causes, such as a kill from outside, makes suspects only if it is repeated before the requests
have made progress. The trials are then over after a few steps, and no request fails.
"""

from __future__ import annotations

from collections.abc import Collection

from jamba_server.engine.process.streams import LiveRequest

SUSPECT_DEATHS = 2
CLEAR_UPDATES = 8  # a request is no longer a suspect after this number of updates from the present engine process
# A trial ends after this number of steps, even if its requests have not got CLEAR_UPDATES updates. The limit keeps a
# long prompt from delaying other requests.
TRIAL_STEPS = 64


class Suspects:
    """Decides which requests the engine process gets, and which request is the cause of its death."""

    def __init__(self) -> None:
        self._trial: list[LiveRequest] = []
        self._alone = False  # whether no other request may be sent during the trial
        self._num_steps = 0  # finished steps since the trial was sent

    @property
    def on_trial(self) -> bool:
        """Whether a trial is under way, so that a death would tell more about its requests."""
        return bool(self._trial)

    def select(self, unsent: Collection[LiveRequest], *, idle: bool) -> list[LiveRequest]:
        """Returns the requests among `unsent` that must be sent to the engine process now. `idle` says that the process
        has no request yet.

        A trial of several requests runs beside all requests that are no suspects. If the first trial of an engine
        process has only one request, this request runs alone until its trial ends. If the engine then dies, no other
        request can be the cause.
        """
        others = [r for r in unsent if not _is_suspect(r)]
        if self._update_trial():
            return [] if self._alone else others
        suspects = [r for r in unsent if _is_suspect(r)]
        self._trial, self._num_steps = suspects[: (len(suspects) + 1) // 2], 0
        self._alone = len(self._trial) == 1 and idle
        return self._trial if self._alone else [*self._trial, *others]

    def stepped(self) -> bool:
        """Must be called after each finished step. Returns whether a trial has just ended, so that other requests may
        be sent."""
        if not self._trial:
            return False
        self._num_steps += 1
        return not self._update_trial()

    def blame(self, live: Collection[LiveRequest]) -> LiveRequest | None:
        """Must be called when the engine process has died, with all requests that have not ended. Returns the request
        that caused the death, or None if the cause is not known."""
        handled = [r for r in live if r.is_handled]
        for request in handled:
            if _is_clear(request):
                request.deaths = 0
        unproven = [r for r in handled if not _is_clear(r)]
        culprit = unproven[0] if len(unproven) == 1 and _is_suspect(unproven[0]) else None
        trial = [r for r in self._trial if r in unproven]
        for request in trial or handled:
            request.deaths += 1
        for request in live if handled else ():  # without a handled request, the death tells nothing about requests
            if not request.is_handled:
                request.deaths = 0  # the engine died without this request
        self._trial = []
        return culprit

    def _update_trial(self) -> bool:
        """Removes from the trial all requests that are no longer suspects. Returns whether a request is left."""
        for request in self._trial:
            if _is_clear(request):
                request.deaths = 0
        if self._num_steps >= TRIAL_STEPS:
            self._trial = []
        self._trial = [r for r in self._trial if r.sent and _is_suspect(r)]
        return bool(self._trial)


def _is_suspect(request: LiveRequest) -> bool:
    return request.deaths >= SUSPECT_DEATHS


def _is_clear(request: LiveRequest) -> bool:
    """Returns whether the request made enough progress in the present engine process to be no suspect."""
    return request.num_updates >= CLEAR_UPDATES
