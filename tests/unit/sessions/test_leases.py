from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import sqlalchemy as sa

from agentstate.errors import LeaseLost, SessionBusy
from agentstate.sessions.leases import LeaseKey
from agentstate.sessions.outcomes import Resumed, SuspendReason
from agentstate.sessions.transcript import NewEntry
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import Database
from agentstate.sql.models import EntryKind, SessionStatus

NOTE = NewEntry(EntryKind.NOTE, {"text": "hello"})


def resume(sessions: Sessions, session_id: str) -> Resumed:
    return sessions.resume(session_id, lease_ttl_s=60, tail=10)


def lapse(database: Database, session_id: str) -> None:
    """Let the time of a lease be over."""
    with database.write() as connection:
        connection.execute(sa.text("UPDATE leases SET expires_us = 1 WHERE session_id = :id"), {"id": session_id})


def test_a_leased_session_is_busy_until_it_is_released(sessions: Sessions) -> None:
    session = sessions.create("m")
    first = resume(sessions, session.id)
    with pytest.raises(SessionBusy) as error:
        resume(sessions, session.id)
    assert 0 < error.value.retry_after_s <= 60
    assert error.value.retryable
    assert error.value.revision == first.session.revision
    sessions.suspend(session.id, first.lease.key, SuspendReason.USER_WAIT)
    assert resume(sessions, session.id).lease.key.epoch == first.lease.key.epoch + 1


def test_of_many_that_resume_at_once_one_gets_the_lease(database_url: str) -> None:
    """Each with a database connection of its own, as services on different machines."""
    own = [Sessions(Database(database_url), 10) for _ in range(8)]
    session = own[0].create("m")
    for _ in range(5):
        start = threading.Barrier(len(own))
        won: list[Resumed] = []
        busy: list[SessionBusy] = []

        def race(sessions: Sessions, start: threading.Barrier, won: list[Resumed], busy: list[SessionBusy]) -> None:
            start.wait()
            try:
                won.append(resume(sessions, session.id))
            except SessionBusy as error:
                busy.append(error)

        threads = [threading.Thread(target=race, args=(sessions, start, won, busy)) for sessions in own]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(busy)) == (1, 7)
        own[0].suspend(session.id, won[0].lease.key, SuspendReason.USER_WAIT)


def test_a_lapsed_lease_is_taken_over_and_its_holder_has_lost_it(sessions: Sessions, database: Database) -> None:
    session = sessions.create("m")
    old = resume(sessions, session.id).lease
    lapse(database, session.id)
    new = resume(sessions, session.id)
    assert new.lease.key.epoch == old.key.epoch + 1
    for attempt in (
        lambda: sessions.append(session.id, old.key, [NOTE]),
        lambda: sessions.suspend(session.id, old.key, SuspendReason.DONE),
        lambda: sessions.renew(session.id, old.key, lease_ttl_s=60),
    ):
        with pytest.raises(LeaseLost, match=f"epoch {old.key.epoch}") as error:
            attempt()
        assert error.value.revision == new.session.revision
    sessions.append(session.id, new.lease.key, [NOTE])
    assert len(sessions.entries(session.id).entries) == 1


def test_a_lapsed_lease_is_lost_also_when_nobody_took_it(sessions: Sessions, database: Database) -> None:
    session = sessions.create("m")
    lease = resume(sessions, session.id).lease
    lapse(database, session.id)
    assert sessions.read(session.id).status is SessionStatus.IDLE
    with pytest.raises(LeaseLost):
        sessions.append(session.id, lease.key, [NOTE])
    with pytest.raises(LeaseLost):
        sessions.renew(session.id, lease.key, lease_ttl_s=60)


def test_token_and_epoch_must_both_be_right(sessions: Sessions) -> None:
    session = sessions.create("m")
    key = resume(sessions, session.id).lease.key
    for wrong in (replace(key, epoch=key.epoch + 1), replace(key, token=key.token + "x"), LeaseKey("", 1)):
        with pytest.raises(LeaseLost):
            sessions.append(session.id, wrong, [NOTE])


def test_a_lease_of_another_session_is_none(sessions: Sessions) -> None:
    mine, other = sessions.create("m"), sessions.create("m")
    key = resume(sessions, mine.id).lease.key
    resume(sessions, other.id)
    with pytest.raises(LeaseLost):
        sessions.append(other.id, key, [NOTE])


def test_a_released_lease_cannot_be_used_again(sessions: Sessions) -> None:
    session = sessions.create("m")
    key = resume(sessions, session.id).lease.key
    sessions.suspend(session.id, key, SuspendReason.USER_WAIT)
    with pytest.raises(LeaseLost):
        sessions.suspend(session.id, key, SuspendReason.USER_WAIT)
    with pytest.raises(LeaseLost):
        sessions.renew(session.id, key, lease_ttl_s=60)


def test_renewing_moves_the_end_of_a_lease_both_ways(sessions: Sessions) -> None:
    session = sessions.create("m")
    lease = resume(sessions, session.id).lease
    longer = sessions.renew(session.id, lease.key, lease_ttl_s=600)
    shorter = sessions.renew(session.id, lease.key, lease_ttl_s=30)
    assert shorter.expires_us < lease.expires_us < longer.expires_us
    assert longer.key == lease.key


def test_the_token_is_kept_out_of_sql_and_of_logs(sessions: Sessions, database: Database) -> None:
    session = sessions.create("m")
    lease = resume(sessions, session.id).lease
    with database.read() as connection:
        stored = connection.execute(sa.text("SELECT token_hash FROM leases")).scalar_one()
    assert lease.key.token.encode() not in bytes(stored)
    assert lease.key.token not in repr(lease)
