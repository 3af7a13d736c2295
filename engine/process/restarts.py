"""Decides whether and when the engine process is started again after it has died."""

from __future__ import annotations

MAX_FAILURES = 3
# The delay before the first restart has this number of seconds. Each further delay is twice as long as the one before.
BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 30.0


class RestartPolicy:
    """Counts deaths of the engine process without progress between them. After MAX_FAILURES such deaths in a row the
    engine is not started again.

    A death counts if the process died while it was loading, or before it had finished a step. While the module
    `suspects` searches for a request that makes the engine die, deaths do not count, because that search ends after a
    few deaths. When the search has found the request, earlier deaths no longer count. But if the search finds
    MAX_FAILURES requests in a row and no step was finished between them, the engine itself is at fault and is not
    started again.
    """

    def __init__(self) -> None:
        self._num_failures = self._num_culprits = self._num_failed_spawns = 0

    def progressed(self) -> None:
        """Must be called when the engine has finished a step."""
        self._num_failures = self._num_culprits = self._num_failed_spawns = 0

    def after_failed_spawn(self) -> float:
        """Returns after how many seconds the engine process is started again. There is no limit to the number of such
        attempts, because the reason is usually a temporary lack of memory or file descriptors."""
        self._num_failed_spawns += 1
        return _backoff(self._num_failed_spawns)

    def after_death(self, *, progress: bool, found: bool, searching: bool) -> float | None:
        """Returns after how many seconds the engine process is started again, or None if it is not started again.

        `progress` says whether the process had finished a step. `found` says whether a request is known to have caused
        the death, and `searching` whether the death has reduced the number of requests that may be the cause.
        """
        self._num_failed_spawns = 0
        if found:
            self._num_failures, self._num_culprits = 0, self._num_culprits + 1
            return None if self._num_culprits >= MAX_FAILURES and not progress else 0.0
        if progress or searching:
            return 0.0
        self._num_failures += 1
        return None if self._num_failures >= MAX_FAILURES else _backoff(self._num_failures)


def _backoff(attempt: int) -> float:
    return min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** min(attempt - 1, 30))
