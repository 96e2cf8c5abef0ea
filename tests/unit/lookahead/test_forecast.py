"""A distribution of how long a wait lasts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentstate.lookahead.forecast import BINS, EDGES, NEVER, Forecast, bin_of, blind_rate

MASSES = st.lists(st.integers(0, 1000), min_size=BINS, max_size=BINS).filter(any)
WAITED = st.floats(0, 1e5)


@given(st.floats(0, EDGES[-1]))
def test_a_wait_is_in_the_bin_that_holds_it(seconds: float) -> None:
    at = bin_of(seconds)
    assert EDGES[at] * (1 - 1e-6) <= seconds <= EDGES[at + 1] * (1 + 1e-6)


def test_bins_at_their_ends() -> None:
    assert [bin_of(seconds) for seconds in (-1e300, 0.0, 0.001, 0.00101)] == [0, 0, 0, 1]
    assert bin_of(86_400.0) == NEVER - 1
    assert [bin_of(seconds) for seconds in (1e300, math.inf)] == [NEVER, NEVER]
    with pytest.raises(ValueError):
        bin_of(math.nan)


def test_an_exact_wait_is_about_its_time() -> None:
    forecast = Forecast.exactly(10.0)
    assert forecast.by(10.0) == pytest.approx(0.5, abs=0.02)
    assert forecast.by(7.0) < 0.06 < 0.94 < forecast.by(14.0)
    assert forecast.rest(0.0, 0.5) == pytest.approx(10.0, rel=0.02)
    assert forecast.rest(9.0, 0.5) < 2.5


@pytest.mark.parametrize("seconds", [math.inf, 1e300])
def test_a_wait_beyond_the_grid_is_never(seconds: float) -> None:
    forecast = Forecast.exactly(seconds)
    assert forecast.by(86_400.0) == 0.0
    assert forecast.rest(5.0, 0.1) == math.inf


@pytest.mark.parametrize("seconds", [0.0, 1e-300, 0.001])
def test_a_wait_below_the_grid_is_over_at_once(seconds: float) -> None:
    assert Forecast.exactly(seconds).by(0.001) == 1.0


@pytest.mark.parametrize(
    ("seconds", "sigma"), [(-1.0, 0.2), (math.nan, 0.2), (1.0, 0.0), (1.0, math.nan), (1.0, math.inf)]
)
def test_what_cannot_be_forecast_is_refused(seconds: float, sigma: float) -> None:
    with pytest.raises(ValueError):
        Forecast.exactly(seconds, sigma)


@pytest.mark.parametrize("mass", [[], [0.0] * BINS, [1.0] * (BINS - 1), [-1.0] + [1.0] * (BINS - 1)])
@pytest.mark.parametrize("spoilt", [None, math.nan, math.inf])
def test_weights_that_are_none_are_refused(mass: list[float], spoilt: float | None) -> None:
    with pytest.raises(ValueError):
        Forecast.from_mass(mass if spoilt is None else [spoilt] * BINS)


def test_side_by_side_the_longest_wait_counts() -> None:
    short, long = Forecast.exactly(1.0), Forecast.exactly(60.0)
    together = Forecast.after_all([short, long, short])
    assert together.rest(0.0, 0.5) == pytest.approx(60.0, rel=0.02)
    equal = Forecast.after_all([short, short])
    at_s = EDGES[bin_of(1.0)]
    assert equal.by(at_s) == pytest.approx(short.by(at_s) ** 2)
    assert Forecast.after_all([short, Forecast.exactly(math.inf)]).rest(0.0, 0.5) == math.inf
    with pytest.raises(ValueError):
        Forecast.after_all([])


@given(MASSES, WAITED, st.floats(0.01, 0.99))
def test_the_rest_is_the_quantile_of_what_remains(mass: list[float], waited_s: float, share: float) -> None:
    forecast = Forecast.from_mass(mass)
    lasting = 1 - forecast.by(waited_s)
    rest_s = forecast.rest(waited_s, share)
    if lasting < 1e-6:
        return
    if math.isinf(rest_s):
        assert forecast.mass[NEVER] >= lasting * (1 - share) - 1e-9
    else:
        assert forecast.by(waited_s + rest_s) == pytest.approx(1 - lasting * (1 - share), abs=1e-6)


def test_a_wait_that_has_outlasted_its_forecast_goes_on_as_without_one() -> None:
    forecast = Forecast.exactly(1.0)
    assert 100 < forecast.rest(100.0, 0.5) < math.inf
    assert forecast.rate(100.0) == pytest.approx(blind_rate(100.0), rel=0.05)


@given(MASSES, WAITED)
def test_the_rate_is_the_best_over_all_times(mass: list[float], waited_s: float) -> None:
    """Against every edge in turn, with the millionth that is taken for a wait without a forecast."""
    forecast = Forecast.from_mass(mass)

    def left(at: int) -> float:
        return (1 - 1e-6) * (1 - forecast.by(EDGES[at])) + 1e-6 * (1 + EDGES[at] / 0.1) ** -0.5

    at = bin_of(waited_s)
    if at >= NEVER - 1:
        return
    part = (waited_s - EDGES[at]) / (EDGES[at + 1] - EDGES[at])
    now = left(at) + part * (left(at + 1) - left(at))
    best, spent, before, before_s = 0.0, 0.0, now, waited_s
    for end in range(at + 1, BINS):
        spent += (EDGES[end] - before_s) * (before + left(end)) / 2
        before, before_s = left(end), EDGES[end]
        if spent > 1e-9:
            best = max(best, (now - before) / spent)
    assert forecast.rate(waited_s) == pytest.approx(best, rel=1e-3)


@given(MASSES)
def test_a_packed_forecast_is_nearly_the_same(mass: list[float]) -> None:
    forecast = Forecast.from_mass(mass)
    packed = forecast.pack()
    assert len(packed) == BINS
    for own, other in zip(forecast.mass, Forecast.unpack(packed).mass, strict=True):
        assert other == pytest.approx(own, abs=0.01 * max(forecast.mass))


@pytest.mark.parametrize("packed", [b"", b"\x01" * (BINS - 1), bytes(BINS), b"\x01" * (BINS + 1)])
def test_bytes_that_are_no_forecast_are_refused(packed: bytes) -> None:
    with pytest.raises(ValueError):
        Forecast.unpack(packed)


def test_a_score_is_better_for_what_was_likelier() -> None:
    forecast = Forecast.exactly(10.0)
    assert 0 > forecast.score(10.0) > forecast.score(20.0) >= forecast.score(None) > -30
