"""A process that compiles grammars to find out whether llguidance takes them. Run it as a module.

llguidance's limits do not bound every part of a compilation, and a grammar that is nested deeply ends the process with
an overflow of its stack. Therefore the check has a process of its own, which dies in the place of the server. The
kernel ends it when a check has used too much CPU time; CPU time does not depend on what else the machine does.

The process reads lines of JSON from its standard input: first a `Setup`, then one `Check` for each grammar. It answers
each line with a `Verdict`.
"""

from __future__ import annotations

import resource
import signal
import sys
import threading
from pathlib import Path

import llguidance
import msgspec

from jamba_server.engine.grammar.limits import COMPILE_CPU_SECONDS, COMPILE_MEMORY_BYTES, PARSER_LIMITS

# The stack of the thread that compiles, in bytes. It is smaller than the stack of the engine's thread, so a grammar
# that fits here fits there.
_STACK_BYTES = 4 << 20


class Setup(msgspec.Struct, frozen=True):
    """The text of the model's tokenizer.json, and the id of its end token."""

    tokenizer: str
    eos_token_id: int


class Check(msgspec.Struct, frozen=True):
    grammar: str


class Verdict(msgspec.Struct, frozen=True):
    """`error` is llguidance's message, or "" if the grammar can be used."""

    error: str


def verdict(grammar: str, tokenizer: llguidance.LLTokenizer) -> str:
    """Compiles a grammar and takes the first step with it. Returns llguidance's error, or ""."""
    limits = llguidance.LLParserLimits(**PARSER_LIMITS, verbose_errors=False)  # pyright: ignore[reportArgumentType]
    matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.consume_tokens(matcher.compute_ff_tokens())  # text without an end is an error here
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
        _answer(str(error))
        return
    _answer("")
    _limit_memory()
    while line := sys.stdin.buffer.readline():
        check = msgspec.json.decode(line, type=Check)
        signal.setitimer(signal.ITIMER_PROF, COMPILE_CPU_SECONDS)  # its signal, SIGPROF, ends the process
        error = verdict(check.grammar, tokenizer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _answer(error)


def _answer(error: str) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(Verdict(error)) + b"\n")
    sys.stdout.buffer.flush()


def _limit_memory() -> None:
    """Limits the memory of the process to what it has now and COMPILE_MEMORY_BYTES more. Without /proc, which only
    Linux has, there is no such limit."""
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        pages = int(statistics.read_text().split()[0])
        limit = pages * resource.getpagesize() + COMPILE_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an overflow of the stack is expected and leaves no core file
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
