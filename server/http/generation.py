"""The class `Generation` submits the prompts of one HTTP request to the engine and yields the pieces of the reply."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field

from jamba_server.engine.errors import EngineDead, EngineError, EngineFailed, RequestRejected
from jamba_server.engine.process.client import Engine, UpdateStream
from jamba_server.engine.types import (
    BACKGROUND_PRIORITY,
    CacheReport,
    CacheUse,
    FinishReason,
    Request,
    SamplingParams,
    TokenUpdate,
)
from jamba_server.server.http.choice import Choice, ChoiceDelta, TextOptions, merge
from jamba_server.server.http.deadlines import TimeLimit, enforced
from jamba_server.server.http.errors import DeadlineExceeded, OnProgress
from jamba_server.server.http.limits.waiting import Admission
from jamba_server.server.http.log_fields import fields
from jamba_server.server.http.metrics import AbortReason, Metrics
from jamba_server.server.http.schemas.base import CompletionTokensDetails, PromptTokensDetails, Timings, Usage
from jamba_server.server.http.schemas.base import FinishReason as ReplyFinishReason
from jamba_server.server.http.schemas.cache_report import JambaCache, jamba_cache
from jamba_server.server.http.tracing.annotations import Value, annotate
from jamba_server.server.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# The names of two attributes of a request's OpenTelemetry span. The values are in seconds. vLLM uses the same names.
QUEUE, FIRST_TOKEN = "gen_ai.latency.time_in_queue", "gen_ai.latency.time_to_first_token"

Clock = Callable[[], float]


class SendTimeout(Exception):
    """The client has read nothing of its reply for --send-timeout seconds, so the generation is aborted."""


# Maps the exception that ended a request to the reason that the metric `aborted_requests` has as a label. The first row
# that fits the exception counts.
_ABORT_REASONS: tuple[tuple[type[BaseException], AbortReason], ...] = (
    (SendTimeout, "send_timeout"),
    (DeadlineExceeded, "deadline"),
    (EngineFailed, "engine_failed"),
    (EngineDead, "engine_dead"),
    (Exception, "error"),
    # asyncio.CancelledError, which cancels the request's task when the client disconnects.
    (BaseException, "disconnect"),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt's token ids and the sampling parameters of the prompt's choices.

    The field `save_positions` has lengths of prefixes of `token_ids`, in tokens. A later request is likely to begin
    with such a prefix, so the model's recurrent state after the prefix is worth saving. The field `message_starts` has
    the positions at which the messages of a conversation begin, if the request asks for an explanation of the cache.
    """

    token_ids: list[int]
    params: SamplingParams
    save_positions: tuple[int, ...] = ()
    message_starts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """The data of a validated HTTP request that the class `Generation` needs.

    The choices are ordered by prompt: first the `n` choices of the first prompt, then the `n` choices of the second
    prompt, and so on. The function `on_progress` is told when the engine has the request, and when a choice has its
    first token.
    """

    id: str
    prompts: tuple[Prompt, ...]
    n: int
    text: TextOptions
    priority: int = 0
    cache_salt: str = ""
    cache: CacheUse = field(default_factory=CacheUse)
    tenant: str = ""
    http_request_id: str = ""
    time_limit: TimeLimit | None = None
    on_progress: OnProgress | None = None

    @property
    def is_background(self) -> bool:
        return self.priority >= BACKGROUND_PRIORITY

    def requests(self) -> list[Request]:
        return [
            Request(
                id=f"{self.id}-{number}-{index}",
                prompt=prompt.token_ids,
                params=prompt.params,
                index=index,
                # The engine lets the choices of one prompt wait for each other, but not those of several prompts.
                group=f"{self.id}-{number}" if self.n > 1 or len(self.prompts) > 1 else "",
                parent=self.id,
                tenant=self.tenant,
                priority=self.priority,
                cache_salt=self.cache_salt,
                cache=self.cache,
                save_positions=prompt.save_positions,
            )
            for number, prompt in enumerate(self.prompts)
            for index in range(self.n)
        ]


def abort_reason(exc: BaseException) -> AbortReason:
    """Returns the reason under which the metrics count a request that this exception has ended."""
    return next(reason for kind, reason in _ABORT_REASONS if isinstance(exc, kind))


class _Timeline:
    """Data about one choice for the metrics and the log: the times at which its first and latest tokens arrived, the
    seconds that it waited in the engine's queue, the number of its prompt tokens found in the prefix cache, and what it
    asked to know about the prefix cache."""

    def __init__(self) -> None:
        self.first_token: float | None = None
        self.last_token: float | None = None
        self.queue_seconds: float | None = None
        self.num_cached: int | None = None
        self.cache: CacheReport | None = None
        self.num_pinned: int | None = None


class Generation:
    """Runs one HTTP request on the engine. An object of this class is used once.

    The metrics count the request's tokens and latencies, even if the request fails or is aborted.
    """

    def __init__(
        self,
        spec: GenerationSpec,
        engine: Engine,
        tokenizer: Tokenizer,
        metrics: Metrics,
        admission: Admission,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        self.spec = spec
        self._engine, self._metrics, self._admission, self._clock = engine, metrics, admission, clock
        self._arrived = clock()
        self._choices = {
            request.id: Choice(request, i, tokenizer, spec.text) for i, request in enumerate(spec.requests())
        }
        self._timelines = {request_id: _Timeline() for request_id in self._choices}

    @property
    def num_choices(self) -> int:
        return len(self._choices)

    @property
    def usage(self) -> Usage:
        """The numbers of prompt tokens, cached prompt tokens and generated tokens up to now. Each prompt counts once,
        even if it has several choices."""
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.spec.prompts)
        generated = sum(choice.num_tokens for choice in self._choices.values())
        first_choices = list(self._timelines.values())[:: self.spec.n]
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=generated,
            total_tokens=prompt_tokens + generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(t.num_cached or 0 for t in first_choices)),
            completion_tokens_details=CompletionTokensDetails(
                reasoning_tokens=sum(choice.num_reasoning_tokens for choice in self._choices.values())
            ),
        )

    @property
    def timings(self) -> Timings:
        """Returns how long the phases of the request have taken up to now."""
        timelines = self._timelines.values()
        queue = max((t.queue_seconds or 0.0 for t in timelines), default=0.0)
        first = max((t.first_token for t in timelines if t.first_token), default=self._arrived + queue)
        last = max((t.last_token for t in timelines if t.last_token), default=first)
        prompt_seconds, predicted_seconds = max(first - self._arrived - queue, 0.0), last - first
        usage = self.usage
        num_computed = usage.prompt_tokens - usage.prompt_tokens_details.cached_tokens
        return Timings(
            cache_n=usage.prompt_tokens_details.cached_tokens,
            prompt_n=num_computed,
            prompt_ms=1000 * prompt_seconds,
            prompt_per_second=num_computed / prompt_seconds if prompt_seconds else 0.0,
            predicted_n=usage.completion_tokens,
            predicted_ms=1000 * predicted_seconds,
            predicted_per_second=usage.completion_tokens / predicted_seconds if predicted_seconds else 0.0,
            queue_ms=1000 * queue,
        )

    @property
    def cache(self) -> JambaCache | None:
        """What the prefix cache had for the prompt of the first choice, or None if the request does not ask for it or
        has not started yet."""
        timeline, prompt = next(iter(self._timelines.values())), self.spec.prompts[0]
        if timeline.cache is None:
            return None
        return jamba_cache(timeline.cache, prompt.message_starts, timeline.num_pinned)

    @asynccontextmanager
    async def run(self) -> AsyncGenerator[AsyncIterator[ChoiceDelta]]:
        """Yields an iterator over the deltas of all choices, in the order in which the deltas arrive.

        At the beginning of the `async with` block the choices are submitted to the engine, which raises Overloaded or
        EngineDead if it cannot accept them. Before that, the limit on waiting prompt tokens and the limits of the
        client's API key are checked, which raises Overloaded, RateLimited or RequestRejected. Entering and iterating
        raise DeadlineExceeded when the request's time limit expires. At the end of the block, also after an exception,
        all choices that are still running are aborted.
        """
        with self._admission:
            async with AsyncExitStack() as stack:
                updates = await self._submit(stack)
                if self.spec.on_progress is not None:
                    self.spec.on_progress("submitted")
                reason: AbortReason = "disconnect"
                try:
                    async with enforced(self.spec.time_limit), aclosing(self._deltas(updates)) as deltas:
                        yield deltas
                except BaseException as exc:
                    reason = abort_reason(exc)
                    raise
                finally:
                    self._close(reason)

    async def _submit(self, stack: AsyncExitStack) -> UpdateStream:
        """Submits the choices until the end of `stack`. This takes time only where another server computes the prompt
        first (`http/prefill`)."""
        requests = [choice.request for choice in self._choices.values()]
        try:
            async with enforced(self.spec.time_limit):
                return await stack.enter_async_context(self._engine.generate(requests))
        except (asyncio.CancelledError, DeadlineExceeded) as exc:
            self._close(abort_reason(exc))
            raise

    async def collect(self) -> list[ChoiceDelta]:
        """Runs the request to its end. Returns one delta with the whole text of each choice, ordered by the index."""
        parts: list[list[ChoiceDelta]] = [[] for _ in self._choices]
        async with self.run() as deltas:
            async for delta in deltas:
                parts[delta.index].append(delta)
        return [merge(part) for part in parts]

    async def _deltas(self, updates: UpdateStream) -> AsyncGenerator[ChoiceDelta]:
        num_open = len(self._choices)
        async for update in updates:
            if update.finish_reason == "error":
                raise _failure(update, self._choices[update.request_id].request.params)
            choice = self._choices[update.request_id]
            self._observe(choice, update)
            delta = choice.take(update)
            if choice.finish_reason:
                num_open -= 1
                self._finished(choice, _engine_reason(choice.finish_reason))
                # The engine does not know stop strings. If a stop string ended the choice, the engine must abort it.
                if update.finish_reason is None:
                    updates.abort(update.request_id)
            if delta is not None:
                yield delta
        assert num_open == 0, f"the engine left {num_open} choices of {self.spec.id} without an end"

    # The following methods update the metrics and write the request's line to the log --------------------------------

    def _observe(self, choice: Choice, update: TokenUpdate) -> None:
        self._admission.count(update)
        timeline, now = self._timelines[update.request_id], self._clock()
        if update.num_cached is not None:
            timeline.num_cached = update.num_cached
            if choice.request.index == 0:
                self._metrics.prompt_tokens += len(choice.request.prompt)
        timeline.cache = timeline.cache or update.cache
        timeline.num_pinned = update.num_pinned if timeline.num_pinned is None else timeline.num_pinned
        if update.queue_seconds is not None:
            timeline.queue_seconds = update.queue_seconds
            if not self.spec.is_background:
                self._metrics.queued(update.queue_seconds)
        if not update.token_ids:
            return
        self._metrics.generation_tokens += len(update.token_ids)
        last, timeline.last_token = timeline.last_token, now
        if last is None:
            timeline.first_token = now
            if self.spec.on_progress is not None:
                self.spec.on_progress("first_token")
        if self.spec.is_background:
            return  # lines of batches wait for others on purpose, so their times would make the latencies look bad
        if last is None:
            self._metrics.first_token(now - self._arrived)
        else:
            self._metrics.next_token((now - last) / len(update.token_ids))

    def _finished(self, choice: Choice, reason: FinishReason) -> None:
        if self.spec.is_background:
            self._metrics.finished(reason, None)
            return
        timeline, per_token = self._timelines[choice.request.id], None
        if timeline.first_token is not None and timeline.last_token is not None and choice.num_tokens > 1:
            per_token = (timeline.last_token - timeline.first_token) / (choice.num_tokens - 1)
        self._metrics.finished(reason, self._clock() - self._arrived, per_token)

    def _close(self, reason: AbortReason) -> None:
        """Counts the request's end in the metrics, in the span and in the log. `reason` says why the choices that have
        not ended are aborted."""
        end: FinishReason = "abort" if reason in ("disconnect", "send_timeout", "deadline") else "error"
        ends: list[str] = [choice.finish_reason or end for choice in self._choices.values()]
        for choice in self._choices.values():
            if choice.finish_reason is None:
                self._finished(choice, end)
                self._metrics.aborted(reason)
        usage, timelines = self.usage, self._timelines.values()
        queue = max((t.queue_seconds for t in timelines if t.queue_seconds is not None), default=None)
        first = min((t.first_token - self._arrived for t in timelines if t.first_token), default=None)
        annotate(self._attributes(usage, ends) | {QUEUE: queue, FIRST_TOKEN: first})
        logger.info(
            "request_id=%s id=%s prompt=%d cached=%d generated=%d queue=%s ttft=%s e2e=%.3f s finish=%s",
            self.spec.http_request_id,
            self.spec.id,
            usage.prompt_tokens,
            usage.prompt_tokens_details.cached_tokens,
            usage.completion_tokens,
            _seconds(queue),
            _seconds(first),
            self._clock() - self._arrived,
            ",".join(sorted(set(ends))),
            extra=fields(
                request_id=self.spec.http_request_id,
                tenant=self.spec.tenant,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.prompt_tokens_details.cached_tokens,
                completion_tokens=usage.completion_tokens,
                seconds=round(self._clock() - self._arrived, 3),
            ),
        )

    def _attributes(self, usage: Usage, ends: list[str]) -> dict[str, Value | None]:
        """Returns attributes for the request's span, named as in OpenTelemetry's conventions for generative AI."""
        params = self.spec.prompts[0].params
        return {
            "gen_ai.operation.name": "text_completion" if self.spec.id.startswith("cmpl-") else "chat",
            "gen_ai.request.model": self._metrics.model_name,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.choice.count": self.spec.n,
            "gen_ai.response.id": self.spec.id,
            "gen_ai.response.finish_reasons": ends,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.prompt_tokens_details.cached_tokens,
        }


def _failure(update: TokenUpdate, params: SamplingParams) -> EngineError:
    """Returns the exception for an update with the finish reason "error"."""
    message = update.error or "The engine failed to run this request."
    if update.contradictory:
        return RequestRejected(message, param="allowed_token_ids" if params.allowed_token_ids else "bad_words")
    return EngineFailed(message)


def _engine_reason(reason: ReplyFinishReason) -> FinishReason:
    """Returns the finish reason under which the metrics count a choice. The metrics have no finish reason for tool
    calls and count "stop" instead."""
    return "stop" if reason == "tool_calls" else reason


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"
