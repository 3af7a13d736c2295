"""The limits on the size and the compilation of grammars. The HTTP process checks each grammar under these limits, and
the engine compiles the grammar under the same limits. So a grammar that the HTTP process has accepted does not fail in
the engine.

This module does not import llguidance, so that a process which only needs these numbers does not load that library.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# These are the arguments of `llguidance.LLParserLimits`. A unit of fuel is one step in the construction of a regular
# expression's automaton; about 50,000 steps take a millisecond. An item is one entry of the Earley parser's table.
PARSER_LIMITS: Mapping[str, int] = MappingProxyType(
    {
        "max_items_in_row": 2000,
        "initial_lexer_fuel": 1_000_000,
        "step_lexer_fuel": 200_000,
        "step_max_items": 50_000,
        # A state takes 1 to 2 kB of memory, so the states of a grammar take at most about 100 MB.
        "max_lexer_states": 50_000,
        # This limits the number of symbols in all rules. A grammar with this many symbols is compiled in about one
        # second, and the mask of its first token takes tens of milliseconds. llguidance's own limit is 500,000.
        "max_grammar_size": 150_000,
    }
)

# The HTTP process checks a grammar by compiling it in a child process. The check is stopped when it has used this much
# CPU time or memory. The limits of llguidance above do not bound every part of a compilation: without these two limits,
# a single regular expression can take 20 seconds and 2 GB.
COMPILE_CPU_SECONDS = 1.0
COMPILE_MEMORY_BYTES = 1 << 30

# JSON schemas may be nested this deeply inside each other. llguidance reads at most 127 levels of JSON.
MAX_SCHEMA_DEPTH = 48
MAX_SCHEMA_NODES = 20_000  # a schema may have at most this number of JSON values, including its annotations
MAX_REGEX_CHARS = 8192
MAX_CHOICES = 4096
MAX_CHOICE_CHARS = 4096
