"""The newest decisions of an engine."""

from __future__ import annotations

import math

from engine_patch.decisions import Decisions


def made(most: int = 4096) -> Decisions:
    times = iter(range(1000, 10_000, 10))
    return Decisions(lambda: next(times), most)


def test_decisions_are_read_in_order_and_once() -> None:
    decisions = made()
    decisions.add("a", "fetch", "begun", 64, 0.5, 0.1)
    decisions.add("b", "demote", "begun", 128)
    said = decisions.after(0)
    assert said == {
        "decisions": [
            {"session": "a", "decision": "fetch", "outcome": "begun", "tokens": 64, "index": 0.5, "displaced": 0.1}
            | {"id": 1000},
            {"session": "b", "decision": "demote", "outcome": "begun", "tokens": 128, "index": None, "displaced": None}
            | {"id": 1010},
        ],
        "more": False,
        "missed": False,
    }
    assert [one["session"] for one in decisions.after(1000)["decisions"]] == ["b"]
    assert decisions.after(1010)["decisions"] == []


def test_ids_grow_although_a_clock_is_set_back() -> None:
    times = iter([1000, 400, 400, 2000])
    decisions = Decisions(lambda: next(times))
    for _ in range(4):
        decisions.add("a", "release", "accepted")
    assert [one["id"] for one in decisions.after(0)["decisions"]] == [1000, 1001, 1002, 2000]


def test_what_is_dropped_is_missed_by_whoever_had_not_read_it() -> None:
    decisions = made(most=2)
    for session in "abc":
        decisions.add(session, "release", "accepted")
    assert [one["session"] for one in decisions.after(0)["decisions"]] == ["b", "c"]
    assert (decisions.after(0)["missed"], decisions.after(1000)["missed"]) == (True, False)


def test_a_page_is_bounded() -> None:
    decisions = made()
    for number in range(501):
        decisions.add(f"s{number}", "release", "accepted")
    said = decisions.after(0)
    assert (len(said["decisions"]), said["more"]) == (500, True)
    rest = decisions.after(said["decisions"][-1]["id"])
    assert ([one["session"] for one in rest["decisions"]], rest["more"]) == (["s500"], False)


def test_of_one_session_the_newest_are_told() -> None:
    decisions = made()
    for outcome in ("begun", "there", "used"):
        decisions.add("a", "fetch", outcome)
        decisions.add("b", "fetch", outcome)
    assert [(one["session"], one["outcome"]) for one in decisions.of("a", 2)] == [("a", "there"), ("a", "used")]
    assert decisions.of("nobody", 2) == []


def test_nothing_is_kept_of_who_is_no_session_and_an_index_is_a_number_or_nothing() -> None:
    decisions = made()
    decisions.add(17, "evict", "waited_for")
    decisions.add(None, "demote", "begun")
    decisions.add("a", "evict", "waited_for", 4, math.inf, math.nan)
    (only,) = decisions.after(0)["decisions"]
    assert (only["index"], only["displaced"]) == (None, None)
