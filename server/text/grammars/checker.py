"""A process that compiles grammars to find out whether llguidance accepts them. The module `checker_process` starts it.

The limits of llguidance do not bound every part of a compilation, and compiling a deeply nested grammar can end the
process with a stack overflow. Therefore grammars are checked in this separate process, whose death does not harm the
server. The kernel kills the process when a check has used too much CPU time. CPU time is measured rather than elapsed
time, because it does not depend on the load of the machine.

The process reads lines of JSON from its standard input: first a `Setup`, then one `Check` for each grammar. For each
line it writes a `Verdict` to its standard output. It loads the tokenizer, which takes about half a second, and then
forks. The forked process makes the checks. If a check ends the forked process, the first process reports that and forks
again, which takes milliseconds. So a grammar that is stopped does not make the next one wait for the tokenizer.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

import llguidance
import msgspec

from jamba_server.engine.grammar.limits import COMPILE_MEMORY_BYTES, PARSER_LIMITS

# The size in bytes of the stack on which grammars are compiled. It is smaller than the stack of the engine's compiling
# thread, so a grammar that does not overflow this stack does not overflow that one.
_STACK_BYTES = 4 << 20
_MAX_ERROR_CHARS = 4000  # longer error messages of llguidance are cut, because the server keeps them


class Setup(msgspec.Struct, frozen=True):
    """The first message to the process: the text of the model's tokenizer.json, and the id of its end token."""

    tokenizer: str
    eos_token_id: int


class Check(msgspec.Struct, frozen=True):
    """A grammar, and the number of seconds of CPU time after which its check is stopped."""

    grammar: str
    seconds: float


class Verdict(msgspec.Struct, frozen=True):
    """The process's answer to a message. `error` is llguidance's error message, or "" if the grammar can be used.
    `seconds` is the CPU time that the check took. If the check ended the process that made it, `signal` is the number
    of the signal that did so, or 0 if the process ended without a signal."""

    error: str = ""
    seconds: float = 0.0
    signal: int | None = None


def verdict(grammar: str, tokenizer: llguidance.LLTokenizer) -> str:
    """Compiles a grammar and computes which tokens may come first, as some errors appear only then. Returns
    llguidance's error message, or "" if the grammar can be used."""
    limits = llguidance.LLParserLimits(**PARSER_LIMITS, verbose_errors=False)  # pyright: ignore[reportArgumentType]
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.consume_tokens(matcher.compute_ff_tokens())  # this call finds grammars that force an endless text
    if not matcher.is_error() and not matcher.is_stopped():
        matcher.compute_bitmask()
    if matcher.is_error():
        return matcher.get_error() or "The grammar cannot be used."
    if matcher.is_stopped() and not matcher.is_accepting():
        return "Unsatisfiable: the grammar allows no text."
    return ""


def _serve() -> None:
    setup = msgspec.json.decode(sys.stdin.buffer.readline(), type=Setup)
    try:
        tokenizer = llguidance.LLTokenizer(setup.tokenizer, eos_token=setup.eos_token_id)
    except Exception as error:  # noqa: BLE001  llguidance raises several classes, also for a panic in Rust
        _answer(Verdict(str(error)[:_MAX_ERROR_CHARS]))
        return
    _answer(Verdict())
    _limit_memory()
    while True:
        if (pid := os.fork()) == 0:
            _make_checks(tokenizer)
        _, status, usage = os.wait4(pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        _answer(Verdict(seconds=usage.ru_utime + usage.ru_stime, signal=number))


def _make_checks(tokenizer: llguidance.LLTokenizer) -> None:
    """Answers checks until the end of the standard input, and then ends this process with the status 0."""
    status = 1
    try:
        while line := sys.stdin.buffer.readline():
            check = msgspec.json.decode(line, type=Check)
            before = time.process_time()
            # The timer measures CPU time; when it expires, the signal SIGPROF ends this process.
            signal.setitimer(signal.ITIMER_PROF, check.seconds)
            error = verdict(check.grammar, tokenizer)
            signal.setitimer(signal.ITIMER_PROF, 0)
            _answer(Verdict(error[:_MAX_ERROR_CHARS], time.process_time() - before))
        status = 0
    finally:
        os._exit(status)


def _answer(verdict: Verdict) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    sys.stdout.buffer.flush()


def _limit_memory() -> None:
    """Limits the address space of the process to its present size plus COMPILE_MEMORY_BYTES. The present size is read
    from /proc, so on systems other than Linux there is no such limit."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        pages = int(statistics.read_text().split()[0])
        limit = pages * resource.getpagesize() + COMPILE_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    # Some grammars overflow the stack; such an expected death must not leave a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    lowest = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (lowest, hard))
    _serve()


if __name__ == "__main__":
    main()
