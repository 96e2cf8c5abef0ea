"""Which queued request goes first, with stand-ins for the scheduler and the tree."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from tree import FCFS, Stage, key_of, request, running_request, scheduler

from engine_patch.order import _STEPS
from engine_patch.sglang_api import CacheAgnosticPolicy, RadixKey

AGING_S = 10.0


@pytest.fixture
def stage() -> Stage:
    return Stage(aging_s=AGING_S)


def stored(stage: Stage, rid: str, tokens: int, seed: int, on_device: int = 0, **fields: Any) -> Any:
    """A request with a stored context of ``tokens``, of which some are on the device."""
    stage.store(key_of(tokens, seed))
    if on_device:
        bring(stage, key_of(on_device, seed))
    req = request(key_of(tokens + 3, seed), rid, **fields)
    stage.order.queueing(req)
    stage.match(req)
    return req


def bring(stage: Stage, key: RadixKey) -> None:
    """Put pages on the device."""
    stage.cache.insert(SimpleNamespace(key=key))


def age(stage: Stage, engine: Any, seconds: float) -> None:
    """Let time pass, and as many steps as it takes the ranks to agree on it."""
    stage.now_s += seconds
    for _ in range(_STEPS):
        stage.step(engine)


def test_what_lacks_least_goes_first(stage: Stage) -> None:
    waiting = [
        stored(stage, "much", 80, 0),
        stored(stage, "less", 40, 1),
        stored(stage, "as little", 80, 2, on_device=76),
        stored(stage, "little", 20, 3, on_device=16),
        request(key_of(30, 4), "new"),
    ]
    engine = scheduler(waiting=waiting)
    assert stage.step(engine) == ["as little", "little", "new", "less", "much"]
    # SGLang's queue stays in order of arrival.
    assert engine.waiting_queue == waiting
    stage.step(engine)
    assert (stage.order_stats.delayed, stage.order_stats.aged) == (2, 0)


def test_what_is_on_the_device_is_never_delayed(stage: Stage) -> None:
    """However much of it is new."""
    there = [stored(stage, rid, 40, seed, on_device=40) for rid, seed in (("first", 0), ("second", 1))]
    there[0] = request(RadixKey(key_of(40).token_ids + key_of(35, 9).token_ids), "first")
    stage.match(there[0])
    engine = scheduler(waiting=[there[0], stored(stage, "little", 4, 2), there[1]])
    assert stage.step(engine) == ["first", "second", "little"]


def test_a_request_is_delayed_no_longer_than_that(stage: Stage) -> None:
    large, small = stored(stage, "large", 80, 0), stored(stage, "small", 20, 1)
    engine = scheduler(waiting=[large, small])
    age(stage, engine, AGING_S - 1)
    assert stage.step(engine) == ["small", "large"]
    larger, new = stored(stage, "larger", 120, 3), stored(stage, "new", 20, 2)
    engine.waiting_queue += [larger, new]
    age(stage, engine, 1)
    assert stage.step(engine) == ["large", "small", "new", "larger"]
    # In order of arrival, and before what is on the device.
    engine.waiting_queue.append(stored(stage, "there", 40, 4, on_device=40))
    age(stage, engine, AGING_S - 2)
    assert stage.step(engine) == ["large", "small", "there", "new", "larger"]
    age(stage, engine, 1)
    assert stage.step(engine) == ["large", "small", "larger", "new", "there"]
    assert stage.order_stats.aged == 4


def test_one_that_has_waited_long_goes_before_nobody_who_came_earlier(stage: Stage) -> None:
    there, large, small = (
        stored(stage, rid, tokens, seed, on_device)
        for seed, (rid, tokens, on_device) in enumerate([("there", 40, 40), ("large", 80, 0), ("small", 20, 0)])
    )
    engine = scheduler(waiting=[there, large, small])
    age(stage, engine, AGING_S)
    assert stage.step(engine) == ["there", "large", "small"]
    assert stage.order_stats.aged == 1


def test_ranks_agree_on_who_has_waited_long(stage: Stage) -> None:
    engine = scheduler(waiting=[stored(stage, "large", 80, 0), stored(stage, "small", 20, 1)])
    stage.other = lambda own: [False] * len(own)
    age(stage, engine, AGING_S)
    assert stage.step(engine) == ["small", "large"]
    before = stage.agreements
    stage.other = lambda own: own
    age(stage, engine, 0)
    assert stage.step(engine) == ["large", "small"]
    assert stage.agreements == before + 1
    # There is nothing to agree on when nobody is delayed.
    age(stage, engine, 0)
    assert stage.agreements == before + 1


def test_a_request_whose_pages_others_have_brought_is_not_delayed(stage: Stage) -> None:
    engine = scheduler(waiting=[stored(stage, "a", 80, 0), stored(stage, "b", 60, 1), stored(stage, "c", 20, 2)])
    assert stage.step(engine) == ["c", "b", "a"]
    bring(stage, key_of(80, 0))
    before = len(stage.matched)
    steps = [stage.step(engine) for _ in range(3)]
    assert steps[-1] == ["a", "c", "b"]
    # One match a step.
    assert len(stage.matched) == before + 3


def test_what_is_not_known_is_looked_at(stage: Stage) -> None:
    stage.store(key_of(80))
    unknown = request(key_of(83), "unknown")
    engine = scheduler(waiting=[unknown, stored(stage, "small", 20, 1)])
    assert stage.step(engine) == ["small", "unknown"]
    # So is everything once the device memory has been cleared.
    bring(stage, key_of(80))
    stage.order.clear()
    assert stage.step(engine) == ["unknown", "small"]


def test_a_request_that_is_alone_is_not_looked_at(stage: Stage) -> None:
    assert stage.step(scheduler(waiting=[request(key_of(80), "alone")])) == ["alone"]
    assert stage.matched == []


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_priority_of_a_user_comes_before(stage: Stage, sign: int) -> None:
    waiting = [
        stored(stage, "high, much", 80, 0, priority=-2 * sign),
        stored(stage, "high, little", 20, 1, priority=-2 * sign),
        stored(stage, "low, less", 8, 2, priority=2 * sign),
    ]
    policy = SimpleNamespace(**{**vars(FCFS), "enable_priority_scheduling": True, "priority_sign": sign})
    engine = scheduler(waiting=waiting)
    engine.policy = policy
    assert stage.step(engine) == ["high, little", "high, much", "low, less"]
    # Also before one that has waited long.
    age(stage, engine, AGING_S)
    assert stage.step(engine) == ["high, much", "high, little", "low, less"]


def other_policy(stage: Stage) -> Any:
    return SimpleNamespace(**{**vars(FCFS), "policy": CacheAgnosticPolicy.LOF})


def turned_off(stage: Stage) -> Any:
    stage.order._aging_s = 0
    return FCFS


@pytest.mark.parametrize("case", [other_policy, turned_off])
def test_other_policies_are_left_alone(stage: Stage, case: Callable[[Stage], Any]) -> None:
    engine = scheduler(waiting=[stored(stage, "large", 80, 0), stored(stage, "small", 20, 1)])
    engine.policy = case(stage)
    assert stage.step(engine) == ["large", "small"]
    assert stage.order.kept == 0


def test_nothing_is_kept_of_a_request_that_has_left_the_queue(stage: Stage) -> None:
    engine = scheduler(waiting=[stored(stage, "large", 80, 0), stored(stage, "small", 20, 1)])
    stage.step(engine)
    assert stage.order.kept == 2
    engine.waiting_queue = []
    stage.step(engine)
    assert stage.order.kept == 0


def test_what_lacks_least_is_preloaded_first() -> None:
    stage = Stage(preload_bytes=4, aging_s=AGING_S)
    large, small = stored(stage, "large", 80, 0), stored(stage, "small", 40, 1)
    engine = scheduler(running_request(), waiting=[large, small])
    # There is memory for one of them and for what runs.
    stage.cache.token_to_kv_pool_allocator.free_slots = 14 + 51
    assert stage.step(engine) == ["large"]
    assert len(stage.linker.loads) == 1
    stage.linker.has_landed = True
    # Its pages are there: it is not behind the other one.
    assert stage.step(engine) == ["small", "large"]


def test_requests_whose_preloads_have_ended_are_all_looked_at_again() -> None:
    stage = Stage(preload_bytes=4, aging_s=AGING_S)
    large = [stored(stage, f"large {seed}", 80, seed) for seed in range(3)]
    engine = scheduler(running_request(), waiting=large)
    assert stage.step(engine) == []
    engine.waiting_queue.append(stored(stage, "small", 8, 3))
    engine.running_batch = None
    stage.linker.has_landed = True
    assert stage.step(engine) == ["large 0", "large 1", "large 2", "small"]
