"""Computes latencies and throughput from the recorded times of a benchmark's requests. Writes the results as a table or
JSON.

The definitions are those of `vllm bench serve`:
- TTFT is the time from sending the request to the first event with a token.
- ITL is the gap between two consecutive events with tokens.
- TPOT is (end-to-end latency - TTFT) / (output tokens - 1), for each request.
- Goodput is the number of requests per second that meet every SLO.

Only complete replies count. A rate is a sum divided by the time from the first request's start to the last request's
end. Latencies in reports are in milliseconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from rich.table import Table

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.bench.client import Failure, Record, Reply
from jamba_server.server.cli.bench.runner import Load


class Distribution(msgspec.Struct, frozen=True):
    """Mean and percentiles of one kind of latency, in milliseconds. A percentile is interpolated linearly between the
    two nearest values."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


class ErrorCount(msgspec.Struct, frozen=True):
    """The number of failed requests with one kind of error. The field `example` is the message of the first such
    request."""

    kind: str
    count: int
    example: str


class Slo(msgspec.Struct, frozen=True):
    """Upper limits for a request's latencies in milliseconds. None means no limit.

    A reply of one token has no TPOT, so it meets every limit on TPOT.
    """

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    def met_by(self, reply: Reply) -> bool:
        pairs = ((reply.ttft, self.ttft), (reply.tpot, self.tpot), (reply.e2el, self.e2el))
        return all(value is None or limit is None or value * 1000 <= limit for value, limit in pairs)


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """The latencies, throughput and numbers of requests that were measured at one load.

    `planned` is the number of requests that were to be sent. Planned requests that are neither completed nor failed
    were not sent, because time was up or an earlier turn had failed. `left_out` counts the sessions that exceed the
    server's context; they are not in `planned`. `short_replies` counts replies with fewer tokens than requested.
    `cached_share` is the cached share of the prompt tokens, over the replies that report it, or None if none does.
    `client_cpu_share` is this process's CPU time / duration. Near 1, the load generator limits the result.
    `computed_tokens`, for the workload `decisions` only, is the number of prompt tokens that the server computed.
    """

    load: Load
    planned: int
    left_out: int
    completed: int
    failed: int
    short_replies: int
    errors: list[ErrorCount]
    duration_s: float
    client_cpu_share: float | None
    prompt_tokens: int
    output_tokens: int
    cached_share: float | None
    request_throughput: float
    output_throughput: float
    total_throughput: float
    goodput: float | None
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2el_ms: Distribution | None
    computed_tokens: int | None = None


class Plan(msgspec.Struct, frozen=True):
    """The numbers of requests and sessions at one load, known before sending. The field `planned` is the number of
    requests to send. The field `left_out` is the number of sessions that are too long for the server's context and are
    not sent."""

    load: Load
    planned: int
    left_out: int = 0


class Report(msgspec.Struct, frozen=True):
    """The report of `jamba bench`, which the flag --output writes into a file as JSON."""

    conditions: dict[str, Any]
    levels: list[Level]


def parse_slo(goodput: Iterable[str]) -> Slo | None:
    """Parses limits such as `ttft:500`, `tpot:50` and `e2el:2000`, in milliseconds. Returns None for an empty list.

    Raises ConfigError if a name is unknown or given twice, or a limit is not a number above 0.
    """
    limits: dict[str, float] = {}
    for item in goodput:
        name, _, text = item.partition(":")
        try:
            limit = float(text)
        except ValueError:
            limit = 0.0
        if name not in Slo.__struct_fields__ or name in limits or not 0 < limit < float("inf"):
            raise ConfigError(
                f"--goodput {item!r} must be NAME:MILLISECONDS with NAME one of "
                f"{', '.join(Slo.__struct_fields__)}, each at most once, and more than 0 ms."
            )
        limits[name] = limit
    return Slo(**limits) if limits else None


def distribution(seconds: Iterable[float]) -> Distribution | None:
    values = np.array(list(seconds)) * 1000
    if not values.size:
        return None
    percentiles = np.percentile(values, (50, 90, 95, 99)).tolist()
    return Distribution(float(values.mean()), *percentiles)


def summarize(
    plan: Plan, records: Sequence[Record], *, slo: Slo | None = None, cpu_seconds: float | None = None
) -> Level:
    replies = [record for record in records if isinstance(record, Reply)]
    duration = max((record.end for record in records), default=0.0) - min((r.start for r in records), default=0.0)
    prompt_tokens = sum(reply.prompt_tokens for reply in replies)
    output_tokens = sum(reply.output_tokens for reply in replies)

    def rate(amount: int) -> float:
        return amount / duration if duration > 0 else 0.0

    return Level(
        load=plan.load,
        planned=plan.planned,
        left_out=plan.left_out,
        completed=len(replies),
        failed=len(records) - len(replies),
        short_replies=sum(reply.output_tokens < reply.max_tokens for reply in replies),
        errors=_count_errors(records),
        duration_s=duration,
        client_cpu_share=None if cpu_seconds is None or duration <= 0 else cpu_seconds / duration,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        cached_share=_cached_share(replies),
        request_throughput=rate(len(replies)),
        output_throughput=rate(output_tokens),
        total_throughput=rate(prompt_tokens + output_tokens),
        goodput=None if slo is None else rate(sum(map(slo.met_by, replies))),
        ttft_ms=distribution(reply.ttft for reply in replies),
        tpot_ms=distribution(reply.tpot for reply in replies if reply.tpot is not None),
        itl_ms=distribution(gap for reply in replies for gap in reply.itl),
        e2el_ms=distribution(reply.e2el for reply in replies),
    )


def _cached_share(replies: list[Reply]) -> float | None:
    reporting = [(reply.cached_tokens, reply.prompt_tokens) for reply in replies if reply.cached_tokens is not None]
    prompt_tokens = sum(prompt for _, prompt in reporting)
    return sum(cached for cached, _ in reporting) / prompt_tokens if prompt_tokens else None


def _count_errors(records: Sequence[Record]) -> list[ErrorCount]:
    """Returns the number of failed requests for each kind of failure, the most frequent kind first."""
    failures = [record for record in records if isinstance(record, Failure)]
    examples = {failure.kind: failure.message for failure in reversed(failures)}
    counts = Counter(failure.kind for failure in failures).most_common()
    return [ErrorCount(kind, count, examples[kind]) for kind, count in counts]


def rows(levels: Sequence[Level]) -> list[tuple[str, list[str]]]:
    """Returns the rows of the table. A row is the name of a measured quantity and the value of that quantity at each
    load."""

    def line(name: str, values: Iterable[float | None], digits: int = 1) -> tuple[str, list[str]]:
        return name, ["-" if value is None else f"{value:,.{digits}f}" for value in values]

    lines = [
        line("requests completed", (level.completed for level in levels), 0),
        line("requests failed", (level.failed for level in levels), 0),
        line("duration (s)", (level.duration_s for level in levels)),
        line("request throughput (req/s)", (level.request_throughput for level in levels), 2),
        line("output throughput (tok/s)", (level.output_throughput for level in levels)),
        line("total throughput (tok/s)", (level.total_throughput for level in levels)),
        line("goodput (req/s)", (level.goodput for level in levels), 2),
        line("prompt tokens cached (%)", (_percent(level.cached_share) for level in levels)),
    ]
    for name, key in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("ITL", "itl_ms"), ("E2E", "e2el_ms")):
        for statistic in Distribution.__struct_fields__:
            values = (getattr(getattr(level, key), statistic, None) for level in levels)
            lines.append(line(f"{name} {statistic} (ms)", values))
    return lines


def notes(levels: Sequence[Level]) -> list[str]:
    """Returns notes to print below the table: errors, requests that were not sent, and replies that are too short."""
    found: list[str] = []
    for level in levels:
        found += [f"{level.load}: {error.count} x {error.kind}: {error.example}" for error in level.errors]
        if missing := level.planned - level.completed - level.failed:
            found.append(f"{level.load}: {missing} of {level.planned} requests were not sent")
        if level.left_out:
            found.append(f"{level.load}: {level.left_out} sessions left out, longer than the server's context")
        if level.short_replies:
            found.append(f"{level.load}: {level.short_replies} replies are shorter than asked for")
        if (level.client_cpu_share or 0) > 0.8:
            found.append(f"{level.load}: the load generator itself used {level.client_cpu_share:.0%} of a core")
    return found


def table(levels: Sequence[Level]) -> Table:
    result = Table("", *(str(level.load) for level in levels))
    for column in result.columns[1:]:
        column.justify = "right"
    for name, values in rows(levels):
        result.add_row(name, *values)
    return result


def to_json(report: Report) -> bytes:
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def _percent(share: float | None) -> float | None:
    return None if share is None else share * 100
