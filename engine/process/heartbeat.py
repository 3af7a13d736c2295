"""Tells the parent process that an engine process which loads a model still works.

Some phases of the start take minutes without any report, for example the compilation of kernels. A thread reports in
these phases that the process works. It takes used processor time as the evidence, so that a process which waits for
ever for a lock or a file makes no such report.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager

BEAT_SECONDS = 5.0
# The processor time in seconds that must have been used since the last report. The thread itself uses much less.
MIN_PROCESSOR_SECONDS = 0.05


def processor_seconds() -> float:
    """Returns the processor time that this process and its finished child processes have used, in seconds."""
    return sum(os.times()[:4])


class Heartbeat:
    """Calls `beat` if the process has used processor time since the last call."""

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
    """Checks every BEAT_SECONDS, in a thread, whether `beat` must be called, until the `with` block ends."""
    heartbeat, ended = Heartbeat(beat), threading.Event()

    def run() -> None:
        while not ended.wait(BEAT_SECONDS):
            try:
                heartbeat.check()
            except OSError:
                return  # the parent process is gone, which the main thread notices, too

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
