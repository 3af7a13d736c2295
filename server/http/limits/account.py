"""The class `Account` counts what one API key has used, and refuses requests beyond the key's limits."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager

from jamba_server.engine.errors import RequestRejected
from jamba_server.server.http.errors import RateLimited
from jamba_server.server.http.limits.bucket import Bucket, Clock
from jamba_server.server.http.limits.key_file import Key

# The value of the header Retry-After if a key already has as many running requests as it may have.
BUSY_RETRY_SECONDS = 1


class Account:
    """Counts the requests and tokens of one API key. The argument `key` has the limits; a limit of None does not
    apply."""

    def __init__(self, key: Key, clock: Clock) -> None:
        self.key = key
        self._clock = clock
        self._num_running = 0
        self._requests = None if key.requests_per_minute is None else Bucket(key.requests_per_minute, clock)
        self._tokens = None if key.tokens_per_minute is None else Bucket(key.tokens_per_minute, clock)

    def change(self, key: Key) -> None:
        """Replaces the limits of the key. Earlier requests and tokens still count, except for a limit whose value has
        changed: its count begins anew."""
        if key.requests_per_minute != self.key.requests_per_minute:
            self._requests = None if key.requests_per_minute is None else Bucket(key.requests_per_minute, self._clock)
        if key.tokens_per_minute != self.key.tokens_per_minute:
            self._tokens = None if key.tokens_per_minute is None else Bucket(key.tokens_per_minute, self._clock)
        self.key = key

    @contextmanager
    def request(self) -> Generator[None]:
        """Context manager: counts one request, which runs until the end of the `with` block. Raises RateLimited if the
        request exceeds a limit of the key."""
        limit = self.key.max_concurrent
        if limit is not None and self._num_running >= limit:
            raise RateLimited(
                f"{self._num_running} requests with this API key are running; the limit is {limit}.",
                kind="requests",
                retry_after=BUSY_RETRY_SECONDS,
            )
        if self._tokens is not None and self._tokens.level <= 0:
            raise self._too_many_tokens(self._tokens, 1, "a request needs at least one")
        if self._requests is not None:
            if (wait := self._requests.seconds_until(1)) > 0:
                raise RateLimited(
                    f"This API key may send {self._requests.per_minute} requests per minute.",
                    kind="requests",
                    retry_after=math.ceil(wait),
                )
            self._requests.spend(1)
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    def take_prompt(self, num_tokens: int) -> None:
        """Counts the tokens of a request's prompts, if the key may use that many now.

        Raises RateLimited if the key has too few tokens left at present, and RequestRejected if the prompts have more
        tokens than the key may ever use in one minute.
        """
        if self._tokens is None:
            return
        if num_tokens > self._tokens.per_minute:
            raise RequestRejected(
                f"The prompt has {num_tokens} tokens, but this API key may use {self._tokens.per_minute} tokens per "
                "minute. Shorten the prompt."
            )
        if self._tokens.level < num_tokens:
            raise self._too_many_tokens(self._tokens, num_tokens, f"the prompt has {num_tokens}")
        self._tokens.spend(num_tokens)

    def take_reply(self, num_tokens: int) -> None:
        """Counts tokens that have been generated. They may exceed the key's limit, because a running reply is not cut
        off; later requests are then refused for some time."""
        if self._tokens is not None:
            self._tokens.spend(num_tokens)

    def headers(self) -> dict[str, str]:
        """Returns the headers with the key's limits and with what is left of them, under the names that OpenAI's API
        uses."""
        found: dict[str, str] = {}
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
                found[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level)))
                found[f"x-ratelimit-reset-{kind}"] = duration(bucket.seconds_until(bucket.per_minute))
        return found

    def _too_many_tokens(self, bucket: Bucket, wanted: int, why: str) -> RateLimited:
        return RateLimited(
            f"This API key may use {bucket.per_minute} tokens per minute; {max(0, math.floor(bucket.level))} are left, "
            f"and {why}.",
            kind="tokens",
            retry_after=max(1, math.ceil(bucket.seconds_until(wanted))),
        )


def duration(seconds: float) -> str:
    """Returns a time in the form of OpenAI's headers, such as `120ms`, `7.5s` or `1m30s`."""
    milliseconds = math.ceil(1000 * seconds)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds / 1000, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
