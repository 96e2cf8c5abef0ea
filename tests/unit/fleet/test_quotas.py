"""What accounts may have, and the one thing that a quota refuses: a session too many."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from agentstate.errors import TooManySessions
from agentstate.fleet import quotas
from agentstate.fleet.quotas import NOBODY, UNLIMITED, Quota
from agentstate.sessions import salts
from agentstate.sessions.belonging import Begun, Origin, State, Wanted
from agentstate.sessions.conversations import Conversation, Said
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import Database


def allow(database: Database, most: int | None, tenant: str = "default") -> None:
    with database.write() as connection:
        quotas.put(connection, salts.scope_of_tenant(tenant), Quota(sessions=most))


def begin(sessions: Sessions, **wanted: object) -> Begun:
    conversation = Conversation([Said("user", b"d" * 16, 10)])
    asked = Wanted("m", **{"conversation": conversation, **wanted})  # type: ignore[arg-type]
    return sessions.begin(asked, lease_ttl_s=60, expires_in_s=3600)


def test_quotas_are_read_as_they_were_put_and_cleared_ones_are_gone(database: Database) -> None:
    given = {"tenant a": Quota(1, None, 2**40, 2**50, 4), "group g": Quota(host_bytes=5), NOBODY: Quota(device_bytes=0)}
    with database.write() as connection:
        assert quotas.read(connection) == {}
        for account, quota in given.items():
            quotas.put(connection, account, UNLIMITED)
            quotas.put(connection, account, Quota(sessions=9))
            quotas.put(connection, account, quota)
        assert quotas.read(connection) == given
        assert quotas.find(connection, "tenant a") == given["tenant a"]
        quotas.put(connection, "tenant a", UNLIMITED)
        assert quotas.find(connection, "tenant a") == UNLIMITED
        assert "tenant a" not in quotas.read(connection)


def test_a_session_too_many_is_not_made_and_one_that_goes_makes_room(database: Database) -> None:
    sessions = Sessions(database, 30.0)
    first, second = sessions.create("m"), sessions.create("m")
    allow(database, 2)
    for make in (lambda: sessions.create("m"), lambda: sessions.fork(first.id, None)):
        with pytest.raises(TooManySessions, match="may have 2 session"):
            make()
    assert len(sessions.list().sessions) == 2
    assert Sessions(database, 30.0, "other").create("m")
    sessions.delete(first.id, None)
    assert sessions.create("m")
    with database.write() as connection:
        connection.execute(sa.text("UPDATE sessions SET expires_us = 1 WHERE id = :id"), {"id": second.id})
    assert sessions.create("m")
    with pytest.raises(TooManySessions):
        sessions.create("m")
    allow(database, None)
    assert sessions.create("m")


def test_a_guessed_session_too_many_is_not_made_and_one_that_is_wanted_is_refused(database: Database) -> None:
    sessions = Sessions(database, 30.0)
    allow(database, 0)
    for guess in ({}, {"harness": "opencode:1"}):
        begun = begin(sessions, **guess)
        assert (begun.resumed, begun.origin) == (None, Origin.NONE)
    for wanted in ({"session": "mine"}, {"state": State()}):
        with pytest.raises(TooManySessions):
            begin(sessions, **wanted)
    assert sessions.list().sessions == []
    allow(database, 1)
    assert begin(sessions, session="mine").origin is Origin.NAMED
    assert sessions.read("mine").id == "mine", "a session that is there is never refused"


def test_many_that_come_at_once_are_not_more_than_the_limit(database: Database) -> None:
    allow(database, 3)
    start, refused = threading.Barrier(8), []

    def make() -> None:
        start.wait()
        try:
            Sessions(database, 30.0).create("m")
        except TooManySessions as error:
            refused.append(error)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 5
    assert len(Sessions(database, 30.0).list().sessions) == 3
