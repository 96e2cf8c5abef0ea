"""What is fetched to the device before it is asked for, and what is said of it, with stand-ins for the tree's order."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from agentstate.fleet.hints import Hints
from agentstate.lookahead import policies
from agentstate.lookahead.forecast import Forecast
from engine_patch.decisions import Decisions
from engine_patch.foresight import Foresight, ForesightStats
from engine_patch.waits import Waits

LENGTH = 1000


class Order:
    """Of the contexts on the device it is known how many tokens they have there."""

    def __init__(self, waits: Waits):
        self.waits = waits
        self.there: dict[str, int] = {}
        self.above: set[str] = set()
        self.without_window: set[str] = set()

    def room_of(self, owner: str, tokens: int) -> bool:
        return owner not in self.above

    def has_window(self, owner: str) -> bool:
        return owner not in self.without_window

    def tokens(self, owner: str) -> int:
        return self.there.get(owner, 0)

    def displaced(self, tokens: int) -> float:
        if tokens <= 0:
            return 0.0
        for owner in sorted(self.there, key=self.waits.index):
            tokens -= self.there[owner]
            if tokens <= 0:
                return self.waits.index(owner)
        return math.inf

    def standing(self) -> list[tuple[str, float, int]]:
        return [(owner, self.waits.index(owner), tokens) for owner, tokens in self.there.items()]


class Stage:
    """``states`` is what the fetches say of themselves; those of others are pending."""

    def __init__(self, room: int = 10 * LENGTH, bring: bool = True):
        self.now_s = 1000.0
        self.room = room
        self.waits = Waits(policies.planner, lambda: self.now_s)
        self.order = Order(self.waits)
        self.stats = ForesightStats()
        self.decisions = Decisions(lambda: round(self.now_s))
        self.states: dict[str, str] = {}
        self.brought: list[str] = []
        self.foresight = Foresight(
            self.waits,
            self.order,  # type: ignore[arg-type]
            self.stats,
            self.decisions,
            length=lambda session: LENGTH,
            room=lambda: self.room,
            bring=self.bring if bring else None,
            n_bytes=lambda tokens: 10 * tokens,
            pin=lambda session, for_s: None,
            clock=lambda: self.now_s,
        )
        # In this thread.
        self.foresight._fetching = SimpleNamespace(submit=lambda call, *given: call(*given))  # type: ignore[assignment]

    def bring(self, session: str) -> Callable[[], dict[str, Any]]:
        self.brought.append(session)
        if self.states.get(session) == "breaks":
            raise OSError("of this test")
        return lambda: {"state": self.states.get(session, "pending")}

    def waits_for(self, session: str, seconds: float, there: int = 0) -> None:
        self.waits.began(session)
        assert self.waits.foresee(session, Forecast.exactly(seconds), 0.0, "tool")
        if there:
            self.order.there[session] = there

    def step(self, after_s: float = 1.0) -> list[str]:
        """What a step brings."""
        self.now_s += after_s
        before = len(self.brought)
        self.foresight.step()
        return self.brought[before:]

    def arrive(self, session: str, tokens: int = LENGTH) -> None:
        self.states[session] = "warm"
        self.order.there[session] = tokens

    def fetch(self, session: str) -> None:
        """A context is fetched, and there."""
        self.waits_for(session, 5.0)
        self.step()
        self.arrive(session)
        self.step()

    def outcome(self, session: str) -> str:
        return str(self.foresight.explain(session)["fetch"]["outcome"])


def test_who_is_back_soonest_is_fetched_first_and_two_at_once() -> None:
    stage = Stage()
    for session, seconds in {"a": 60.0, "b": 5.0, "c": 20.0}.items():
        stage.waits_for(session, seconds)
    assert stage.step() == ["b", "c"]
    assert (stage.step(), stage.foresight.kept) == ([], 2)
    stage.arrive("b")
    assert stage.step() == ["a"]
    assert (stage.outcome("b"), stage.stats.fetched) == ("there", 1)
    stage.foresight.back("b")
    assert (stage.outcome("b"), stage.stats.used) == ("used", 1)


def test_what_is_on_the_device_and_what_has_no_forecast_is_not_fetched() -> None:
    stage = Stage()
    stage.waits_for("there", 5.0, there=LENGTH)
    stage.waits.began("unknown")
    stage.waits_for("released", 5.0)
    stage.waits.release("released")
    stage.waits_for("served", 5.0)
    stage.waits.over("served")
    assert stage.step() == []


@pytest.mark.parametrize(("other_s", "fetched"), [(3600.0, ["new"]), (10.0, [])])
def test_what_is_fetched_is_worth_four_times_what_it_displaces(other_s: float, fetched: list[str]) -> None:
    stage = Stage(room=0)
    stage.waits_for("there", other_s, there=LENGTH)
    stage.waits_for("new", 8.0)
    assert stage.step() == fetched


def test_a_context_without_its_window_is_brought_whole_and_displaces_as_much() -> None:
    stage = Stage(room=0)
    stage.waits_for("there", 10.0, there=LENGTH)
    stage.waits_for("a", 8.0, there=LENGTH)
    stage.order.without_window.add("a")
    assert stage.step() == []
    stage.room = LENGTH
    assert stage.step() == ["a"]
    stage.order.without_window.clear()
    stage.arrive("a")
    stage.step()
    assert (stage.outcome("a"), stage.stats.fetched_bytes) == ("there", 10 * LENGTH)
    stage.order.without_window.add("a")
    stage.step()
    assert (stage.outcome("a"), stage.stats.left) == ("wasted", 1)


def test_a_request_that_comes_before_its_window_is_counted_as_late() -> None:
    stage = Stage()
    stage.waits_for("a", 5.0, there=LENGTH)
    stage.order.without_window.add("a")
    assert stage.step() == ["a"]
    stage.foresight.back("a")
    assert (stage.outcome("a"), stage.stats.used) == ("late", 0)


def test_nothing_is_fetched_that_does_not_fit_or_where_nothing_can_be_brought() -> None:
    for stage in (Stage(room=LENGTH - 1), Stage(bring=False)):
        stage.waits_for("a", 5.0)
        assert stage.step() == []


def test_an_emptied_device_stays_empty_until_something_else_is_foreseen() -> None:
    stage = Stage()
    stage.waits_for("a", 5.0)
    stage.foresight.cleared()
    assert stage.step() == []
    stage.waits_for("b", 5.0)
    assert stage.step() == ["b"]


@pytest.mark.parametrize("state", ["cold", "partial", "breaks"])
def test_a_fetch_that_fails_is_not_tried_again_before_something_else_is_foreseen(state: str) -> None:
    stage = Stage()
    stage.waits_for("a", 5.0)
    stage.states["a"] = state
    assert stage.step() == ["a"]
    assert stage.step() == []
    assert (stage.outcome("a"), stage.foresight.kept, stage.stats.fetched) == ("wasted", 0, 0)
    assert stage.waits.foresee("a", Forecast.exactly(4.0), 3.0, "tool")
    assert stage.step() == ["a"]


def test_a_request_that_comes_before_its_pages_is_counted_as_late() -> None:
    stage = Stage()
    stage.waits_for("a", 5.0)
    stage.step()
    stage.foresight.back("a")
    assert (stage.outcome("a"), stage.stats.used) == ("late", 0)
    stage.arrive("a")
    stage.step()
    assert (stage.outcome("a"), stage.foresight.kept) == ("late", 0)


def test_what_leaves_the_device_again_was_fetched_in_vain() -> None:
    stage = Stage()
    stage.fetch("a")
    del stage.order.there["a"]
    stage.step()
    assert (stage.outcome("a"), stage.stats.wasted) == ("wasted", 1)
    stage.foresight.back("a")
    assert (stage.outcome("a"), stage.stats.used) == ("wasted", 0)


def test_a_step_looks_at_most_ten_times_a_second() -> None:
    stage = Stage()
    assert stage.step() == []
    stage.waits_for("a", 5.0)
    assert stage.step(after_s=0.05) == []
    assert stage.step(after_s=0.06) == ["a"]


def test_nothing_is_fetched_for_an_account_that_has_what_it_may() -> None:
    stage = Stage()
    for session, seconds in {"above": 5.0, "other": 60.0}.items():
        stage.waits_for(session, seconds)
    stage.order.above.add("above")
    assert stage.step() == ["other"]
    stage.order.above.clear()
    assert stage.step() == ["above"]


def test_a_wait_is_explained() -> None:
    stage = Stage()
    stage.waits_for("soon", 10.0)
    stage.waits_for("late", 3600.0, there=LENGTH)
    stage.waits_for("later", 7200.0, there=500)
    stage.now_s += 2.0
    said = stage.foresight.explain("soon")
    assert (said["device_tokens"], said["place"], said["fetch"]) == (0, 1, None)
    assert said["wait"] == {
        "state": "waits",
        "kind": "tool",
        "waited_s": pytest.approx(2.0),
        "rest_p50_s": pytest.approx(8.0, rel=0.1),
        "rest_p90_s": pytest.approx(10.9, rel=0.1),
    }
    assert said["fetched_from_index"] == pytest.approx(4 * stage.waits.index("later"))
    assert said["index"] > said["fetched_from_index"]
    late = stage.foresight.explain("late")
    assert (late["place"], late["leaves_after_tokens"]) == (1, 500)
    assert stage.foresight.explain("later")["leaves_after_tokens"] == 0


def test_who_is_served_released_unknown_or_never_back_is_explained() -> None:
    stage = Stage()
    assert stage.foresight.explain("nobody") == {
        "device_tokens": 0,
        "wait": None,
        "index": None,
        "place": None,
        "fetch": None,
        "decisions": [],
    }
    stage.waits_for("a", math.inf)
    assert stage.foresight.explain("a")["wait"]["rest_p90_s"] is None
    stage.waits.release("a")
    assert stage.foresight.explain("a")["wait"]["state"] == "released"
    stage.foresight.back("a")
    assert stage.foresight.explain("a")["wait"]["state"] == "served"


def test_a_request_that_never_ends_is_not_kept_for_ever() -> None:
    stage = Stage()
    stage.waits.began("aborted")
    stage.waits.over("aborted")
    assert stage.waits.index("aborted") == math.inf
    stage.now_s += 601.0
    assert stage.waits.index("aborted") < math.inf


def test_the_oldest_waits_are_forgotten() -> None:
    waits = Waits(policies.planner, most=2)
    for owner in "abc":
        waits.began(owner)
        waits.foresee(owner, Forecast.exactly(5.0), 0.0, "tool")
    assert (waits.get("a"), waits.index("a"), waits.foreseen) == (None, 0.0, 2)


def test_why_what_was_fetched_was_wasted_is_told() -> None:
    stage = Stage()
    for session in ("left", "wrong", "released", "cancelled", "late", "used"):
        stage.waits_for(session, 100.0)
        stage.step()
        if session != "late":
            stage.states[session] = "cold" if session == "cancelled" else "warm"
            stage.order.there[session] = LENGTH
            stage.step()
    stage.foresight.back("late")
    stage.foresight.back("used")
    del stage.order.there["left"], stage.order.there["released"]
    stage.waits.release("released")
    stage.step()
    stage.now_s += 200.0
    del stage.order.there["wrong"]
    stage.step()
    stats = stage.stats
    assert (stats.fetched, stats.used, stats.late, stats.cancelled) == (4, 1, 1, 1)
    assert (stats.left, stats.wrong, stats.wasted) == (1, 2, 3)
    a_context = 10 * LENGTH
    assert (stats.fetched_bytes, stats.used_bytes) == (4 * a_context, a_context)
    assert (stats.left_bytes, stats.wrong_bytes, stats.wasted_bytes) == (a_context, 2 * a_context, 3 * a_context)
    outcomes = {"left": "left", "wrong": "wrong", "released": "wrong", "cancelled": "cancelled"}
    for session, reason in outcomes.items():
        assert stage.foresight.explain(session)["fetch"]["reason"] == reason
        made = stage.foresight.explain(session)["decisions"]
        assert [one["outcome"] for one in made] == ["begun", *(["there"] if session != "cancelled" else []), reason]
        assert (made[0]["tokens"], made[0]["displaced"]) == (LENGTH, 0.0)
    assert [one["outcome"] for one in stage.decisions.of("used", 9)] == ["begun", "there", "used"]
    assert [one["outcome"] for one in stage.decisions.of("late", 9)] == ["begun", "late"]


def test_what_the_request_finds_gone_was_wasted() -> None:
    stage = Stage()
    stage.fetch("a")
    del stage.order.there["a"]
    stage.foresight.back("a")
    assert (stage.stats.used, stage.stats.late, stage.stats.left) == (0, 0, 1)


def test_a_fetch_is_cancelled_by_whoever_empties_the_device() -> None:
    stage = Stage()
    stage.fetch("a")
    stage.order.there.clear()
    stage.foresight.cleared()
    stage.step()
    assert (stage.stats.cancelled, stage.stats.wasted) == (1, 0)


def test_of_evictions_those_are_kept_whose_session_is_waited_for() -> None:
    stage = Stage()
    for session, seconds in {"soon": 60.0, "never": math.inf}.items():
        stage.waits_for(session, seconds, there=400)
    stage.waits_for("released", 60.0)
    stage.waits.release("released")
    stage.waits.began("unknown")
    stage.waits_for("served", 60.0)
    stage.waits.over("served")
    stage.foresight.evicted(dict.fromkeys(["soon", "never", "released", "unknown", "served", "nobody"], LENGTH))
    (made,) = stage.decisions.after(0)["decisions"]
    assert (made["session"], made["decision"], made["outcome"], made["tokens"]) == ("soon", "evict", "waited_for", 600)
    assert made["index"] == stage.waits.index("soon")


def test_a_hint_that_releases_is_kept() -> None:
    stage = Stage()
    stage.waits_for("a", 60.0, there=LENGTH)
    stage.foresight.hinted("a", Hints(release=True))
    (made,) = stage.decisions.of("a", 9)
    assert (made["decision"], made["outcome"], made["tokens"]) == ("release", "accepted", LENGTH)
