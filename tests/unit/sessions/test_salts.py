"""Tenants cannot tell each other's prompts by their KV, unless an operator lets them share it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from agentstate.errors import SettingsError
from agentstate.fleet import engines, manifests
from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import Manifest
from agentstate.sessions import salts, tenants
from agentstate.sessions.outcomes import Resumed
from agentstate.sessions.tenants import Tenant
from agentstate.sessions.transcript import NewEntry
from agentstate.sessions.verbs import Sessions
from agentstate.sql import models
from agentstate.sql.database import Database
from agentstate.sql.models import EntryKind

ENGINE = Engine("eng_1", "n1", 0, "tcp://127.0.0.1:5000", "http://127.0.0.1:30000/v1", "m", "f1", "/pages")


def with_key(database: Database, tenant: str, kv_group: str | None = None) -> Sessions:
    """The sessions of a tenant that has a key, and whose new sessions share KV with a group."""
    with database.write() as connection:
        tenants.create_key(connection, tenant)
        tenants.put(connection, replace(tenants.find(connection, tenant), kv_group=kv_group))
    return Sessions(database, 30.0, tenant)


def turn(sessions: Sessions, session_id: str) -> Resumed:
    resumed = sessions.resume(session_id, lease_ttl_s=60, tail=0)
    with sessions._database.write() as connection:
        connection.execute(sa.update(models.leases).values(expires_us=0))
    return resumed


def salt_of(sessions: Sessions, **options: str) -> str | None:
    return turn(sessions, sessions.create("m", **options).id).cache_salt


def store(database: Database, session_id: str) -> None:
    with database.write() as connection:
        if not engines.live(connection, 30.0):
            engines.register(connection, ENGINE)
        manifests.save(connection, Manifest(session_id, "f1", 0, "n1", "eng_1", 64, 64, b"k" * 32, 10))


def test_without_a_key_there_is_nobody_to_keep_apart(sessions: Sessions) -> None:
    assert salt_of(sessions) is None
    assert salt_of(sessions, cache_salt="mine") == "mine"


def test_the_sessions_of_a_tenant_have_one_salt_that_no_other_tenant_has(database: Database) -> None:
    one, other = with_key(database, "one"), with_key(database, "other")
    salt = salt_of(one)
    assert salt is not None
    assert len(salt) > 40
    assert "one" not in salt
    assert salt_of(one) == salt
    assert salt_of(other) not in (None, salt)


def test_what_a_client_chose_tells_its_own_sessions_apart(database: Database) -> None:
    one, other = with_key(database, "one"), with_key(database, "other")
    found = {salt_of(one), salt_of(one, cache_salt="a"), salt_of(one, cache_salt="b"), salt_of(other, cache_salt="a")}
    assert len(found) == 4
    assert not found & {None, "a", "b"}
    assert salt_of(one, cache_salt="a") in found


def test_tenants_share_as_an_operator_says(database: Database) -> None:
    one, two = with_key(database, "one", "team"), with_key(database, "two", "team")
    alone, everybody = with_key(database, "team"), with_key(database, "open", tenants.EVERYBODY)
    assert salt_of(one) == salt_of(two)
    assert salt_of(alone) not in (None, salt_of(one))
    assert salt_of(everybody) is None


def test_another_installation_has_another_salt(database: Database, tmp_path: Path) -> None:
    one = with_key(database, "one")
    other_database = Database(f"sqlite:///{tmp_path / 'other.db'}")
    other_database.upgrade()
    assert salt_of(with_key(other_database, "one")) != salt_of(one)
    other_database.close()


def test_what_was_made_before_keeps_its_salt(sessions: Sessions, database: Database) -> None:
    old = sessions.create("m", cache_salt="mine")
    apart = with_key(database, "default")
    assert turn(sessions, old.id).cache_salt == "mine"
    with database.write() as connection:
        tenants.put(connection, Tenant("default", None, None, kv_group="team"))
    before = apart.create("m")
    with database.write() as connection:
        tenants.put(connection, Tenant("default", None, None))
    assert turn(apart, before.id).cache_salt not in (None, salt_of(apart))


def test_a_fork_in_another_scope_does_not_promise_its_parents_pages(sessions: Sessions, database: Database) -> None:
    old = sessions.create("m")
    resumed = sessions.resume(old.id, lease_ttl_s=60, tail=0)
    sessions.append(old.id, resumed.lease.key, [NewEntry(EntryKind.NOTE, {"text": "n"})])
    store(database, old.uid)
    same = turn(sessions, sessions.fork(old.id, None).id)
    assert (same.kv.valid, same.cache_salt) == (True, None)
    apart = with_key(database, "default")
    fork = turn(apart, apart.fork(old.id, None).id)
    assert not fork.kv.valid
    assert fork.cache_salt is not None


def test_a_new_secret_puts_all_kv_of_tenants_out_of_reach_and_nothing_else(
    sessions: Sessions, database: Database
) -> None:
    free = sessions.create("m")
    one = with_key(database, "one")
    scoped = one.create("m")
    for session in (free, scoped):
        store(database, session.uid)
    before = turn(one, scoped.id)
    assert before.kv.valid
    with database.write() as connection:
        assert salts.rotate(connection) == 1
    after = turn(one, scoped.id)
    assert after.cache_salt != before.cache_salt
    assert not after.kv.valid
    assert turn(sessions, free.id).kv.valid


def test_a_group_has_a_name(database: Database) -> None:
    with database.write() as connection, pytest.raises(SettingsError, match="no name of a group"):
        tenants.put(connection, Tenant("one", None, None, kv_group="a b"))


@pytest.mark.parametrize(
    ("group", "said"), [(None, "its own"), ("*", "everybody who reaches the engines"), ("team", "group team")]
)
def test_who_shares_is_said(group: str | None, said: str) -> None:
    assert said in tenants.sharing(Tenant("one", None, None, group))
