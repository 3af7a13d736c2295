"""The reasons for which an engine process can end."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

RestartReason = Literal["exit", "signal", "out_of_memory", "step_timeout", "load_timeout", "message", "spawn"]
# The reasons for which the engine is started again, in this order: its process ended by itself; a signal ended the
# process; the system killed the process because memory was short; the process was killed because it reported no step;
# it was killed because it made no progress while loading; it sent a message that could not be read; the operating
# system could not start the process.
RESTART_REASONS: tuple[RestartReason, ...] = (
    "exit",
    "signal",
    "out_of_memory",
    "step_timeout",
    "load_timeout",
    "message",
    "spawn",
)
# A process gets these signals because of what it does itself. All other signals are sent by other processes.
CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
)
VMSTAT = Path("/proc/vmstat")


@dataclass(frozen=True, slots=True)
class Death:
    """The end of an engine process. `text` describes it as the beginning of a sentence. `loading` says whether the
    process had not become ready yet. `from_outside` says that another process killed the engine, so that no request can
    be the cause."""

    reason: RestartReason
    text: str
    loading: bool
    from_outside: bool = False


def death_by_status(status: int, *, loading: bool, oom_kills_before: int | None) -> Death:
    """Returns the death of a process with this exit status, or the death by a signal if `status` is negative.
    `oom_kills_before` is the result of `oom_kills` from a time when the process was still running."""
    if status >= 0:
        return Death("exit", f"the engine process ended with status {status}", loading)
    text = f"the engine process ended with signal {-status}"
    if -status == signal.SIGKILL:
        if oom_kills_before is None:
            return Death("signal", text, loading)  # it is not known whether memory was short
        if oom_kills() != oom_kills_before:
            return Death("out_of_memory", f"{text}, because the system had too little memory", loading)
    return Death("signal", text, loading, from_outside=-status not in CRASHES)


def oom_kills() -> int | None:
    """Returns how many processes the system has killed because memory was short. Returns None if the system does not
    tell."""
    try:
        counters = dict(line.split() for line in VMSTAT.read_text().splitlines())
        return int(counters["oom_kill"])
    except (OSError, KeyError, ValueError):
        return None
