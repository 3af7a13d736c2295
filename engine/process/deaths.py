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
# The system sends these signals to a process that has made an error, such as an access to invalid memory. All other
# signals that can end the engine come from other processes, or from the system when memory is short.
CRASHES = frozenset(
    {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
)
VMSTAT = Path("/proc/vmstat")


@dataclass(frozen=True, slots=True)
class Death:
    """Describes how an engine process ended. `text` says so in words with which a sentence can begin. `loading` is true
    if the process had not become ready yet. `from_outside` is true if another process killed the engine, so that no
    request can be the cause."""

    reason: RestartReason
    text: str
    loading: bool
    from_outside: bool = False


def death_by_status(status: int, *, loading: bool, oom_kills_before: int | None) -> Death:
    """Returns the description of how a process ended. `status` is its exit status; a negative status is minus the
    number of the signal that ended the process. `loading` says whether the process had not become ready yet.
    `oom_kills_before` is the result that `oom_kills` had while the process was still running."""
    if status >= 0:
        return Death("exit", f"the engine process ended with status {status}", loading)
    text = f"the engine process ended with signal {-status}"
    if -status == signal.SIGKILL:
        if oom_kills_before is None:
            return Death("signal", text, loading)  # this system does not tell whether memory was short
        if oom_kills() != oom_kills_before:
            return Death("out_of_memory", f"{text}, because the system had too little memory", loading)
    return Death("signal", text, loading, from_outside=-status not in CRASHES)


def oom_kills() -> int | None:
    """Returns how many processes the system has killed because memory was short. Returns None if the system does not
    count them."""
    try:
        counters = dict(line.split() for line in VMSTAT.read_text().splitlines())
        return int(counters["oom_kill"])
    except (OSError, KeyError, ValueError):
        return None
