from __future__ import annotations

import random
import statistics

import msgspec
import pytest

from jamba_server.engine.errors import ConfigError
from jamba_server.server.cli.bench.client import Failure, Record, Reply
from jamba_server.server.cli.bench.report import (
    Plan,
    Report,
    Slo,
    distribution,
    notes,
    parse_slo,
    rows,
    summarize,
    to_json,
)
from jamba_server.server.cli.bench.runner import ClosedLoop


def reply(start: float, arrivals: tuple[float, ...], *, cached: int | None = None, wanted: int | None = None) -> Reply:
    """Ten prompt tokens; one token an arrival; ends with the last."""
    return Reply(
        start=start,
        arrivals=arrivals,
        end=arrivals[-1],
        prompt_tokens=10,
        output_tokens=len(arrivals),
        max_tokens=wanted or len(arrivals),
        cached_tokens=cached,
    )


def failure(kind: str, message: str) -> Failure:
    return Failure(start=0.0, end=1.0, kind=kind, message=message)


PLAN = Plan(ClosedLoop(2), 5)


def test_percentiles_interpolate_like_the_inclusive_quantiles() -> None:
    values = [random.Random(1).expovariate(3.0) for _ in range(57)]
    found = distribution(values)
    oracle = statistics.quantiles([value * 1000 for value in values], n=100, method="inclusive")
    assert found is not None
    assert found.mean == pytest.approx(statistics.fmean(values) * 1000, rel=1e-12)
    assert [found.p50, found.p90, found.p95, found.p99] == pytest.approx([oracle[i - 1] for i in (50, 90, 95, 99)])


def test_a_distribution_of_one_value_and_of_none() -> None:
    assert distribution([0.25]) == distribution([0.25, 0.25])
    assert distribution([]) is None


def test_latencies_by_definition() -> None:
    one = reply(1.0, (1.5, 1.75, 2.5))
    assert (one.ttft, one.e2el, one.tpot, one.itl) == (0.5, 1.5, 0.5, (0.25, 0.75))
    single = reply(1.0, (1.5,))
    assert (single.ttft, single.e2el, single.tpot, single.itl) == (0.5, 0.5, None, ())


def test_tpot_counts_tokens_and_itl_counts_events() -> None:
    # Five tokens arrived in three events.
    one = msgspec.structs.replace(reply(0.0, (1.0, 2.0, 3.0)), output_tokens=5)
    assert one.tpot == 0.5
    assert one.itl == (1.0, 1.0)


def test_counts_and_rates_are_exact() -> None:
    records: list[Record] = [
        reply(1.0, (1.5, 2.0), cached=4),
        reply(2.0, (2.5, 3.0, 5.0), cached=0, wanted=8),
        failure("http_503", "first"),
        failure("http_503", "second"),
        failure("timeout", "late"),
    ]
    level = summarize(PLAN, records, cpu_seconds=1.25)
    assert level.duration_s == 5.0
    assert (level.planned, level.completed, level.failed, level.short_replies) == (5, 2, 3, 1)
    assert (level.prompt_tokens, level.output_tokens) == (20, 5)
    assert (level.request_throughput, level.output_throughput, level.total_throughput) == (0.4, 1.0, 5.0)
    assert level.cached_share == 0.2
    assert level.client_cpu_share == 0.25
    assert [(error.kind, error.count, error.example) for error in level.errors] == [
        ("http_503", 2, "first"),
        ("timeout", 1, "late"),
    ]
    assert level.goodput is None


def test_cached_share_is_of_the_replies_that_report_it() -> None:
    level = summarize(PLAN, [reply(0.0, (1.0,), cached=5), reply(0.0, (1.0,))])
    assert level.cached_share == 0.5
    assert summarize(PLAN, [reply(0.0, (1.0,))]).cached_share is None


def test_a_level_without_replies_has_no_latencies() -> None:
    level = summarize(PLAN, [failure("connection", "refused")], slo=Slo(ttft=1))
    assert (level.completed, level.failed, level.goodput) == (0, 1, 0.0)
    assert level.ttft_ms is level.tpot_ms is level.itl_ms is level.e2el_ms is None
    assert summarize(PLAN, []).duration_s == 0.0


@pytest.mark.parametrize(
    ("slo", "goodput"),
    [
        (Slo(ttft=500), 0.5),  # the second reply's first token takes 500 ms: at the limit is met
        (Slo(ttft=499), 0.25),
        (Slo(tpot=250), 0.5),  # of one token: no TPOT to miss
        (Slo(e2el=500), 0.25),
        (Slo(ttft=500, e2el=700), 0.25),
        (Slo(ttft=1), 0.0),
    ],
)
def test_goodput_counts_replies_that_meet_every_slo(slo: Slo, goodput: float) -> None:
    records = [reply(0.0, (0.25,)), reply(0.0, (0.5, 0.75)), reply(0.0, (2.0, 4.0)), failure("timeout", "")]
    assert summarize(PLAN, records, slo=slo).goodput == goodput


def test_slos_are_parsed() -> None:
    assert parse_slo(["ttft:500", "e2el:2e3"]) == Slo(ttft=500.0, e2el=2000.0)
    assert parse_slo([]) is None


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:0", "ttft:nan", "ttft:inf", "itl:5", "tpot=5"])
def test_a_wrong_slo_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be NAME:MILLISECONDS with NAME one of ttft, tpot, e2el"):
        parse_slo([text])
    with pytest.raises(ConfigError, match="'ttft:2'"):
        parse_slo(["ttft:1", "ttft:2"])


def test_notes_name_what_was_not_as_asked() -> None:
    records = [reply(0.0, (1.0,), wanted=3), failure("http_503", "No room.")]
    level = summarize(Plan(ClosedLoop(1), 4, left_out=2), records, cpu_seconds=0.9)
    assert notes([level]) == [
        "1 client: 1 x http_503: No room.",
        "1 client: 2 of 4 requests were not sent",
        "1 client: 2 sessions left out, longer than the server's context",
        "1 client: 1 replies are shorter than asked for",
        "1 client: the load generator itself used 90% of a core",
    ]
    assert notes([summarize(Plan(ClosedLoop(1), 1), [reply(0.0, (1.0,))])]) == []


def test_rows_and_json_carry_the_same_numbers() -> None:
    level = summarize(PLAN, [reply(0.0, (0.5, 1.0))], slo=Slo(ttft=1000))
    found = dict(rows([level, level]))
    assert found["output throughput (tok/s)"] == ["2.0", "2.0"]
    assert found["TTFT p99 (ms)"] == found["ITL mean (ms)"] == ["500.0", "500.0"]
    assert found["goodput (req/s)"] == ["1.00", "1.00"]
    assert found["prompt tokens cached (%)"] == ["-", "-"]
    report = Report({"date": "2026-01-01"}, [level])
    assert msgspec.json.decode(to_json(report), type=Report) == report
