"""Asks the process of the module `checker` whether a grammar can be used, and remembers the answers."""

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
# The CPU time of a check is limited by its process itself. After this many seconds without an answer the process is
# ended, because the machine has stopped it or swaps its memory.
_PATIENCE_SECONDS = 120.0
_MAX_REMEMBERED = 4096  # number of grammars whose answers are kept; an answer has a few hundred bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer about one grammar: `error` is "" if it can be used. If `too_complex` is true, the check was ended,
    because it took too much time or memory."""

    error: str = ""
    too_complex: bool = False


# The answer after a check whose process was killed, by the operating system for want of memory or by this process for
# want of an answer. Another check of the grammar may end otherwise, so this answer is not remembered.
_INTERRUPTED = Outcome("its check was interrupted; send the request again", too_complex=True)


class CompileCheck:
    """Checks grammars in another process, one at a time. The process starts with the first check, and again after a
    check that ended it. It ends with the object, or before with the method `close`. All methods may be called from any
    thread.

    `tokenizer_json` returns the text of the model's tokenizer.json. It is called when a process starts.
    """

    def __init__(self, tokenizer_json: Callable[[], str], *, eos_token_id: int) -> None:
        self._tokenizer_json = tokenizer_json
        self._eos_token_id = eos_token_id
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[bytes, Outcome] = OrderedDict()

    def outcome(self, grammar: str) -> Outcome:
        """Returns whether llguidance can compile the grammar within the limits. It blocks until the answer is there."""
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
        """Ends the process, if there is one."""
        with self._lock:
            self._end()

    def __del__(self) -> None:
        self._end()

    def _ask(self, grammar: str) -> Outcome:
        if self._process is not None and self._process.poll() is not None:
            self._end()  # something has ended the process since the last check
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
            stderr=subprocess.DEVNULL,  # Rust writes there why the process ends; its exit status tells enough
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches only the server, which then ends this process
        )

    def _exchange(self, message: Setup | Check) -> str | None:
        """Sends a message to the process and returns the error in its answer, or None if the process has ended."""
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
        """Ends the process. Returns the number of the signal that ended it."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()  # this has no effect on a process that has ended already
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # a part of a message may not have been sent
            process.stdin.close()
        process.stdout.close()
        return -process.wait()
