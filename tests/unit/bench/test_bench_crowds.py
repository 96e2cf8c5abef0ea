"""Load and crowds of `agentstate bench service`: what is counted, and where sessions are at the start."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from agentstate.benchmarks.agents import paces
from agentstate.benchmarks.crowds import Crowd, Paces, Place, Round, load_rows, remarks, tables

KNOWN = Paces([[(10.0, 10.0), (60.0, 20.0)], [(1.0, 9.0)]])


def test_a_place_is_as_likely_as_sessions_are_there_long() -> None:
    source = random.Random(3)
    places = [KNOWN.at_any_moment(source) for _ in range(20_000)]
    found = Counter((place.conversation, place.turn, place.has_turn) for place in places)
    lasting = {
        (0, 0, False): 10,
        (0, 0, True): 10,
        (0, 1, False): 60,
        (0, 1, True): 20,
        (1, 0, False): 1,
        (1, 0, True): 9,
    }
    assert set(found) == set(lasting)
    for place, seconds in lasting.items():
        assert found[place] / len(places) == pytest.approx(seconds / 110, abs=0.01)
    waits_s = [place.left_s for place in places if (place.turn, place.has_turn) == (1, False)]
    assert 0 <= min(waits_s) < 1 and 59 < max(waits_s) <= 60
    assert sum(waits_s) / len(waits_s) == pytest.approx(30, abs=1)


def test_a_crowd_stays_as_it_began() -> None:
    """Whoever is followed for long is found as often in a conversation as at the start."""
    source = random.Random(5)
    place, seconds = Place(0, 0, False, 0.0), Counter[int]()
    turns = 0
    for _ in range(40_000):
        seconds[place.conversation] += round(sum(KNOWN.recorded[place.conversation][place.turn]))
        turns += 1
        conversation, turn = KNOWN.after(place, source)
        place = Place(conversation, turn, False, 0.0)
    assert seconds[0] / seconds.total() == pytest.approx(100 / 110, abs=0.01)
    assert turns / seconds.total() == pytest.approx(KNOWN.turns_per_s, rel=0.02)


def test_the_recorded_paces_are_those_of_agents() -> None:
    known = paces()
    assert len(known) > 100
    waits_s = [wait_s for turns in known for wait_s, _ in turns]
    assert min(waits_s) >= 0 and max(waits_s) <= 1800
    assert all(turns[0][0] >= 60 for turns in known), "a person begins"
    assert all(model_s >= 0 for turns in known for _, model_s in turns)
    assert 0.001 < Paces(known).turns_per_s < 1


def test_rows_compare_rounds_in_pairs() -> None:
    one = [Round([1.0] * 100, 1.0, 0.1), Round([1.0] * 50, 1.0, 0.1), Round([9.0] * 100, 1.0, 0.1)]
    two = [Round([2.0] * 150, 1.0, 0.15), Round([2.0] * 75, 1.0, 0.15), Round([2.0] * 100, 1.0, 0.12)]
    single, pair = load_rows("sqlite", 32, {1: one, 2: two})
    assert (single["per_s"], single["requests"], single["cpu_ms"]) == (100, 250, 1.0)
    assert (single["p50_ms"], single["p99_ms"]) == (1.0, 9.0)
    assert "cpu_ratio" not in single
    assert (pair["speed_ratio"], pair["cpu_ratio"]) == (1.5, 1.0)
    crowd = Crowd(3, 2.0, 5.0, [1.0, 2.0], 1, Counter({"Refused: 503": 2}), [10.0, 11.0, 12.0]).row("sqlite", 2)
    assert (crowd["errors"], crowd["per_s"], crowd["first_errors"]) == (2, 1.0, ["2 × Refused: 503"])
    nobody = Crowd(3, 2.0, 5.0).row("sqlite", 2)
    assert len(list(tables([single, pair, crowd, nobody]))) == 2
    assert any("2 × Refused: 503" in line for line in remarks([single, crowd]))
