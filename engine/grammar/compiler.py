"""The class `GrammarCompiler` compiles the grammars that replies must follow. It uses a separate thread, so that no
step of the engine waits for a compilation."""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from jamba_server.engine.checkpoint import MAX_TOKENIZER_BYTES, TOKENIZER_FILE, open_checkpoint, read_text
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.grammar.constraint import Constraint
from jamba_server.engine.grammar.deep_thread import start_deep_thread
from jamba_server.engine.grammar.limits import PARSER_LIMITS
from jamba_server.engine.types import Request

logger = logging.getLogger(__name__)

# The cache of compiled grammars holds grammars of at most this many characters in total. The compiled form of a large
# grammar takes about 200 bytes of memory for each character.
MAX_CACHED_CHARS = 1 << 20
_MAX_ERROR_CHARS = 500


class GrammarError(Exception):
    """The exception for a grammar that cannot be compiled. Its message is sent to the client."""


Done = Callable[[Constraint | GrammarError], None]


def load_tokenizer(folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """Returns the tokenizer of the checkpoint in `folder` as an object of llguidance, the library that follows
    grammars. Token ids below `vocab_size` that the tokenizer lacks are never allowed in a reply. Raises GrammarError if
    the tokenizer cannot be used. The call holds Python's global interpreter lock for about 0.4 s."""
    try:
        text = read_text(open_checkpoint(folder), TOKENIZER_FILE, limit=MAX_TOKENIZER_BYTES)
        if text is None:
            raise GrammarError(f"This model cannot follow grammars, because it has no {TOKENIZER_FILE}.")
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except (CheckpointError, ValueError) as error:
        raise GrammarError(f"This model cannot follow grammars, because of its {TOKENIZER_FILE}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Tokenizing:
    """The arguments with which the compiler's thread calls `load_tokenizer`."""

    folder: Path
    vocab_size: int
    eos_token_ids: tuple[int, ...]


@dataclass(slots=True)
class _Cache:
    """A cache of compiled grammars, sorted by the time of their last use, the most recent one last. Each entry is a
    matcher in its initial state; requests get copies of it. The cache has no lock, because only the compiler's thread
    uses it."""

    matchers: OrderedDict[bytes, tuple[LLMatcher, int]] = field(
        default_factory=OrderedDict[bytes, tuple[LLMatcher, int]]
    )
    chars: int = 0

    def get(self, key: bytes) -> LLMatcher | None:
        if (entry := self.matchers.get(key)) is None:
            return None
        self.matchers.move_to_end(key)
        return entry[0]

    def put(self, key: bytes, matcher: LLMatcher, chars: int) -> None:
        self.matchers[key] = matcher, chars
        self.chars += chars
        while self.chars > MAX_CACHED_CHARS:
            _, (_, removed) = self.matchers.popitem(last=False)
            self.chars -= removed


class GrammarCompiler:
    """Compiles the grammars of requests, one after the other in the order of the calls of `start`, and makes a
    `Constraint` from each of them.

    A thread does this work. It first loads the tokenizer, which takes about 0.4 s. The thread ends when this object is
    garbage-collected.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._jobs: SimpleQueue[tuple[Request, Done] | None] = SimpleQueue()
        start_deep_thread(_work, self._jobs, _Tokenizing(folder, vocab_size, eos_token_ids))
        weakref.finalize(self, self._jobs.put, None)

    def start(self, request: Request, done: Done) -> None:
        """Compiles the grammar of `request` in the compiler's thread. That thread then calls `done`, either with the
        error or with a constraint that has been advanced over the tokens which the reply already has."""
        self._jobs.put((request, done))


def _work(jobs: SimpleQueue[tuple[Request, Done] | None], tokenizing: _Tokenizing) -> None:
    cache, problem = _Cache(), None
    tokenizer: LLTokenizer | None = None
    try:
        tokenizer = load_tokenizer(tokenizing.folder, tokenizing.vocab_size, tokenizing.eos_token_ids)
    except GrammarError as error:
        problem = error
    while (job := jobs.get()) is not None:
        request, done = job
        if tokenizer is None:
            assert problem is not None
            done(problem)
            continue
        try:
            matcher = _compiled(tokenizer, request.params.grammar, cache).deep_copy()
            constraint = Constraint(request.params, matcher, tokenizing.eos_token_ids)
            constraint.take_all(request.generated)
            done(GrammarError(constraint.error) if constraint.error else constraint)
        except GrammarError as error:
            done(error)
        # An unexpected error in one grammar must not end the thread, which serves all later requests.
        except Exception as error:
            logger.exception("a grammar could not be compiled")
            done(GrammarError(f"The grammar could not be compiled: {error!r}"[:_MAX_ERROR_CHARS]))
        # While the thread waits for work, a reference here would keep the engine from being garbage-collected.
        del job, request, done


def _compiled(tokenizer: LLTokenizer, grammar: str, cache: _Cache) -> LLMatcher:
    """Returns the compiled grammar, from the cache if it is there, as a matcher in its initial state. Raises
    GrammarError if the grammar cannot be compiled."""
    key = sha256(grammar.encode()).digest()
    if (matcher := cache.get(key)) is None:
        matcher = compile_grammar(tokenizer, grammar)
        cache.put(key, matcher, len(grammar))
    return matcher


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Compiles a grammar and returns llguidance's matcher for it, in its initial state. Must be called in a thread that
    `start_deep_thread` started, because the compilation needs a large stack. Raises GrammarError if the grammar is
    wrong or exceeds the limits. Error messages do not repeat the grammar."""
    limits = LLParserLimits(**PARSER_LIMITS, verbose_errors=False)  # pyright: ignore[reportArgumentType]
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # llguidance completes the compilation of large expressions in its first mask
    if matcher.is_error():
        raise GrammarError(f"The grammar cannot be compiled: {matcher.get_error().strip()[:_MAX_ERROR_CHARS]}")
    return matcher
