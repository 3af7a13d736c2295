"""Asks a child process (the module `checker`) whether a grammar can be compiled, and caches the answers."""

from __future__ import annotations

import contextlib
import hashlib
import os
import select
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

import jamba_server
from jamba_server.engine.grammar.limits import COMPILE_CPU_SECONDS, COMPILE_MEMORY_BYTES
from jamba_server.server.text.grammars.checker import Check, Setup, Verdict

COMMAND = (sys.executable, "-P", "-m", "jamba_server.server.text.grammars.checker")
# The checking process limits its own CPU time. If it has not answered after this number of seconds of elapsed time, it
# is killed: it was probably stopped by a signal, or the machine is swapping.
_PATIENCE_SECONDS = 120.0
_MAX_REMEMBERED = 4096  # number of grammars whose answers are cached; an answer takes a few hundred bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of checking one grammar. `error` is "" if the grammar can be used. If `too_complex` is true, the check
    was stopped because it took too much time or memory."""

    error: str = ""
    too_complex: bool = False


# The result of a check whose process was killed, either by the operating system because memory was short, or by this
# process because no answer came. Another check of the same grammar may have another result, so this result is not
# cached.
_INTERRUPTED = Outcome("its check was interrupted; send the request again", too_complex=True)


class CompileCheck:
    """Checks grammars in a child process, one at a time. The process starts with the first check. If a check ends the
    process, a new process starts with the next check. The process ends when `close` is called or this object is
    garbage-collected. All methods may be called from any thread.

    The function `tokenizer_json` returns the text of the model's tokenizer.json. It is called whenever a process
    starts.
    """

    def __init__(self, tokenizer_json: Callable[[], str], *, eos_token_id: int) -> None:
        self._tokenizer_json = tokenizer_json
        self._eos_token_id = eos_token_id
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[bytes, Outcome] = OrderedDict()

    def outcome(self, grammar: str) -> Outcome:
        """Returns whether llguidance can compile the grammar within the limits. The method blocks until the child
        process has answered."""
        key = hashlib.sha256(grammar.encode(errors="surrogatepass")).digest()
        with self._lock:
            if key in self._outcomes:
                self._outcomes.move_to_end(key)
                return self._outcomes[key]
            outcome = self._ask(grammar)
            if outcome == _INTERRUPTED:
                return outcome
            self._outcomes[key] = outcome
            if len(self._outcomes) > _MAX_REMEMBERED:
                self._outcomes.popitem(last=False)
            return outcome

    def close(self) -> None:
        """Ends the child process, if it is running."""
        with self._lock:
            self._end()

    def __del__(self) -> None:
        self._end()

    def _ask(self, grammar: str) -> Outcome:
        if self._process is not None and self._process.poll() is not None:
            self._end()  # the child process has died since the last check
        if self._process is None:
            self._process = self._start()
            error = self._exchange(Setup(self._tokenizer_json(), self._eos_token_id))
            if error != "":
                self._end()
                return Outcome(f"this model's tokenizer cannot be used with grammars: {error or 'there was no answer'}")
        error = self._exchange(Check(grammar))
        if error is not None:
            return Outcome(error)
        signalled = self._end()
        if signalled == signal.SIGKILL:
            return _INTERRUPTED
        if signalled == signal.SIGPROF:
            return Outcome(f"it takes more than {COMPILE_CPU_SECONDS:g} s of CPU time to compile", too_complex=True)
        limit = COMPILE_MEMORY_BYTES >> 20
        return Outcome(f"it is nested too deeply, or takes more than {limit} MiB to compile", too_complex=True)

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(jamba_server.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        return subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # If llguidance, which is written in Rust, crashes, it writes a message to stderr. The message is dropped,
            # because the exit status of the process tells enough.
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            # In a session of its own the process gets no SIGINT from Ctrl-C; the server ends the process.
            start_new_session=True,
        )

    def _exchange(self, message: Setup | Check) -> str | None:
        """Sends a message to the child process. Returns the error text of its answer ("" for no error), or None if the
        process has ended or has not answered in time."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(message) + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        line = process.stdout.readline() if poll.poll(_PATIENCE_SECONDS * 1000) else b""
        return msgspec.json.decode(line, type=Verdict).error if line.endswith(b"\n") else None

    def _end(self) -> int | None:
        """Ends the child process. Returns the number of the signal that ended it, or None if there was no process."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()  # this has no effect on a process that has ended already
        assert process.stdin is not None and process.stdout is not None
        # Closing the pipe would otherwise raise an error if a part of a message was not sent.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        return -process.wait()
