"""What a byte of a waiting session is worth, and the orderings that follow."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentstate.lookahead.forecast import BINS, Forecast
from agentstate.lookahead.planner import index, worth_fetching
from agentstate.lookahead.policies import Wait, lru, planner, ttl

GIB = 2**30


@given(st.lists(st.floats(0, 1e7), min_size=2, unique=True), st.floats(1e-12, 1e3), st.integers(1, 2**45))
def test_without_forecasts_the_order_is_lru(waits: list[float], cost_s: float, n_bytes: int) -> None:
    def value(waited_s: float) -> float:
        return index(None, waited_s, cost_s, n_bytes)

    for longer, shorter in zip(sorted(waits)[1:], sorted(waits), strict=False):
        if longer > shorter * (1 + 1e-9) + 1e-9:
            assert value(longer) < value(shorter)


def test_with_known_waits_the_next_use_comes_first() -> None:
    waited = {5.0: 4.0, 20.0: 0.5, 300.0: 100.0, 3600.0: 1.0}  # by how long each lasts: in order of what is left
    values = [index(Forecast.exactly(lasts, 0.05), waited_s, 1.0, GIB) for lasts, waited_s in waited.items()]
    assert values == sorted(values, reverse=True)


def test_a_known_wait_is_worth_more_the_nearer_its_end() -> None:
    forecast = Forecast.exactly(60.0)
    values = [index(forecast, waited_s, 1.0, GIB) for waited_s in (0.0, 10.0, 30.0, 50.0)]
    assert values == sorted(values)
    assert values[-1] > 3 * values[0]


def test_a_wait_of_known_length_and_one_without_a_forecast_compare() -> None:
    soon = index(Forecast.exactly(60.0), 58.0, 1.0, GIB)
    assert index(None, 0.05, 1.0, GIB) > soon > index(None, 60.0, 1.0, GIB)


def test_who_never_comes_back_is_worth_the_least() -> None:
    never = Forecast.exactly(math.inf)
    assert index(never, 1.0, 1.0, GIB) < index(None, 1e5, 1.0, GIB)
    assert index(never, 1.0, 1.0, GIB) > index(never, 100.0, 1.0, GIB) > 0


def test_cost_counts_and_bytes_count_against_it() -> None:
    forecast = Forecast.exactly(5.0)
    assert index(forecast, 1.0, 2.0, GIB) == pytest.approx(2 * index(forecast, 1.0, 1.0, GIB))
    assert index(forecast, 1.0, 1.0, GIB) == pytest.approx(2 * index(forecast, 1.0, 1.0, 2 * GIB))


@given(
    st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=BINS, max_size=BINS).filter(any)),
    st.floats(),
    st.floats(),
    st.integers(),
)
def test_every_index_is_positive_and_finite(
    mass: list[float] | None, waited_s: float, cost_s: float, n_bytes: int
) -> None:
    forecast = None if mass is None else Forecast.from_mass(mass)
    assert 0 < index(forecast, waited_s, cost_s, n_bytes) < math.inf


def test_what_is_fetched_is_worth_a_multiple_of_what_it_displaces() -> None:
    assert worth_fetching(4.0, 1.0)
    assert not worth_fetching(3.9, 1.0)
    assert worth_fetching(1e-9)
    assert not worth_fetching(math.nan) and not worth_fetching(math.inf, math.inf)


def order(policy: object, waits: dict[str, Wait]) -> list[str]:
    assert callable(policy)
    return sorted(waits, key=lambda name: policy(waits[name]))


def test_policies_order_the_same_waits_in_their_own_ways() -> None:
    waits = {
        "back soon": Wait(Forecast.exactly(100.0), 99.0, 1.0, GIB),
        "for long": Wait(Forecast.exactly(1000.0), 1.0, 1.0, GIB),
        "unknown": Wait(None, 50.0, 1.0, GIB),
    }
    assert order(lru, waits) == ["back soon", "unknown", "for long"]
    assert order(planner, waits) == ["for long", "unknown", "back soon"]


def test_a_ttl_pins_what_is_younger_and_drops_the_oldest_first() -> None:
    policy = ttl(60.0)
    pinned, *free = [policy(Wait(Forecast.exactly(1.0), age, 1.0, GIB)) for age in (60.0, 60.1, 100.0, 1e6)]
    assert math.isinf(pinned)
    assert free == sorted(free, reverse=True) and math.isfinite(free[0])
