"""What tenants may do, counted for several workers together."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import pytest

from agentstate.api import limits
from agentstate.api.limits import Limits, Rate

SELDOM = 0.001  # a second: nobody waits for the next one


def in_worker(number: int, shared: Limits, act: Callable[[], object]) -> None:
    """Do something as a worker, which then ends."""

    def work() -> None:
        shared.join(number)
        act()

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    worker.join()
    assert worker.exitcode == 0


def test_a_tenant_that_was_quiet_may_do_a_burst_and_others_lose_nothing_by_it() -> None:
    shared = Limits()
    assert [shared.take("a", Rate.REQUESTS, 2 * SELDOM) for _ in range(1)] == [0.0]
    assert shared.take("a", Rate.REQUESTS, SELDOM) == pytest.approx(1 / SELDOM, rel=0.05)
    assert shared.take("b", Rate.REQUESTS, SELDOM) == 0.0
    assert shared.take("a", Rate.HINTS, SELDOM) == 0.0, "hints are counted for themselves"


def test_a_burst_is_of_two_seconds() -> None:
    shared = Limits()
    # So many are done before the clock gives another one.
    assert [shared.take("a", Rate.REQUESTS, 5.0) == 0.0 for _ in range(10)] == [True] * 10


def test_what_one_worker_takes_another_does_not_have() -> None:
    shared = Limits(2)
    shared.join(1)

    def take() -> None:
        assert shared.take("a", Rate.REQUESTS, SELDOM) == 0.0

    in_worker(2, shared, take)
    assert shared.take("a", Rate.REQUESTS, SELDOM) > 0


def test_turns_are_counted_over_all_workers_and_those_of_a_dead_one_have_ended() -> None:
    shared = Limits(2)
    shared.join(1)
    begun = shared.begin("a", 3)
    assert begun is not None
    in_worker(2, shared, lambda: [shared.begin("a", 3), shared.begin("a", 3)])
    assert shared.begin("a", 3) is None
    assert shared.begin("b", 3) is not None
    shared.end(begun)
    assert shared.begin("a", 3) is not None
    in_worker(2, shared, lambda: None)  # the successor
    assert [shared.begin("a", 3) is not None for _ in range(3)] == [True, True, False]


def test_any_number_may_run_where_there_is_no_limit() -> None:
    shared = Limits()
    rows = [shared.begin("a", 0) for _ in range(100)]
    assert None not in rows and shared.begin("a", 100) is None
    assert (shared.running("a"), shared.running("b")) == (100, 0)


def test_of_very_many_tenants_those_that_run_something_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_key", lambda tenant: b"\1" + f"{tenant:<7}".encode())
    shared = Limits()
    assert shared.begin("busy", 1) is not None
    for number in range(100):
        assert shared.take(f"t{number}", Rate.REQUESTS, SELDOM) == 0.0
    assert shared.begin("busy", 1) is None
    assert shared.take("t99", Rate.REQUESTS, SELDOM) > 0
    assert shared.take("t0", Rate.REQUESTS, SELDOM) == 0.0, "the one that was quiet for longest is"
