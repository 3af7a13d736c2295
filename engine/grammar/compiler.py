"""The class `GrammarCompiler` compiles the grammars that replies must follow. It uses a separate thread, so that no
step of the engine waits for a compilation."""

from __future__ import annotations

import logging
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from jamba_server.engine.checkpoint import MAX_TOKENIZER_BYTES, TOKENIZER_FILE, open_checkpoint, read_text
from jamba_server.engine.errors import CheckpointError
from jamba_server.engine.grammar.constraint import Constraint
from jamba_server.engine.grammar.deep_thread import start_deep_thread
from jamba_server.engine.grammar.limits import PARSER_LIMITS
from jamba_server.engine.round_robin import RoundRobin
from jamba_server.engine.types import Request

logger = logging.getLogger(__name__)

# The cache of compiled grammars holds grammars of at most this many characters in total. The compiled form of a large
# grammar takes about 200 bytes of memory for each character.
MAX_CACHED_CHARS = 1 << 20
SLOW_SECONDS = 0.1  # a grammar is known to take long if its compilation has taken more CPU time than this
_MAX_TOOK_LONG = 4096  # at most this number of grammars are known to take long
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
    matcher in its initial state; requests get copies of it. The keys are hashes of grammars. The cache has no lock,
    because only the compiler's thread uses it."""

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


class _Job(NamedTuple):
    """A request whose grammar must be compiled. The compiler's thread calls `done` with the result, unless `is_wanted`
    returns false when the grammar's turn comes. `key` is the hash of the grammar."""

    request: Request
    done: Done
    is_wanted: Callable[[], bool]
    key: bytes


class GrammarCompiler:
    """Compiles the grammars of requests and makes a `Constraint` from each of them.

    A thread does this work, one grammar at a time. The tenants (API keys) take turns. A grammar that took long before
    and is no longer cached waits until there is no other one. The thread first loads the tokenizer, which takes about
    0.4 s. It ends when this object is garbage-collected.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        start_deep_thread(_work, self._jobs, _Tokenizing(folder, vocab_size, eos_token_ids))
        weakref.finalize(self, self._jobs.put, None)

    def start(self, request: Request, done: Done, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Compiles the grammar of `request` in the compiler's thread. That thread then calls `done`, either with the
        error or with a constraint that has been advanced over the tokens which the reply already has. It does neither
        if `is_wanted` returns false when the turn of the grammar comes, for example because the request was aborted."""
        self._jobs.put(_Job(request, done, is_wanted, sha256(request.params.grammar.encode()).digest()))


def _work(jobs: SimpleQueue[_Job | None], tokenizing: _Tokenizing) -> None:
    work = _Work(tokenizing)
    while work.collect(jobs):
        work.do_next()


class _Work:
    """The work of the compiler's thread. No other thread uses this object."""

    def __init__(self, tokenizing: _Tokenizing) -> None:
        self._cache, self._eos_token_ids = _Cache(), tokenizing.eos_token_ids
        self._quick, self._slow = RoundRobin[_Job](), RoundRobin[_Job]()
        # These are the keys of the last grammars that took more than SLOW_SECONDS to compile, the latest one last.
        self._took_long: OrderedDict[bytes, None] = OrderedDict()
        self._tokenizer: LLTokenizer | GrammarError
        try:
            self._tokenizer = load_tokenizer(tokenizing.folder, tokenizing.vocab_size, tokenizing.eos_token_ids)
        except GrammarError as error:
            self._tokenizer = error
        # A panic of llguidance, which is written in Rust, is an exception that is no subclass of Exception. No error
        # may end this thread, because all requests with grammars wait for it.
        except BaseException as error:
            logger.exception("the tokenizer cannot be used with grammars")
            self._tokenizer = GrammarError(f"This model cannot follow grammars: {error!r}"[:_MAX_ERROR_CHARS])

    def collect(self, jobs: SimpleQueue[_Job | None]) -> bool:
        """Takes all new jobs, and waits for one if there is no other work. Returns false if there are no more jobs."""
        while not jobs.empty() or not (self._quick or self._slow):
            if (job := jobs.get()) is None:
                return False
            is_slow = job.key in self._took_long and job.key not in self._cache.matchers
            (self._slow if is_slow else self._quick).put(job.request.tenant, job)
        return True

    def do_next(self) -> None:
        """Makes the constraint of the next job. While this thread waits for more, it keeps no reference to this job,
        which would keep the engine from being garbage-collected."""
        job = (self._quick or self._slow).pop()
        try:
            if job.is_wanted():
                job.done(self._constraint(job.request, job.key))
        except GrammarError as error:
            job.done(error)
        except BaseException as error:
            logger.exception("a grammar could not be compiled")
            job.done(GrammarError(f"The grammar could not be compiled: {error!r}"[:_MAX_ERROR_CHARS]))

    def _constraint(self, request: Request, key: bytes) -> Constraint:
        constraint = Constraint(request.params, self._compiled(request.params.grammar, key), self._eos_token_ids)
        constraint.take_all(request.generated)
        if constraint.error:
            raise GrammarError(constraint.error)
        return constraint

    def _compiled(self, grammar: str, key: bytes) -> LLMatcher:
        """Returns the compiled grammar, from the cache if it is there, as a matcher in its initial state. Raises
        GrammarError if the grammar cannot be compiled."""
        if isinstance(self._tokenizer, GrammarError):
            raise GrammarError(str(self._tokenizer))
        if (matcher := self._cache.get(key)) is None:
            before = time.thread_time()
            matcher = compile_grammar(self._tokenizer, grammar)
            if time.thread_time() - before > SLOW_SECONDS:
                self._took_long[key] = None
                self._took_long.move_to_end(key)
                if len(self._took_long) > _MAX_TOOK_LONG:
                    self._took_long.popitem(last=False)
            self._cache.put(key, matcher, len(grammar))
        return matcher.deep_copy()


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
