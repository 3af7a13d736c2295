"""When the engine is started again, and when not, and what is known of its death."""

from __future__ import annotations

from pathlib import Path

import pytest

from jamba_server.engine.process.deaths import CRASHES, death_by_status, oom_kills
from jamba_server.engine.process.restarts import MAX_BACKOFF_SECONDS, MAX_FAILURES, RestartPolicy


def die(policy: RestartPolicy, *, progress: bool = False, found: bool = False, searching: bool = False) -> float | None:
    if progress:
        policy.progressed()
    return policy.after_death(progress=progress, found=found, searching=searching)


def test_deaths_after_progress_never_count_and_cost_no_delay() -> None:
    policy = RestartPolicy()
    assert [die(policy, progress=True) for _ in range(100)] == [0.0] * 100


def test_three_deaths_without_progress_in_a_row_are_the_end() -> None:
    policy = RestartPolicy()
    assert [die(policy) for _ in range(MAX_FAILURES)] == [1.0, 2.0, None]


def test_progress_breaks_the_row() -> None:
    policy = RestartPolicy()
    assert [die(policy, progress=i % 3 == 2) for i in range(9)] == [1.0, 2.0, 0.0] * 3


def test_the_search_for_a_request_does_not_count_and_finding_it_forgives() -> None:
    policy = RestartPolicy()
    deaths = [die(policy), die(policy), *(die(policy, searching=True) for _ in range(5)), die(policy, found=True)]
    assert deaths == [1.0, 2.0, *[0.0] * 6]
    assert die(policy) == 1.0


def test_an_engine_that_dies_of_every_request_is_given_up() -> None:
    policy = RestartPolicy()
    assert [die(policy, found=True) for _ in range(MAX_FAILURES)] == [0.0, 0.0, None]
    policy = RestartPolicy()
    assert [die(policy, found=True, progress=True) for _ in range(10)] == [0.0] * 10


def test_failed_spawns_are_tried_for_ever_with_growing_delays() -> None:
    policy = RestartPolicy()
    delays = [policy.after_failed_spawn() for _ in range(2000)]
    assert delays[:6] == [1, 2, 4, 8, 16, 30]
    assert set(delays[5:]) == {MAX_BACKOFF_SECONDS}
    assert die(policy) == 1.0, "they do not count as deaths"
    assert policy.after_failed_spawn() == 1.0


def test_a_crash_and_an_exit_are_the_engine_s_own() -> None:
    for number in CRASHES:
        death = death_by_status(-number, loading=False, oom_kills_before=0)
        assert (death.reason, death.from_outside) == ("signal", False)
    death = death_by_status(3, loading=True, oom_kills_before=0)
    assert (death.reason, death.text, death.loading) == ("exit", "the engine process ended with status 3", True)
    assert not death.from_outside


def test_memory_that_was_short_is_told_from_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vmstat = tmp_path / "vmstat"
    monkeypatch.setattr("jamba_server.engine.process.deaths.VMSTAT", vmstat)
    assert oom_kills() is None
    death = death_by_status(-9, loading=False, oom_kills_before=oom_kills())
    assert (death.reason, death.from_outside) == ("signal", False), "it may have been memory"
    vmstat.write_text("nr_free_pages 5\noom_kill 7\n")
    before = oom_kills()
    assert before == 7
    death = death_by_status(-9, loading=False, oom_kills_before=before)
    assert (death.reason, death.from_outside) == ("signal", True)
    vmstat.write_text("nr_free_pages 5\noom_kill 8\n")
    death = death_by_status(-9, loading=False, oom_kills_before=before)
    assert (death.reason, death.from_outside) == ("out_of_memory", False)
    assert "too little memory" in death.text
    assert death_by_status(-15, loading=False, oom_kills_before=before).from_outside
