"""Whether forecasts come true."""

from __future__ import annotations

import math
import random

import pytest

from agentstate.lookahead.calibration import Calibration, decile
from agentstate.lookahead.durations import PERSON, Durations
from agentstate.lookahead.forecast import BINS, Forecast


def test_a_wait_falls_into_a_decile_of_its_forecast() -> None:
    about_ten = Forecast.exactly(10.0, sigma=0.5)
    assert [decile(about_ten, seconds) for seconds in (0.0, 1.0, 9.9, 10.1, 60.0)] == [0, 0, 4, 5, 9]
    assert decile(about_ten, about_ten.rest(0.0, 0.25)) == 2
    assert (decile(about_ten, None), decile(about_ten, 1e9)) == (9, 9)


def test_who_is_expected_never_to_come_back_was_expected_not_to() -> None:
    assert decile(Forecast.exactly(math.inf), None) == 5
    assert decile(Forecast.exactly(math.inf), 10.0) == 0


def test_what_had_passed_when_it_was_forecast_is_no_surprise() -> None:
    about_ten = Forecast.exactly(10.0, sigma=0.5)
    assert decile(about_ten, 20.1, waited_s=20.0) == 0
    assert decile(about_ten, 20.1) == 9
    # It had lasted longer than was possible.
    assert decile(Forecast.exactly(0.5), 3600.0, waited_s=3000.0) == 9


@pytest.mark.parametrize("sigma", [0.2, 1.0])
def test_right_forecasts_fill_the_deciles_alike(sigma: float) -> None:
    chance, calibration = random.Random(1), Calibration()
    for _ in range(4000):
        median_s = math.exp(chance.uniform(0, 5))
        seconds = median_s * math.exp(sigma * chance.gauss(0, 1))
        # Some are forecast when they have begun long ago.
        waited_s = chance.choice([0.0, 0.8 * median_s])
        if waited_s < seconds:
            calibration.ended("tool", Forecast.exactly(median_s, sigma), seconds, waited_s)
    total = sum(calibration.deciles["tool"])
    assert all(0.07 < count / total < 0.13 for count in calibration.deciles["tool"])
    assert calibration.within("tool") == pytest.approx(0.8, abs=0.03)
    assert calibration.within("person") is None


def test_forecasts_that_are_too_sure_of_themselves_are_found_out() -> None:
    chance, calibration = random.Random(1), Calibration()
    for _ in range(1000):
        calibration.ended("tool", Forecast.exactly(10.0, 0.1), 10.0 * math.exp(chance.gauss(0, 1)))
    assert (calibration.within("tool") or 0) < 0.3


def test_what_is_learned_holds_what_it_promises() -> None:
    """The 80 % intervals of forecasts hold between 75 and 90 % of what happens."""
    chance, calibration, known = random.Random(2), Calibration(), Durations()
    for _ in range(3000):
        tool, median_s = chance.choice([("search", 2.0), ("build", 90.0)])
        seconds = median_s * math.exp(0.7 * chance.gauss(0, 1))
        calibration.ended("tool", known.forecast(tool, ""), seconds)
        known.observe(tool, "", seconds)
    assert 0.75 <= (calibration.within("tool") or 0) <= 0.90


def test_announcements_are_scored_against_what_was_learned() -> None:
    chance, known = random.Random(3), Durations()
    calibration = Calibration()
    for _ in range(300):
        seconds = math.exp(chance.uniform(-2, 6))
        scores = known.observe("build", "", seconds, announced_s=seconds * math.exp(0.1 * chance.gauss(0, 1)))
        assert scores is not None
        calibration.scored("tool", *scores)
    losses = calibration.losses["tool"]
    assert losses.waits == 300
    assert 0 < losses.announced < 0.6 * losses.learned


@pytest.mark.parametrize("announced_s", [None, 0.0, math.inf])
def test_what_was_not_announced_has_no_score(announced_s: float | None) -> None:
    known = Durations()
    assert known.observe(PERSON, "", 5.0, announced_s) is None
    assert known.observe("tool", "", -1.0, 5.0) is None
    scores = known.observe("tool", "", None, 5.0)
    assert scores is not None and all(math.log(1e-9) <= score < 0 for score in scores)


def test_every_bin_has_a_decile() -> None:
    for at in range(BINS):
        mass = [0.0] * BINS
        mass[at] = 1.0
        for seconds in (0.0, 1.0, 1e6, None):
            assert 0 <= decile(Forecast.from_mass(mass), seconds) <= 9
