"""What the trials of Ray share: they print what they see, and find the processes that they have started."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

PATIENCE = 300.0  # seconds that a trial waits for anything


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def check(what: str, fact: bool, shown: object = "") -> None:
    """Prints whether something is as it should be. Ends the program with status 1 if it is not."""
    say(f"{what}: {'yes' if fact else 'NO'} {shown}")
    if not fact:
        sys.exit(1)


def until(what: str, done: Callable[[], bool]) -> None:
    """Waits until `done` returns true. Ends the program with status 1 if that takes too long."""
    deadline = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within {PATIENCE:g} s")
        time.sleep(0.2)
    say(f"{what}: yes")


def processes(mark: str, module: bytes) -> dict[int, int]:
    """Returns the ids of the processes that run `python -m MODULE` in the environment of this trial, with those of
    their parents. The trial has set the variable `mark` to its own process id before it has started anything."""
    found, variable = dict[int, int](), f"{mark}={os.getpid()}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().split(b"\0")
            variables = (path / "environ").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if module in command and variable in variables:
            found[int(path.name)] = parent
    return found
