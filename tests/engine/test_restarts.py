"""When the engine is started again, and when not."""

from __future__ import annotations

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
