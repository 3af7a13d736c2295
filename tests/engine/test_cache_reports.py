"""Why no more of a prompt came from the cache."""

from __future__ import annotations

import pytest

from jamba_server.engine.scheduler import Scheduler
from jamba_server.engine.types import CacheReport, CacheUse, Request, SamplingParams
from tests.engine.simulator import Simulator, make_scheduler

TEXT = list(range(100, 140))


class Engine:
    def __init__(self, **sizes: int | bool) -> None:
        self.scheduler: Scheduler = make_scheduler(block_size=4, **sizes)  # type: ignore[arg-type]
        self.simulator, self.number = Simulator(self.scheduler), 0

    def run(self, prompt: list[int], *, use: CacheUse | None = None, **fields: object) -> CacheReport:
        self.number += 1
        params = fields.pop("params", SamplingParams(max_tokens=1))
        request = Request(
            id=str(self.number),
            prompt=prompt,
            params=params,  # type: ignore[arg-type]
            cache=use or CacheUse(explain=True),
            **fields,  # type: ignore[arg-type]
        )
        self.scheduler.add([request], now=0.0)
        reports: list[CacheReport] = []
        while self.scheduler.has_work:
            reports += [u.cache for u in self.simulator.step(lambda _: 1) if u.cache is not None]
        [report] = reports
        return report


def test_the_longest_hit_is_complete() -> None:
    engine = Engine()
    assert engine.run(TEXT) == CacheReport(reason="not_seen")
    assert engine.run(TEXT) == CacheReport(
        kv_tokens=39, state_tokens=36, used_tokens=36, tier="device", reason="complete"
    )


def test_pages_without_a_state() -> None:
    engine = Engine()
    engine.run(TEXT)
    report = engine.run([*TEXT[:22], *[1] * 20])
    assert report == CacheReport(kv_tokens=22, differs=True, reason="no_state", missed={"no_state": 20})
    report = engine.run([*TEXT[:22], *[2] * 20])
    assert (report.kv_tokens, report.used_tokens, report.reason) == (22, 20, "not_seen")


def test_evicted() -> None:
    engine = Engine(num_pages=14, max_model_len=44)
    engine.run(TEXT)
    engine.run([t + 100 for t in TEXT])
    report = engine.run(TEXT)
    assert report.reason == "evicted"
    assert report.missed["evicted"] > 0


def test_a_state_is_gone_with_the_pages_that_it_needs() -> None:
    engine = Engine()
    engine.run(TEXT)
    cache = engine.scheduler.cache
    keys = cache.page_keys(next(iter(engine.simulator.texts)), 9)
    cache.pages.forget(keys[4])
    report = engine.run(TEXT)
    assert (report.kv_tokens, report.state_tokens, report.used_tokens) == (16, 0, 0)


def test_salts_of_the_same_tenant_only() -> None:
    engine = Engine()
    engine.run(TEXT, cache_salt="a", tenant="x")
    assert engine.run(TEXT, cache_salt="b", tenant="y").reason == "not_seen"
    report = engine.run([*TEXT, 5], cache_salt="c", tenant="x")
    assert (report.reason, report.missed) == ("salt", {"salt": 40})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"use": CacheUse(explain=True, read=False)}, "read_disabled"),
        ({"params": SamplingParams(max_tokens=1, prompt_logprobs=0)}, "prompt_logprobs"),
    ],
)
def test_requests_that_do_not_read(fields: dict[str, object], reason: str) -> None:
    engine = Engine()
    engine.run(TEXT)
    report = engine.run(TEXT, **fields)  # type: ignore[arg-type]
    assert (report.reason, report.used_tokens, report.kv_tokens) == (reason, 0, 39)


def test_short_prompts_and_no_cache() -> None:
    assert Engine().run([5]).reason == "too_short"
    engine = Engine()
    assert engine.run([5, 6, 7]).reason == "not_seen"
    assert engine.run([5, 6, 7]) == CacheReport(
        kv_tokens=2, state_tokens=2, used_tokens=2, tier="device", reason="complete"
    )
    assert Engine(caching=False).run(TEXT).reason == "disabled"


def test_a_request_that_waited_says_so() -> None:
    engine = Engine(num_pages=200, max_num_batched_tokens=16)
    for i in range(2):
        request = Request(
            id=f"w{i}", prompt=[*range(100), i], params=SamplingParams(max_tokens=1), cache=CacheUse(explain=True)
        )
        engine.scheduler.add([request], now=0.0)
    waited: dict[str, bool] = {}
    while engine.scheduler.has_work:
        waited |= {u.request_id: u.cache.waited for u in engine.simulator.step(lambda _: 1) if u.cache is not None}
    assert waited == {"w0": False, "w1": True}
