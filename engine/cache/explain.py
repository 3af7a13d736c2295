"""Explains how much of a prompt came from the prefix cache, and why not more.

The reasons, in the order in which they are tried:

    disabled         the server runs without prefix caching
    prompt_logprobs  the request asks for log-probabilities of its prompt, so every token must be computed
    read_disabled    the request asked not to read the cache
    complete         no more can be reused: a hit ends at a page boundary or where a state was saved
    too_short        a prompt of one token, which must be computed
    no_state         the keys and values are there, but no state was saved after them
    evicted          the keys and values, or the state, were evicted
    salt             requests of the same tenant with another salt have cached more of this prefix
    not_seen         no request has computed this prefix, as far as the cache remembers
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Protocol, get_args

import msgspec

from jamba_server.engine.cache.keys import chain
from jamba_server.engine.cache.manager import CacheManager, PrefixHit
from jamba_server.engine.sequence import RestoredPrefix, Sequence
from jamba_server.engine.types import CacheReport, CacheTier, MissReason

MAX_SALTS = 8  # the largest number of salts that are remembered of one tenant
MAX_TENANTS = 256


class Chunk(Protocol):
    """The part of `scheduler.Chunk` that this module uses."""

    @property
    def sequence(self) -> Sequence: ...

    @property
    def start(self) -> int: ...


class Salts:
    """The salts that each tenant has used most recently. An explanation compares salts of one tenant only, so that it
    tells nobody what other tenants have sent."""

    def __init__(self) -> None:
        self._salts: OrderedDict[str, OrderedDict[str, None]] = OrderedDict()

    def add(self, tenant: str, salt: str) -> None:
        salts = self._salts.setdefault(tenant, OrderedDict())
        self._salts.move_to_end(tenant)
        salts[salt] = None
        salts.move_to_end(salt)
        if len(salts) > MAX_SALTS:
            salts.popitem(last=False)
        if len(self._salts) > MAX_TENANTS:
            self._salts.popitem(last=False)

    def others(self, tenant: str, salt: str) -> Iterator[str]:
        return (other for other in self._salts.get(tenant, ()) if other != salt)


@dataclass(slots=True)
class PrefixCounts:
    """Counts prompt tokens by what the prefix cache had for them. `joined` counts requests that waited until another
    request had computed their prefix, and `tiers` counts hits by the place where the state was stored."""

    queries: int = 0
    hits: int = 0
    no_state: int = 0
    evicted: int = 0
    not_seen: int = 0
    read_disabled: int = 0
    joined: int = 0
    tiers: Counter[CacheTier] = field(default_factory=Counter[CacheTier])
    _totals: dict[str, int] | None = None  # what `totals` has returned, until something else is counted

    @property
    def totals(self) -> Mapping[str, int]:
        """Returns the counts by the names of the fields of `EngineStats`."""
        if self._totals is None:
            self._totals = {
                "prefix_queries_total": self.queries,
                "prefix_hits_total": self.hits,
                **{f"hits_{tier}_total": self.tiers[tier] for tier in get_args(CacheTier)},
                "missed_no_state_total": self.no_state,
                "missed_evicted_total": self.evicted,
                "missed_not_seen_total": self.not_seen,
                "missed_read_disabled_total": self.read_disabled,
                "num_joined_total": self.joined,
            }
        return self._totals

    def add(self, cache: CacheManager, seq: Sequence, hit: PrefixHit) -> None:
        """Counts a sequence that starts for the first time with the cached prefix `hit`."""
        self._totals = None
        self.joined += seq.has_waited
        if seq.params.prompt_logprobs is not None or not cache.enabled:
            return
        if not seq.request.cache.read:
            self.read_disabled += seq.num_prompt
            return
        if not seq.reads_cache:
            return
        self.queries += seq.num_prompt
        self.hits += seq.num_cached
        self.tiers[_source(seq, hit).tier] += seq.num_cached
        # `hit` may also count generated tokens, which `left` excludes from the counts below
        left = seq.num_prompt - seq.num_cached
        no_state = min(hit.missed_no_state, left)
        evicted = min(hit.missed_evicted, left - no_state)
        self.no_state += no_state
        self.evicted += evicted
        self.not_seen += left - no_state - evicted


def explain(cache: CacheManager, seq: Sequence, hit: PrefixHit, salts: Salts) -> CacheReport:
    """Returns the explanation for a sequence that starts with the cached prefix `hit`."""
    used, source = seq.num_cached, _source(seq, hit)
    found = hit if seq.reads_cache else cache.match(seq, len(seq.tokens) - 1)
    shared, differs = cache.shared_tokens(seq, found)
    kv_tokens = min(max(shared, found.num_tokens), seq.num_prompt)
    missed: dict[MissReason, int] = {"no_state": found.missed_no_state, "evicted": found.missed_evicted}
    if seq.reads_cache and cache.enabled:
        missed["salt"] = max(0, _tokens_under_other_salts(cache, seq, salts) - max(kv_tokens, used))
    left = seq.num_prompt - used
    missed = {reason: min(count, left) for reason, count in missed.items() if count}
    return CacheReport(
        kv_tokens=kv_tokens,
        differs=differs and kv_tokens == shared < seq.num_prompt - 1,
        state_tokens=min(cache.deepest_state(seq, found), seq.num_prompt),
        used_tokens=used,
        tier=source.tier if used else None,
        restore_seconds=source.seconds if used else 0.0,
        reason=_reason(cache, seq, kv_tokens, missed),
        missed=missed,
        waited=seq.has_waited,
    )


def record_restores(chunks: Iterable[Chunk], seconds: float) -> None:
    """Adds to the reports of the sequences that start in a step how long the step's copies of saved states took."""
    for chunk in chunks:
        if (report := chunk.sequence.report) is not None and 0 < report.used_tokens == chunk.start:
            seconds_in_all = report.restore_seconds + seconds
            chunk.sequence.report = msgspec.structs.replace(report, restore_seconds=seconds_in_all)


def _source(seq: Sequence, hit: PrefixHit) -> RestoredPrefix:
    """Returns where the state was stored that `hit` found on the device."""
    if (restored := seq.restored) is not None and restored.end == hit.num_tokens:
        return restored
    return RestoredPrefix("device", hit.num_tokens, 0.0)


def _reason(cache: CacheManager, seq: Sequence, kv_tokens: int, missed: dict[MissReason, int]) -> MissReason:
    limit, used = seq.num_prompt - 1, seq.num_cached
    if not cache.enabled:
        return "disabled"
    if seq.params.prompt_logprobs is not None:
        return "prompt_logprobs"
    if not seq.request.cache.read:
        return "read_disabled"
    if limit == 0:
        return "too_short"
    if used >= limit or (used and kv_tokens >= limit - limit % cache.block_size and limit - used < cache.block_size):
        return "complete"
    lost: list[MissReason] = [reason for reason in ("no_state", "evicted") if missed.get(reason)]
    if lost:
        return max(lost, key=lambda reason: missed[reason])
    if missed.get("salt"):
        return "salt"
    return "no_state" if kv_tokens >= limit else "not_seen"


def _tokens_under_other_salts(cache: CacheManager, seq: Sequence, salts: Salts) -> int:
    """Returns how many tokens of the prompt are in cached pages of requests with another salt of the same tenant."""
    size, request = cache.block_size, seq.request
    longest = 0
    for salt in salts.others(request.tenant, request.cache_salt):
        key, position = sha256(salt.encode()).digest(), 0
        while position + size <= seq.num_prompt:
            key = chain(key, seq.tokens[position : position + size])
            if cache.pages.lookup(key) is None:
                break
            position += size
        longest = max(longest, position)
    return longest
