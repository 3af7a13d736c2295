"""The class `VectorRun` submits the prompts of one HTTP request to the engine and returns a vector for each."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from starlette.types import Scope

from jamba_server.engine.errors import EngineFailed, Overloaded, RequestRejected
from jamba_server.engine.types import Pooling, Request, RequestKind, SamplingParams, TokenUpdate
from jamba_server.server.http.deadlines import enforced, time_limit_of
from jamba_server.server.http.errors import is_background, progress_hook, request_id_of, tenant_of
from jamba_server.server.http.generation import abort_reason
from jamba_server.server.http.limits.waiting import Admission
from jamba_server.server.http.log_fields import fields
from jamba_server.server.http.metrics import AbortReason
from jamba_server.server.http.services import Services
from jamba_server.server.http.tracing.annotations import annotate

logger = logging.getLogger(__name__)

# The largest number of prompts of one HTTP request that are in the engine at the same time. A request with thousands of
# prompts would otherwise fill the queue, and other clients would be refused.
MAX_PROMPTS_AT_ONCE: Final = 256
_NO_REPLY: Final = SamplingParams(max_tokens=0)

Numbers = NDArray[Any]


@dataclass(frozen=True, slots=True)
class VectorPrompt:
    """A prompt and the vector that is wanted of it. The fields are those of the engine's `Request`."""

    token_ids: list[int]
    kind: RequestKind
    pooling: Pooling = "last"
    targets: tuple[tuple[int, ...], ...] = ()
    save_positions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Vector:
    """float32 numbers, and how many tokens of the prompt were found in the prefix cache."""

    numbers: Numbers
    num_cached: int


class VectorRun:
    """Runs one HTTP request. `name` says in the log and in spans what the request asks for, such as "embeddings"."""

    def __init__(
        self, services: Services, scope: Scope, *, id: str, name: str, priority: int = 0, cache_salt: str = ""
    ) -> None:
        self.id, self._name, self._services, self._scope = id, name, services, scope
        self._priority, self._cache_salt = priority, cache_salt
        self._admission: Admission | None = None
        self._num_tokens = self._num_cached = 0

    @asynccontextmanager
    async def admitted(self, counted: Mapping[str, list[int]]) -> AsyncGenerator[None]:
        """Context manager for all calls of `vectors`. `counted` maps names of prompts to those of their tokens that
        count against the server's and the API key's limits; a token that several prompts share counts once.

        Entering raises Overloaded, RateLimited or RequestRejected if a limit is exceeded. Leaving writes the request's
        line to the log. The block is cancelled, with DeadlineExceeded, when the request's time limit expires.
        """
        services, scope, began = self._services, self._scope, time.monotonic()
        limit = time_limit_of(scope)
        requests = [self._request(name, VectorPrompt(tokens, "embed")) for name, tokens in counted.items()]
        self._num_tokens = sum(map(len, counted.values()))
        with services.admission(requests, limit) as self._admission:
            services.metrics.prompt_tokens += self._num_tokens
            reason: AbortReason | None = None
            try:
                async with enforced(limit):
                    yield
            except BaseException as exc:
                # A refused request has done no work, so it does not count as aborted. Its status is counted elsewhere.
                reason = None if isinstance(exc, Overloaded | RequestRejected) else abort_reason(exc)
                raise
            finally:
                if reason is not None:
                    services.metrics.aborted(reason)
                self._close(reason or "done", time.monotonic() - began)

    async def vectors(self, prompts: Mapping[str, VectorPrompt]) -> dict[str, Vector]:
        """Returns the vector of each prompt, under the name of the prompt. Raises EngineFailed if the engine could not
        run a prompt, or if the model computed numbers that are not finite."""
        found: dict[str, Vector] = {}
        left = iter(prompts.items())
        while part := dict(islice(left, self.at_most(MAX_PROMPTS_AT_ONCE))):
            found |= await self._run(part)
        return found

    @property
    def block_size(self) -> int:
        return self._services.engine.info.block_size

    def at_most(self, number: int) -> int:
        """Returns `number`, or fewer if the queue of the server is shorter (--max-queue-requests)."""
        return min(number, self._services.config.max_queue_requests or number)

    async def _run(self, prompts: Mapping[str, VectorPrompt]) -> dict[str, Vector]:
        metrics, began = self._services.metrics, time.monotonic()
        names = {f"{self.id}-{name}": name for name in prompts}
        found: dict[str, Vector] = {}
        cached = dict.fromkeys(names, 0)
        requests = [self._request(name, prompt) for name, prompt in prompts.items()]
        on_progress, background = progress_hook(self._scope), is_background(self._scope)
        async with self._services.engine.generate(requests) as updates:
            if on_progress is not None:
                on_progress("submitted")
            async for update in updates:
                if update.finish_reason == "error":
                    raise EngineFailed(update.error or "The engine failed to run this request.")
                if self._admission is not None:
                    self._admission.count(update)
                if update.queue_seconds is not None and not background:
                    metrics.queued(update.queue_seconds)
                cached[update.request_id] = update.num_cached or cached[update.request_id]
                if update.finish_reason:
                    metrics.finished(update.finish_reason, None if background else time.monotonic() - began)
                    found[names[update.request_id]] = Vector(_numbers(update), cached[update.request_id])
        self._num_cached += sum(cached.values())
        return found

    def _request(self, name: str, prompt: VectorPrompt) -> Request:
        return Request(
            id=f"{self.id}-{name}",
            prompt=prompt.token_ids,
            params=_NO_REPLY,
            kind=prompt.kind,
            pooling=prompt.pooling,
            targets=prompt.targets,
            parent=self.id,
            tenant=tenant_of(self._scope),
            priority=self._priority,
            save_positions=prompt.save_positions,
            cache_salt=self._cache_salt,
        )

    def _close(self, end: str, seconds: float) -> None:
        id_ = request_id_of(self._scope)
        annotate(
            {
                "gen_ai.operation.name": self._name,
                "gen_ai.request.model": self._services.metrics.model_name,
                "gen_ai.usage.input_tokens": self._num_tokens,
                "gen_ai.usage.cache_read.input_tokens": self._num_cached,
            }
        )
        logger.info(
            "request_id=%s id=%s %s prompt=%d cached=%d e2e=%.3f s finish=%s",
            *(id_, self.id, self._name, self._num_tokens, self._num_cached, seconds, end),
            extra=fields(
                request_id=id_,
                tenant=tenant_of(self._scope),
                prompt_tokens=self._num_tokens,
                cached_tokens=self._num_cached,
                completion_tokens=0,
                seconds=round(seconds, 3),
            ),
        )


def numbered(prompts: Sequence[list[int]]) -> dict[str, list[int]]:
    """Returns the prompts under their positions as names."""
    return {str(position): prompt for position, prompt in enumerate(prompts)}


def _numbers(update: TokenUpdate) -> Numbers:
    numbers = np.frombuffer(update.vector or b"", dtype="<f4")
    if not np.isfinite(numbers).all():
        raise EngineFailed("The model computed numbers that are not finite for this request.")
    return numbers
