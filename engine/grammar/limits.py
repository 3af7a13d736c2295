"""Limits on the work that a grammar may cause. All limits count steps and sizes, and none reads a clock, so a grammar
that is accepted once is accepted by every process on every machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any, Final

from llguidance import LLParserLimits

# Number of bytes of the stack of a thread that compiles grammars. llguidance follows a chain of rules by recursion, and
# a stack that overflows ends the process. The longest chain that fits into a grammar of `validation.MAX_GRAMMAR_CHARS`
# characters needs less than half of this size. Memory is used only as far as the recursion goes.
STACK_BYTES: Final = 1 << 29

# Replaces llguidance's own limit of 500,000. A grammar with this many symbols in its rules is compiled in about one
# second, and the mask of its first token takes tens of milliseconds.
MAX_GRAMMAR_SYMBOLS: Final = 150_000

# Maximum number of lines of a Lark grammar. Each rule has a line of its own. llguidance's time to report an error in
# rules that refer to each other grows with the square of their number; for 1,000 rules it is about 10 seconds.
MAX_LARK_LINES: Final = 1000


class GrammarError(Exception):
    """A grammar that cannot be compiled. The message is for the client."""


def parser_limits() -> LLParserLimits:
    """Returns the limits with which every grammar is compiled and run. The limits that are not named here are
    llguidance's own. Error messages do not repeat the grammar."""
    return LLParserLimits(max_grammar_size=MAX_GRAMMAR_SYMBOLS, verbose_errors=False)


def check_size(grammar: str) -> None:
    """Raises GrammarError if a grammar in llguidance's form has too many rules. Must be called before the grammar is
    compiled or checked by llguidance."""
    if (lines := sum(text.count("\n") for text in _lark_texts(grammar))) >= MAX_LARK_LINES:
        raise GrammarError(f"The grammar has {lines + 1} lines; the limit is {MAX_LARK_LINES}.")


def _lark_texts(grammar: str) -> list[str]:
    """Returns the Lark grammars in `grammar`, which is one itself, or a JSON object with a list of grammars."""
    if not grammar.lstrip().startswith("{"):
        return [grammar]
    try:
        parts: Any = json.loads(grammar)["grammars"]
        return [part.get("lark_grammar") or "" for part in parts]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise GrammarError("The grammar is not in llguidance's JSON form.") from error


_starting = threading.Lock()


def start_deep_thread(run: Callable[..., Any], *arguments: Any) -> threading.Thread:
    """Starts `run(*arguments)` in a daemon thread with a stack of STACK_BYTES bytes and returns the thread. Grammars
    must be compiled and checked in such a thread."""
    thread = threading.Thread(target=run, args=arguments, daemon=True)
    with _starting:  # the size of the stack is a setting of the whole process, which the next new thread takes
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return thread
