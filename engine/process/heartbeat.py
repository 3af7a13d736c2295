"""Tells the parent process that an engine process is still making progress while it loads a model.

Some phases of the start take minutes without a progress report, for example the compilation of kernels. In these phases
a thread reports that the process works, but only if the process has used processor time since the last report. So a
process that hangs, for example because it waits for a lock, makes no such report.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

BEAT_SECONDS = 5.0
# A report is made if the process has used at least this much processor time, in seconds, since the last report. The
# thread that makes the reports uses much less.
MIN_PROCESSOR_SECONDS = 0.05


def processor_seconds() -> float:
    """Returns the processor time that this process and its finished child processes have used, in seconds."""
    return sum(os.times()[:4])


class Heartbeat:
    """Calls the function `beat` if the process has used processor time since the last such call."""

    def __init__(self, beat: Callable[[], None], used: Callable[[], float] = processor_seconds) -> None:
        self._beat, self._used = beat, used
        self._last = used()

    def check(self) -> None:
        now = self._used()
        if now - self._last >= MIN_PROCESSOR_SECONDS:
            self._last = now
            self._beat()


@contextmanager
def beating(beat: Callable[[], None]) -> Generator[None]:
    """Context manager: while the `with` block runs, a thread checks every BEAT_SECONDS seconds whether the process has
    used processor time, and calls `beat` if so."""
    heartbeat, ended = Heartbeat(beat), threading.Event()

    def run() -> None:
        while not ended.wait(BEAT_SECONDS):
            try:
                heartbeat.check()
            except OSError:
                return  # the parent process has ended; the main thread notices that, too, and ends this process

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
