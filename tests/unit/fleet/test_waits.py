"""What a service learns of waits, and makes of it: on a clock and with engines of the test's own."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from agentstate.errors import DatabaseUnreachable
from agentstate.fleet import engines, waits
from agentstate.fleet.engines import Engine
from agentstate.fleet.waits import NEVER, NOW, Awaited, Took, Waits
from agentstate.lookahead.durations import PERSON, Durations
from agentstate.lookahead.forecast import LONGEST_S, Forecast
from agentstate.sessions.collection import remove_tenant
from agentstate.sessions.outcomes import SuspendReason
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import Database
from agentstate.sql.models import durations

RANK = Engine("eng_1", "n1", 0, "tcp://1", "http://127.0.0.1:30000/v1", "m", "f1", "/pages", control_secret="s")


class Told:
    """Stands in for `Operations`."""

    def __init__(self) -> None:
        self.notices: list[tuple[str, dict[str, Any]]] = []
        self.ranks: list[Engine] = []
        self.taken_back: list[str] = []

    def tell(self, tenant: str, session: str, rank: Engine, verb: str, arguments: Callable[[], dict[str, Any]]) -> None:
        self.notices.append((verb, arguments()))
        self.ranks.append(rank)

    def untell(self, session: str) -> None:
        self.taken_back.append(session)


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_waits(database: Database, told: Told, clock: Clock) -> Iterator[Callable[[], Waits]]:
    made: list[Waits] = []

    def make() -> Waits:
        made.append(Waits(database, told, 30.0, clock))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def followed(make_waits: Callable[[], Waits]) -> Waits:
    return make_waits()


def kept(database: Database, tenant: str = "t") -> Durations:
    found = Durations()
    with database.read() as connection:
        row = connection.execute(sa.select(durations).where(durations.c.tenant == tenant)).one_or_none()
    if row is not None:
        found.load(row.learned)
    return found


def of(*observed: tuple[str, str, float | None]) -> Durations:
    known = Durations()
    for tool, head, seconds in observed:
        known.observe(tool, head, seconds)
    return known


def alike(one: Durations, other: Durations, tool: str, head: str = "") -> bool:
    first, second = (known.forecast(tool, head).mass for known in (one, other))
    return first == pytest.approx(second, abs=1e-4)


def test_forecasts_are_of_what_was_learned(followed: Waits, told: Told) -> None:
    followed.took("t", [Took("search", "", 40.0)] * 20)
    followed.begun("t", "s", [Awaited("search", age_s=2.5)], RANK)
    followed.begun("other", "s2", [Awaited("search")], RANK)
    followed.settle()
    (verb, mine), (_, others) = told.notices
    assert (verb, mine["session"], mine["kind"], mine["waited_ms"]) == ("foresee", "s", "tool", 2500)
    assert 20 < Forecast.unpack(mine["forecast"]).rest(0, 0.5) < 80
    assert Forecast.unpack(others["forecast"]).rest(0, 0.5) < 2, "another tenant's is nobody else's"


def test_a_forecast_is_made_anew_once_more_is_known(followed: Waits, told: Told) -> None:
    for seconds in (0.01, 500.0):
        followed.took("t", [Took("search", "", seconds)] * 100)
        followed.settle()
        followed.begun("t", "s", [Awaited("search")], RANK)
    followed.settle()
    before_s, after_s = (Forecast.unpack(one["forecast"]).rest(0, 0.9) for _, one in told.notices)
    assert after_s > 100 > before_s


def test_a_flood_of_names_fills_no_memory(followed: Waits, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "MAX_FORECASTS", 10)
    followed.took("t", [Took("search", "", 40.0)] * 20)
    for number in range(100):
        followed.begun("t", f"s{number}", [Awaited("search", announced_s=float(number))], RANK)
    followed.settle()
    assert len({notice["forecast"] for _, notice in told.notices}) == 1
    assert len(followed._learned["t"].forecasts) <= 10


def test_what_is_waited_for_side_by_side_has_waited_by_itself(followed: Waits, told: Told) -> None:
    followed.took("t", [Took("long", "", 100.0)] * 200 + [Took("short", "", 10.0)] * 200)
    followed.begun("t", "s", [Awaited("long", age_s=95.0), Awaited("short", age_s=0.0)], RANK)
    followed.settle()
    ((_, notice),) = told.notices
    assert notice["waited_ms"] == 0
    assert 5 < Forecast.unpack(notice["forecast"]).rest(0, 0.5) < 40, "not 100 s, of which 95 have passed"


def test_what_nothing_is_waited_for_before_comes_now(followed: Waits, told: Told) -> None:
    followed.begun("t", "s", [], RANK)
    followed.expected("t", "s", NEVER, "other", RANK)
    followed.released("t", "s", RANK)
    followed.settle()
    assert [verb for verb, _ in told.notices] == ["foresee", "foresee", "release"]
    assert [one["forecast"] for _, one in told.notices[:2]] == [NOW.pack(), NEVER.pack()]


def test_time_passes_until_it_is_told(followed: Waits, told: Told, clock: Clock) -> None:
    told.tell = lambda tenant, session, rank, verb, arguments: sent.append(arguments)  # type: ignore[method-assign]
    sent: list[Callable[[], dict[str, Any]]] = []
    followed.begun("t", "s", [Awaited("search", age_s=1.0)], RANK)
    followed.settle()
    clock.now_s += 4
    assert sent[0]()["waited_ms"] == 5000
    clock.now_s -= 100
    assert sent[0]()["waited_ms"] == 0


def test_services_learn_together(make_waits: Callable[[], Waits], database: Database) -> None:
    one, other = make_waits(), make_waits()
    for _ in range(3):
        one.took("t", [Took("search", "", 40.0)])
        one.settle()
        other.took("t", [Took("search", "git diff", 40.0)])
        other.took("t", [Took(PERSON, "", 300.0)])
        other.settle()
    everything = of(*[("search", "", 40.0)] * 3, *[("search", "git diff", 40.0)] * 3, *[(PERSON, "", 300.0)] * 3)
    for tool, head in (("search", ""), ("search", "git diff"), (PERSON, "")):
        assert alike(kept(database), everything, tool, head)


def test_what_others_learned_is_read_after_a_while(make_waits: Callable[[], Waits], told: Told, clock: Clock) -> None:
    one, other = make_waits(), make_waits()
    other.begun("t", "s", [Awaited("search")], RANK)
    other.settle()
    one.took("t", [Took("search", "", 500.0)] * 100)
    one.settle()
    clock.now_s += waits.REFRESH_S + 1
    other.begun("t", "s", [Awaited("search")], RANK)
    other.settle()
    before, after = (Forecast.unpack(notice["forecast"]).rest(0, 0.5) for _, notice in told.notices)
    assert before < 2 < 100 < after


def test_what_cannot_be_read_is_learned_anew(
    followed: Waits, database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    with database.write() as connection:
        connection.execute(sa.insert(durations).values(tenant="t", version=7, updated_us=1, learned=b"\xc1 damaged"))
    followed.took("t", [Took("search", "", 40.0)])
    followed.settle()
    assert "cannot be read, and is learned anew" in caplog.text
    assert alike(kept(database), of(("search", "", 40.0)), "search")


def test_what_was_learned_waits_for_sql(
    followed: Waits, database: Database, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(self: Database) -> Any:
        raise DatabaseUnreachable("from the test")

    with monkeypatch.context() as away:
        away.setattr(Database, "write", down)
        away.setattr(Database, "read", down)
        followed.took("t", [Took("search", "", 40.0)])
        followed.begun("t", "s", [Awaited("search")], RANK)
        followed.begun("t", "unheard of", [Awaited("search")])
        followed.settle()
    assert [one["session"] for _, one in told.notices] == ["s"]
    followed.took("t", [Took("search", "", 40.0)])
    followed.settle()
    assert alike(kept(database), of(*[("search", "", 40.0)] * 2), "search")


def test_more_than_can_be_followed_is_forgotten(followed: Waits, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    going, may_go_on = threading.Event(), threading.Event()

    def hold(*given: Any) -> None:
        going.set()
        may_go_on.wait()

    monkeypatch.setattr(waits, "MAX_NOTES", 10)
    followed._note(hold)
    going.wait()
    for number in range(100):
        followed.begun("t", f"s{number}", [Awaited("search")], RANK)
    may_go_on.set()
    followed.settle()
    assert len(told.notices) == 10


def test_sessions_that_wait_share_what_is_large(followed: Waits, told: Told) -> None:
    """A session keeps neither a rank nor a forecast of its own."""

    def wait(sessions: Sequence[int]) -> int:
        for number in sessions:
            awaited = [Awaited("search", announced_s=1.0 + number), Awaited("run", age_s=float(number))]
            # As SQL gives them: equal, and not the same.
            followed.over(f"s{number}", replace(RANK, heartbeat_us=number))
            followed.begun("t", f"s{number}", awaited, replace(RANK, heartbeat_us=number))
            followed.took("t", [Took("search", "", 40.0)])
            followed.settle()
        assert len(told.notices) == len(sessions)
        told.ranks.clear()
        told.notices.clear()
        gc.collect()
        return sum(isinstance(one, Engine | Forecast) for one in gc.get_objects())

    assert wait(range(20)) == wait(range(20, 40))


def test_an_engine_beyond_the_bound_is_told_all_the_same(
    followed: Waits, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "MAX_ENGINES", 2)
    ranks = [replace(RANK, id=f"eng_{number}") for number in range(4)]
    for number, rank in enumerate(ranks):
        followed.over(f"s{number}", rank)
    for number in range(4):
        followed.begun("t", f"s{number}", [Awaited("search")])
    followed.settle()
    assert told.ranks == ranks


def test_tenants_beyond_the_bound_are_in_sql(
    followed: Waits, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "MAX_TENANTS", 2)
    for _ in range(2):
        for tenant in "abcde":
            followed.took(tenant, [Took("search", "", 40.0)])
    followed.settle()
    for tenant in "abcde":
        assert alike(kept(database, tenant), of(*[("search", "", 40.0)] * 2), "search")


def test_who_is_away_for_a_day_teaches_that(followed: Waits, database: Database, clock: Clock, told: Told) -> None:
    """Not a session that has gone on meanwhile, at another service."""
    sessions = Sessions(database, 30.0)
    left, back, running, gone = (sessions.create("m").id for _ in range(4))

    def turn(session: str) -> None:
        key = sessions.resume(session, lease_ttl_s=60, tail=0).lease.key
        sessions.suspend(session, key, SuspendReason.USER_WAIT)

    for session in (left, back, running, gone):
        turn(session)
        followed.begun("t", session, [Awaited("search", session)], RANK)
    with database.write() as connection:
        connection.execute(sa.text("UPDATE leases SET released_us = released_us - 86460000000"))
    turn(back)
    sessions.resume(running, lease_ttl_s=60, tail=0)
    sessions.delete(gone, None)
    followed.settle()
    clock.now_s += LONGEST_S + 60
    followed.begun("t", "new", [Awaited("search", "new")], RANK)
    followed.settle()
    known, blank = kept(database), Durations()
    for session in (left, gone):
        assert known.forecast("search", session).mass[-1] > 10 * blank.forecast("search", "").mass[-1]
    for session in (back, running, "new"):
        assert known.forecast("search", session) == known.forecast("search", "unheard of")


def test_an_engine_that_is_not_known_here_is_found_in_sql(followed: Waits, database: Database, told: Told) -> None:
    with database.write() as connection:
        engines.register(connection, RANK)
    sessions = Sessions(database, 30.0)
    with_turn, without = sessions.create("m").id, sessions.create("m").id
    sessions.resume(with_turn, lease_ttl_s=60, tail=0)
    for session in (with_turn, without):
        followed.begun("t", session, [Awaited("search")])
    followed.settle()
    assert [one["session"] for _, one in told.notices] == [with_turn]
    assert told.ranks[0].id == RANK.id


def test_a_request_that_has_come_is_not_foreseen(followed: Waits, told: Told) -> None:
    followed.begun("t", "s", [Awaited("search")], RANK)
    followed.over("s", RANK)
    followed.begun("t", "s", [Awaited("search")])
    followed.settle()
    assert told.taken_back == ["s"]
    assert told.ranks == [RANK, RANK]


def test_one_that_goes_wrong_is_not_the_last(followed: Waits, told: Told, caplog: pytest.LogCaptureFixture) -> None:
    followed.begun("t", "s", [Awaited("search", announced_s="soon")], RANK)  # type: ignore[arg-type]
    followed.begun("t", "s", [Awaited("search")], RANK)
    followed.settle()
    assert len(told.notices) == 1
    assert "a wait is not followed" in caplog.text


def test_with_a_tenant_goes_what_was_learned_of_it(followed: Waits, database: Database) -> None:
    for tenant in ("gone", "here"):
        followed.took(tenant, [Took("search", "", 40.0)])
    followed.settle()
    remove_tenant(database, "gone")
    assert kept(database, "gone").dump() == Durations().dump()
    assert alike(kept(database, "here"), of(("search", "", 40.0)), "search")
    # A service that knew it does not bring it back.
    followed.took("gone", [Took("other", "", 40.0)])
    followed.settle()
    assert alike(kept(database, "gone"), of(("other", "", 40.0)), "search")


def test_closing_keeps_what_was_learned(followed: Waits, database: Database) -> None:
    followed.took("t", [Took("search", "", 40.0)])
    followed.close()
    followed.close()
    assert alike(kept(database), of(("search", "", 40.0)), "search")


def test_waits_that_end_are_held_against_their_forecasts(followed: Waits, clock: Clock) -> None:
    followed.took("t", [Took("search", "", 40.0)] * 50)
    followed.begun("t", "s", [Awaited("search")], RANK)
    followed.begun("t", "person", [Awaited(PERSON)], RANK)
    followed.begun("t", "at once", [], RANK)
    followed.begun("t", "released", [Awaited("search")], RANK)
    clock.now_s += 40.0
    followed.released("t", "released", RANK)
    for session in ("s", "at once", "released", "unknown"):
        followed.over(session, RANK)
    # Not when it is learned.
    clock.now_s += 10_000.0
    followed.over("person", RANK)
    followed.over("person", RANK)
    followed.settle()
    deciles = followed.calibration.deciles
    assert sorted(deciles) == ["person", "tool"]
    assert (sum(deciles["tool"]), sum(deciles["person"])) == (1, 1)
    assert sum(deciles["tool"][2:8]) == 1
    assert deciles["person"][8] == 1


def test_who_never_comes_back_is_held_against_the_forecast_too(followed: Waits, clock: Clock) -> None:
    followed.begun("t", "s", [Awaited("search")], RANK)
    clock.now_s += LONGEST_S + 3601.0
    followed.settle()
    assert followed.calibration.deciles == {"tool": [0] * 9 + [1]}


def test_announcements_are_held_against_what_was_learned(followed: Waits) -> None:
    followed.took("t", [Took("search", "", 40.0, announced_s=40.0), Took("search", "", 40.0), Took(PERSON, "", 5.0)])
    followed.settle()
    losses = followed.calibration.losses
    assert list(losses) == ["tool"] and losses["tool"].waits == 1
    assert losses["tool"].announced > 0 and losses["tool"].learned > 0
