"""Starts the process of the module `checker`, and sends grammars to it."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

import jamba_server
from jamba_server.server.text.grammars.checker import Check, Setup, Verdict

COMMAND = (sys.executable, "-P", "-m", "jamba_server.server.text.grammars.checker")
# The only environment variables that the process gets. It needs no others, and some of the others hold secrets.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "PYTHONHOME")
# The checking process limits its own CPU time. If it has not answered after this number of seconds of elapsed time, it
# is killed: it was probably stopped by a signal, or the machine is swapping.
_PATIENCE_SECONDS = 120.0


class CheckerProcess:
    """A child process that checks grammars. Only one thread may use an object of this class at a time."""

    def __init__(self) -> None:
        """Starts the process. Raises OSError if that fails."""
        root = str(Path(jamba_server.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"PYTHONPATH": path}
        self._process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # If llguidance, which is written in Rust, crashes, it writes a message to stderr. The message is dropped,
            # because the exit status of the process tells enough.
            stderr=subprocess.DEVNULL,
            env=environment,
            # In a session of its own the process gets no SIGINT from Ctrl-C; the server ends the process.
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def exchange(self, message: Setup | Check) -> Verdict | None:
        """Sends a message to the process. Returns its answer, or None if the process has ended or has not answered in
        time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        line = self._process.stdout.readline() if poll.poll(_PATIENCE_SECONDS * 1000) else b""
        return msgspec.json.decode(line, type=Verdict) if line.endswith(b"\n") else None

    def end(self) -> None:
        """Kills the process and its child, if they still run."""
        if self.is_alive:
            # The process leads a process group, to which its child belongs. If the process has ended already, its child
            # ends when it sees that its standard input is closed.
            os.killpg(self._process.pid, signal.SIGKILL)
        assert self._process.stdin is not None and self._process.stdout is not None
        # Closing the pipe would otherwise raise an error if a part of a message was not sent.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()
