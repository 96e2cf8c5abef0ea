"""What is learned of a tenant's waits."""

from __future__ import annotations

import math
import random

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentstate.lookahead.durations import MAX_NAMES, OTHER, PERSON, Durations
from agentstate.lookahead.forecast import Forecast


def median(forecast: Forecast) -> float:
    return forecast.rest(0.0, 0.5)


def taught(waits: int = 200, tool: str = "bash", head: str = "pytest", seconds: float = 30.0) -> Durations:
    durations = Durations()
    for _ in range(waits):
        durations.observe(tool, head, seconds)
    return durations


def test_before_anything_was_seen_forecasts_are_the_published_quantiles() -> None:
    durations = Durations()
    tool, person, other = (durations.forecast(name, "") for name in ("any", PERSON, OTHER))
    assert [tool.by(seconds) for seconds in (0.3, 13.6, 216.0)] == pytest.approx([0.5, 0.9, 0.99], abs=0.02)
    assert person.by(86.0) == pytest.approx(0.5 * 0.85, abs=0.02)
    assert tool.by(10.0) > other.by(10.0) > person.by(10.0)


def test_a_command_is_forecast_by_its_own_waits() -> None:
    durations = taught(head="pytest", seconds=30.0)
    for _ in range(200):
        durations.observe("bash", "ls", 0.02)
    assert median(durations.forecast("bash", "pytest")) == pytest.approx(30.0, rel=0.2)
    assert median(durations.forecast("bash", "ls")) == pytest.approx(0.02, rel=0.2)


def test_what_is_not_known_yet_is_taken_from_what_is_like_it() -> None:
    durations = taught(tool="bash", head="pytest", seconds=30.0)
    assert median(durations.forecast("bash", "new")) == pytest.approx(30.0, rel=0.3)
    assert median(durations.forecast("new", "new")) == pytest.approx(30.0, rel=0.3)
    assert durations.forecast(PERSON, "") == Durations().forecast(PERSON, "")
    once = taught(waits=1, seconds=300.0)
    assert median(once.forecast("bash", "pytest")) < 300.0


def test_what_was_learned_fades() -> None:
    durations = taught(waits=5000, seconds=30.0)
    for _ in range(600):
        durations.observe("bash", "pytest", 0.1)
    assert median(durations.forecast("bash", "pytest")) == pytest.approx(0.1, rel=0.3)
    assert durations.forecast("bash", "pytest").by(1.0) == pytest.approx(1 - 2 ** (-600 / 500), abs=0.05)


def test_who_never_came_back_counts() -> None:
    durations = Durations()
    for turn in range(200):
        durations.observe(PERSON, "", None if turn % 2 else 60.0)
    assert durations.forecast(PERSON, "").by(86_400.0) == pytest.approx(0.5, abs=0.05)


def announcing(took: list[float], announced: list[float], head: str = "run") -> Durations:
    durations = Durations()
    for seconds, said in zip(took, announced, strict=True):
        durations.observe("job", head, seconds, said)
    return durations


def times(count: int, seed: int = 1) -> list[float]:
    source = random.Random(seed)
    return [math.exp(source.uniform(-1, 6)) for _ in range(count)]


def test_announcements_that_come_true_are_used() -> None:
    took = times(60)
    durations = announcing(took, took)
    assert durations.lead("job", "run") > 0
    assert median(durations.forecast("job", "run", 200.0)) == pytest.approx(200.0, rel=0.2)
    assert median(durations.forecast("job", "run", 2.0)) == pytest.approx(2.0, rel=0.2)


def test_an_announcement_is_read_as_its_maker_means_it() -> None:
    """Who always says a tenth is as good as who says the truth."""
    took = times(60)
    durations = announcing(took, [seconds / 10 for seconds in took])
    assert median(durations.forecast("job", "run", 20.0)) == pytest.approx(200.0, rel=0.2)


def test_an_announcement_is_not_believed_before_any_has_come_true() -> None:
    assert Durations().forecast("job", "run", 3000.0) == Durations().forecast("job", "run")


def test_noise_is_not_believed_and_trust_is_lost() -> None:
    noise = announcing([30.0] * 60, times(60))
    assert noise.lead("job", "run") < 0
    assert noise.forecast("job", "run", 2.0) == noise.forecast("job", "run")
    took = times(60)
    durations = announcing(took, took)
    for said in times(100, seed=2):
        durations.observe("job", "run", 30.0, said)
    assert durations.forecast("job", "run", 2.0) == durations.forecast("job", "run")


@pytest.mark.parametrize("seconds", [math.nan, -1.0, -math.inf])
def test_times_that_are_none_teach_nothing(seconds: float) -> None:
    durations = Durations()
    durations.observe("bash", "ls", seconds)
    assert durations.changes() is None
    assert durations.forecast("bash", "ls") == Durations().forecast("bash", "ls")


@pytest.mark.parametrize("announced_s", [math.nan, -1.0, 0.0, math.inf, -math.inf])
def test_announcements_that_are_none_count_as_none(announced_s: float) -> None:
    durations, other = Durations(), Durations()
    durations.observe("bash", "ls", 1.0, announced_s)
    other.observe("bash", "ls", 1.0)
    assert durations.changes() == other.changes()
    assert durations.forecast("bash", "ls", announced_s) == other.forecast("bash", "ls")


@given(st.text(max_size=300), st.text(max_size=300), st.one_of(st.none(), st.floats()), st.floats())
def test_anything_can_be_learned_stored_and_forecast(
    tool: str, head: str, seconds: float | None, announced_s: float
) -> None:
    durations = Durations()
    for _ in range(3):
        durations.observe(tool, head, seconds, announced_s)
    copy = Durations()
    copy.load(durations.dump())
    for one, other in zip(durations.forecast(tool, head).mass, copy.forecast(tool, head).mass, strict=True):
        assert other == pytest.approx(one, abs=1e-3)


def test_names_are_bounded_and_a_flood_does_not_displace_what_is_used() -> None:
    durations = taught(waits=50)
    for number in range(20 * MAX_NAMES):
        durations.observe(f"tool {number}" + "x" * 10_000, "", 1.0)
    assert len(durations.dump()) < 300 * MAX_NAMES
    assert median(durations.forecast("bash", "pytest")) == pytest.approx(30.0, rel=0.3)


def test_several_processes_learn_together() -> None:
    kept = b""
    processes = [Durations(), Durations()]
    for _ in range(10):
        for number, process in enumerate(processes):
            for _ in range(10):
                process.observe("bash", "pytest" if number else "ls", 30.0 if number else 0.02)
            changes = process.changes()
            assert changes is not None
            stored = Durations()
            if kept:
                stored.load(kept)
            stored.merge(changes)
            kept = stored.dump()
            process.observe("bash", "late", 5.0)  # while the transaction ran
            process.load(kept)
            without = Durations()
            without.load(kept)
            assert process.forecast("bash", "late").score(5.0) > without.forecast("bash", "late").score(5.0)
    for process in processes:
        assert median(process.forecast("bash", "pytest")) == pytest.approx(30.0, rel=0.2)
        assert median(process.forecast("bash", "ls")) == pytest.approx(0.02, rel=0.2)
        late = msgpack.unpackb(process.changes() or b"")
        assert [change[1] for change in late] == ["late"]


def test_changes_whose_transaction_failed_come_again() -> None:
    durations = taught(waits=1)
    first = durations.changes()
    durations.observe("bash", "ls", 1.0)
    assert len(msgpack.unpackb(first or b"")) == 1
    assert len(msgpack.unpackb(durations.changes() or b"")) == 2
    durations.load(durations.dump())
    assert durations.changes() is None


GOOD = msgpack.unpackb(taught(waits=2).dump(), strict_map_key=False)


@pytest.mark.parametrize(
    "dumped",
    [
        b"",
        b"\xc1",
        b"\x93\x01",
        msgpack.packb(7),
        msgpack.packb([2, [], {}]),
        msgpack.packb([1, [["bash"]], {}]),
        msgpack.packb([1, [[1, "", GOOD[1][0][2]]], {}]),
        msgpack.packb([1, [["bash", "", [[{999: 1.0}], None, 0.0, 0.0]]], {}]),
        msgpack.packb([1, [["bash", "", [[{1: -1.0}], None, 0.0, 0.0]]], {}]),
        msgpack.packb([1, [["bash", "", [[{1: math.nan}], None, 0.0, 0.0]]], {}]),
        msgpack.packb([1, [["bash", "", [[{1: 1.0}], None, math.nan, 1.0]]], {}]),
        msgpack.packb([1, [], []]),
    ],
)
def test_a_dump_that_is_none_is_refused_and_changes_nothing(dumped: bytes) -> None:
    durations = taught()
    before = durations.forecast("bash", "pytest")
    with pytest.raises(ValueError):
        durations.load(dumped)
    assert durations.forecast("bash", "pytest") == before


@pytest.mark.parametrize(
    "changes",
    [
        b"",
        b"\xc1",
        msgpack.packb({}) + b"x",
        msgpack.packb(3),
        msgpack.packb([["bash", "ls", 3]]),
        msgpack.packb([["bash", "ls", 3, None], ["bash", "ls", 1000, None]]),
        msgpack.packb([["bash", "ls", 3, -1]]),
        msgpack.packb([["bash", 3, 3, None]]),
        msgpack.packb([["bash", "ls", True, None]]),
    ],
)
def test_changes_that_are_none_are_refused_and_teach_nothing(changes: bytes) -> None:
    durations = taught()
    before = durations.forecast("bash", "pytest"), durations.forecast("bash", "ls")
    with pytest.raises(ValueError):
        durations.merge(changes)
    assert (durations.forecast("bash", "pytest"), durations.forecast("bash", "ls")) == before
