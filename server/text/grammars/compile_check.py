"""Asks child processes (the module `checker`) whether grammars can be compiled, and caches the answers."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from jamba_server.engine.errors import Overloaded
from jamba_server.engine.grammar.limits import COMPILE_CPU_SECONDS, COMPILE_MEMORY_BYTES
from jamba_server.server.text.grammars.checker import Check, Setup
from jamba_server.server.text.grammars.checker_process import CheckerProcess

# The answers about this number of grammars are cached. An answer usually takes a few hundred bytes, and at most 5 kB.
_MAX_REMEMBERED = 4096
# All checks for one request together may take this number of seconds of CPU time. A request may need several checks,
# for example one for each of its tool functions, to find out which of them is refused.
REQUEST_CPU_SECONDS = 2 * COMPILE_CPU_SECONDS


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of checking one grammar. `error` is "" if the grammar can be used. If `too_complex` is true, the check
    was stopped because it took too much time or memory."""

    error: str = ""
    too_complex: bool = False


class OverAllowance(Exception):
    """A grammar was not checked, or not to the end, because that takes more time than an `Allowance` allows. The
    request must wait for a larger allowance."""


@dataclass(slots=True)
class Allowance:
    """The CPU time in seconds that the checks for one request may still take. An allowance of 0 allows only answers
    from the cache. If `final` is true, there is no larger allowance, so a grammar that needs more is too complex."""

    seconds: float = REQUEST_CPU_SECONDS
    final: bool = True


# The result of a check whose process was killed, either by the operating system because memory was short, or by this
# process because no answer came. Another check of the same grammar may have another result, so this result is not
# cached.
_INTERRUPTED = Outcome("its check was interrupted; send the request again", too_complex=True)


class CompileCheck:
    """Checks grammars in two child processes: one for checks with a final allowance and one for all others. So a check
    that takes long does not delay those that take milliseconds.

    Each process starts with its first check and makes one check at a time. If a check kills the process, a new process
    starts with the next check. The processes end when `close` is called or this object is garbage-collected. All
    methods may be called from any thread.

    The function `tokenizer_json` returns the text of the model's tokenizer.json. It is called whenever a process
    starts.
    """

    def __init__(self, tokenizer_json: Callable[[], str], *, eos_token_id: int) -> None:
        self._lanes = {final: _Lane(tokenizer_json, eos_token_id) for final in (False, True)}
        self._lock = threading.Lock()  # protects `_outcomes`
        # The keys are hashes of grammars. The least recently used one comes first.
        self._outcomes: OrderedDict[bytes, Outcome] = OrderedDict()

    def outcome(self, grammar: str, allowance: Allowance | None = None) -> Outcome:
        """Returns whether llguidance can compile the grammar within the limits. The method blocks until a child process
        has answered, and subtracts the CPU time of the check from the allowance.

        Raises OverAllowance if the allowance is too small and not final.
        """
        allowance = allowance or Allowance()
        key = hashlib.sha256(grammar.encode(errors="surrogatepass")).digest()
        if (cached := self._cached(key)) is not None:
            return cached
        limit = min(allowance.seconds, COMPILE_CPU_SECONDS)
        outcome = self._lanes[allowance.final].check(grammar, limit, allowance) if limit > 0 else None
        if outcome is None and not allowance.final:
            raise OverAllowance
        if outcome is None and limit < COMPILE_CPU_SECONDS:
            text = f"all checks for this request together take more than {REQUEST_CPU_SECONDS:g} s of CPU time"
            return Outcome(text, too_complex=True)
        if outcome is None:
            text = f"it takes more than {COMPILE_CPU_SECONDS:g} s of CPU time to compile"
            outcome = Outcome(text, too_complex=True)
        if outcome != _INTERRUPTED:
            self._remember(key, outcome)
        return outcome

    def close(self) -> None:
        """Ends the child processes that are running. If a check is being made, waits for its end first."""
        for lane in self._lanes.values():
            lane.close()

    def _cached(self, key: bytes) -> Outcome | None:
        with self._lock:
            if key not in self._outcomes:
                return None
            self._outcomes.move_to_end(key)
            return self._outcomes[key]

    def _remember(self, key: bytes, outcome: Outcome) -> None:
        with self._lock:
            self._outcomes[key] = outcome
            if len(self._outcomes) > _MAX_REMEMBERED:
                self._outcomes.popitem(last=False)


class _Lane:
    """One of the two child processes."""

    def __init__(self, tokenizer_json: Callable[[], str], eos_token_id: int) -> None:
        self._tokenizer_json, self._eos_token_id = tokenizer_json, eos_token_id
        self._process: CheckerProcess | None = None
        self._lock = threading.Lock()  # held while the process makes a check

    def check(self, grammar: str, limit: float, allowance: Allowance) -> Outcome | None:
        """Checks a grammar and subtracts the CPU time from the allowance. Returns None if the check was stopped after
        `limit` seconds of CPU time."""
        with self._lock:
            return self._check(grammar, limit, allowance)

    def close(self) -> None:
        with self._lock:
            self._end()

    def __del__(self) -> None:
        self._end()

    def _check(self, grammar: str, limit: float, allowance: Allowance) -> Outcome | None:
        if self._process is not None and not self._process.is_alive:
            self._end()  # the child process has died since the last check
        if self._process is None:
            try:
                self._process = CheckerProcess()
            except OSError as error:
                raise Overloaded(f"No process that checks grammars can be started: {error}.") from error
            ready = self._process.exchange(Setup(self._tokenizer_json(), self._eos_token_id))
            if ready is None or ready.error:
                self._end()
                if ready is None:
                    return _INTERRUPTED
                return Outcome(f"this model's tokenizer cannot be used with grammars: {ready.error}")
        verdict = self._process.exchange(Check(grammar, limit))
        # A forked process that was killed from outside may have been killed before it got this check. Then another
        # answer follows, so this process is not used again.
        if verdict is None or verdict.signal == signal.SIGKILL:
            self._end()
            return _INTERRUPTED
        allowance.seconds -= limit if verdict.signal == signal.SIGPROF else verdict.seconds
        match verdict.signal:
            case None:
                return Outcome(verdict.error)
            case signal.SIGPROF:
                return None
            case _:
                megabytes = COMPILE_MEMORY_BYTES >> 20
                text = f"it is nested too deeply, or takes more than {megabytes} MiB to compile"
                return Outcome(text, too_complex=True)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.end()
