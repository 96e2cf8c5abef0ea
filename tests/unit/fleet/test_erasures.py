"""What is to be erased, and when: decided in SQL, from manifests."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import sqlalchemy as sa

from agentstate.errors import SessionExpired
from agentstate.fleet import erasures, manifests
from agentstate.fleet.erasures import Chain, StoreName, head_of
from agentstate.fleet.manifests import Manifest
from agentstate.sessions import branches, collection, salts, tenants
from agentstate.sessions.collection import Collector, collect, release_expired, remove_tenant
from agentstate.sessions.outcomes import SuspendReason
from agentstate.sessions.transcript import NewEntry
from agentstate.sessions.verbs import Sessions
from agentstate.sql import models
from agentstate.sql.database import Database
from agentstate.sql.models import EntryKind

STORE = StoreName("f1", 0, "n1")


def chain(*pages: object) -> bytes:
    """The packed keys of pages that follow each other: as SGLang's, a key covers what is before it."""
    keys = [b""]
    for page in pages:
        keys.append(hashlib.sha256(keys[-1] + str(page).encode()).digest())
    return b"".join(keys)


def manifest(session_id: str, keys: bytes, store: StoreName = STORE) -> Manifest:
    return Manifest(
        session_id, **vars(store), engine_id="eng_1", page_size=64, tokens=2 * len(keys), keys=keys, nbytes=1
    )


def save(database: Database, session_id: str, *pages: object) -> None:
    with database.write() as connection:
        manifests.save(connection, manifest(session_id, chain(*pages)))


def publish(database: Database, session_id: str, *pages: object, epoch: int = 0) -> bool:
    with database.write() as connection:
        return manifests.publish(connection, replace(manifest(session_id, chain(*pages)), epoch=epoch))


def waiting(database: Database, store: StoreName = STORE) -> list[tuple[str, int, bytes]]:
    """Of what is to be erased the session, the first page and the keys."""
    with database.read() as connection:
        found = erasures.waiting(connection, store, 1000)
        assert erasures.count(connection, store) == len(found)
        for erasure in found:
            # The first page tells where in its chain it is, and so does its head.
            page = erasure.chain.first
            if page < erasures.HEAD_PAGES:
                assert erasure.chain.head[4 * page : 4 * page + 4] == erasure.chain.keys[:4]
    return [(erasure.session_id, erasure.chain.first, erasure.chain.keys) for erasure in found]


def needed(database: Database, keys: bytes, first: int = 0, store: StoreName = STORE) -> int:
    with database.read() as connection:
        return erasures.needed_pages(connection, store, Chain(first, head_of(keys), keys[32 * first :]))


def listed(database: Database) -> set[str]:
    with database.read() as connection:
        heads = set(connection.execute(sa.select(models.manifest_heads.c.session_id)).scalars())
        assert heads == set(connection.execute(sa.select(models.manifests.c.session_id)).scalars())
    return heads


def expire(database: Database, uid: str) -> None:
    with database.write() as connection:
        connection.execute(sa.update(models.sessions).where(models.sessions.c.id == uid).values(expires_us=1))


def append(sessions: Sessions, session_id: str) -> str:
    lease = sessions.resume(session_id, lease_ttl_s=60, tail=0).lease
    appended = sessions.append(session_id, lease.key, [NewEntry(EntryKind.MESSAGE, {"role": "user", "content": "x"})])
    sessions.suspend(session_id, lease.key, "idle")  # type: ignore[arg-type]
    return appended.entries[-1].id


# --- when


def test_a_session_that_is_deleted_is_erased_in_every_store(sessions: Sessions, database: Database) -> None:
    gone, other = sessions.create("m"), sessions.create("m")
    elsewhere = StoreName("f1", 1, "n2")
    save(database, gone.uid, "a", "b")
    save(database, other.uid, "a", "c")
    with database.write() as connection:
        manifests.save(connection, manifest(gone.uid, chain("a"), elsewhere))
    assert waiting(database) == []
    sessions.delete(gone.id, None)
    assert waiting(database) == [(gone.uid, 0, chain("a", "b"))]
    assert waiting(database, elsewhere) == [(gone.uid, 0, chain("a"))]
    assert listed(database) == {other.uid}
    collect(database, expired_after_s=0)
    assert len(waiting(database)) == 1


def test_what_is_done_is_asked_for_no_more(sessions: Sessions, database: Database) -> None:
    for page in ("a", "b"):
        session = sessions.create("m")
        save(database, session.uid, page)
        sessions.delete(session.id, None)
    with database.write() as connection:
        first, _ = erasures.waiting(connection, STORE, 10)
        assert erasures.waiting(connection, STORE, 1) == [first]
        erasures.done(connection, [first.id])
    assert [keys for _, _, keys in waiting(database)] == [chain("b")]


def test_a_session_that_expires_is_erased_although_it_is_still_told_from_one_that_never_was(
    sessions: Sessions, database: Database
) -> None:
    session, other = sessions.create("m"), sessions.create("m")
    for uid in (session.uid, other.uid):
        save(database, uid, "a", uid)
    expire(database, session.uid)
    release_expired(database)
    assert [uid for uid, _, _ in waiting(database)] == [session.uid]
    assert listed(database) == {other.uid}
    with pytest.raises(SessionExpired):
        sessions.read(session.id)
    # What an engine still has to say of it is erased as well.
    assert not publish(database, session.uid, "a", session.uid, "late")
    assert waiting(database)[1:] == [(session.uid, 0, chain("a", session.uid, "late"))]


@pytest.mark.parametrize("collected", [False, True])
def test_a_manifest_of_a_session_that_is_gone_is_not_kept(
    sessions: Sessions, database: Database, collected: bool
) -> None:
    session = sessions.create("m")
    save(database, session.uid, "a")
    sessions.delete(session.id, None)
    if collected:
        collect(database, expired_after_s=0)
    assert not publish(database, session.uid, "a", "b")
    with database.write() as connection:
        manifests.abandon(connection, session.uid, STORE, Chain(0, head_of(chain("c")), chain("c")))
    assert [keys for _, _, keys in waiting(database)] == [chain("a"), chain("a", "b"), chain("c")]
    assert listed(database) == set()


def test_what_a_turn_that_was_taken_over_has_stored_goes_with_the_session(
    sessions: Sessions, database: Database
) -> None:
    session = sessions.create("m")
    begun = sessions.resume(session.id, lease_ttl_s=60, tail=0)
    with database.write() as connection:
        connection.execute(sa.update(models.leases).values(expires_us=1))
    append(sessions, session.id)
    assert not publish(database, session.uid, "a", "old", epoch=begun.lease.key.epoch)
    assert publish(database, session.uid, "a", "new", epoch=begun.lease.key.epoch + 1)
    assert waiting(database) == []
    sessions.delete(session.id, None)
    assert sorted(keys for _, _, keys in waiting(database)) == sorted([chain("a", "new"), chain("a", "old")])


def test_a_tenant_that_is_removed_is_erased_also_what_runs(database: Database) -> None:
    with database.write() as connection:
        key = tenants.create_key(connection, "acme")
    mine, others = Sessions(database, 30.0, "acme"), Sessions(database, 30.0, "other")
    kept = others.create("m")
    save(database, kept.uid, "k")
    for number in range(3):
        session = mine.create("m")
        save(database, session.uid, number)
    mine.resume(session.id, lease_ttl_s=60, tail=0)
    assert remove_tenant(database, "acme") == 3
    assert sorted(keys for _, _, keys in waiting(database)) == sorted(chain(number) for number in range(3))
    assert listed(database) == {kept.uid}
    assert mine.list().sessions == []
    with database.read() as connection:
        assert tenants.authenticate(connection, key.secret) is None
    assert remove_tenant(database, "acme") == 0


def test_what_a_new_secret_puts_out_of_reach_is_erased(database: Database) -> None:
    before = Sessions(database, 30.0).create("m")
    with database.write() as connection:
        tenants.create_key(connection, "acme")
    scoped = Sessions(database, 30.0, "acme").create("m")
    save(database, before.uid, "a")
    save(database, scoped.uid, "b")
    save(database, scoped.uid, "c")
    with database.write() as connection:
        assert salts.rotate(connection) == 1
    assert sorted(waiting(database)) == sorted([(scoped.uid, 0, chain("b")), (scoped.uid, 0, chain("c"))])
    assert listed(database) == {before.uid}


def test_kv_that_is_given_up_with_a_turn_is_erased(sessions: Sessions, database: Database) -> None:
    session = sessions.create("m")
    save(database, session.uid, "a")
    lease = sessions.resume(session.id, lease_ttl_s=60, tail=0).lease
    sessions.suspend(session.id, lease.key, "idle", release_kv=True)  # type: ignore[arg-type]
    assert [keys for _, _, keys in waiting(database)] == [chain("a")]


@pytest.mark.parametrize("first", ["deletion", "manifest"])
def test_a_manifest_that_is_saved_beside_the_deletion_of_its_session_is_erased(
    sessions: Sessions, database: Database, first: str
) -> None:
    session = sessions.create("m")
    append(sessions, session.id)
    published: list[bool] = []

    def second() -> None:
        if first == "deletion":
            published.append(publish(database, session.uid, "a"))
        else:
            sessions.delete(session.id, None)

    other = threading.Thread(target=second)
    with database.write() as connection:
        if first == "deletion":
            row = connection.execute(sa.select(models.sessions).where(models.sessions.c.id == session.uid)).one()
            branches.bury(connection, row)
        else:
            assert manifests.publish(connection, manifest(session.uid, chain("a")))
        other.start()
    other.join()
    assert published == ([False] if first == "deletion" else [])
    assert [keys for _, _, keys in waiting(database)] == [chain("a")]
    assert listed(database) == set()


def test_what_has_expired_is_erased_long_before_anything_else_is_collected(
    sessions: Sessions, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "EXPIRY_S", 0.02)
    session = sessions.create("m")
    save(database, session.uid, "a")
    expire(database, session.uid)
    collector = Collector(database, interval_s=3600, expired_after_s=0)
    pause = threading.Event()
    for _ in range(3000):
        if waiting(database):
            break
        pause.wait(0.02)
    collector.close()
    assert [keys for _, _, keys in waiting(database)] == [chain("a")]
    with pytest.raises(SessionExpired):
        sessions.read(session.id)


# --- forks


def test_what_a_fork_is_going_to_begin_with_is_kept_until_it_has_pages_of_its_own(
    sessions: Sessions, database: Database
) -> None:
    parent = sessions.create("m")
    append(sessions, parent.id)
    save(database, parent.uid, "a", "b", "c")
    fork = sessions.fork(parent.id, None)
    grandchild = sessions.fork(fork.id, None)
    sessions.delete(parent.id, None)
    collect(database, expired_after_s=0)
    assert waiting(database) == []
    save(database, fork.uid, "a", "b", "d")
    assert waiting(database) == []
    save(database, grandchild.uid, "a", "e")
    assert waiting(database) == [(parent.uid, 0, chain("a", "b", "c"))]
    assert needed(database, chain("a", "b", "c")) == 2
    assert listed(database) == {fork.uid, grandchild.uid}


def test_the_last_fork_to_go_takes_what_it_was_going_to_begin_with_along(
    sessions: Sessions, database: Database
) -> None:
    parent = sessions.create("m")
    append(sessions, parent.id)
    save(database, parent.uid, "a")
    forks = [sessions.fork(parent.id, None) for _ in range(2)]
    sessions.delete(parent.id, None)
    sessions.delete(forks[0].id, None)
    assert waiting(database) == []
    expire(database, forks[1].uid)
    collect(database, expired_after_s=3600)
    collect(database, expired_after_s=0)
    assert waiting(database) == [(parent.uid, 0, chain("a"))]


def test_a_fork_that_is_rewound_to_before_its_parent_keeps_nothing(sessions: Sessions, database: Database) -> None:
    parent = sessions.create("m")
    append(sessions, parent.id)
    save(database, parent.uid, "a")
    fork = sessions.fork(parent.id, None)
    sessions.delete(parent.id, None)
    sessions.rewind(fork.id, None, at=None)
    collect(database, expired_after_s=3600)
    assert waiting(database) == [(parent.uid, 0, chain("a"))]


def test_a_fork_with_another_salt_keeps_nothing(database: Database) -> None:
    sessions = Sessions(database, 30.0)
    parent = sessions.create("m")
    append(sessions, parent.id)
    save(database, parent.uid, "a")
    with database.write() as connection:
        tenants.create_key(connection, "default")
    sessions.fork(parent.id, None)
    sessions.delete(parent.id, None)
    assert waiting(database) == [(parent.uid, 0, chain("a"))]


# --- what a session has left behind


def test_what_a_session_went_away_from_is_erased_with_it(sessions: Sessions, database: Database) -> None:
    session = sessions.create("m")
    for pages in (("a", "b", "c"), ("a", "b", "c", "d"), ("a", "x"), ("a", "x", "y"), ("z",), ("a", "b", "c", "d")):
        save(database, session.uid, *pages)
    assert waiting(database) == []
    sessions.delete(session.id, None)
    assert sorted(waiting(database)) == sorted(
        [
            (session.uid, 0, chain("a", "b", "c", "d")),
            (session.uid, 1, chain("a", "b", "c", "d")[32:]),
            (session.uid, 0, chain("a", "x", "y")),
            (session.uid, 0, chain("z")),
        ]
    )


def test_what_was_left_twice_is_remembered_once_and_as_a_whole(sessions: Sessions, database: Database) -> None:
    session = sessions.create("m")
    for pages in (("a", "b"), ("a", "c"), ("a", "b"), ("d",), ("a", "b"), ("a", "c")):
        save(database, session.uid, *pages)
    sessions.delete(session.id, None)
    assert sorted((first, keys) for _, first, keys in waiting(database)) == sorted(
        [(0, chain("a", "c")), (0, chain("a", "b")), (0, chain("d")), (1, chain("a", "c")[32:])]
    )


def test_of_a_session_that_goes_another_way_again_and_again_the_oldest_is_erased(
    sessions: Sessions, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifests, "MOST_ABANDONED", 3)
    session = sessions.create("m")
    for number in range(6):
        save(database, session.uid, "a", number)
        with database.write() as connection:
            # The clock of SQLite has milliseconds.
            connection.execute(
                sa.update(models.abandoned_pages).values(abandoned_us=models.abandoned_pages.c.abandoned_us - 5000)
            )
    assert [keys for _, _, keys in waiting(database)] == [chain("a", number)[32:] for number in range(2)]


def test_pages_that_are_stored_after_one_that_is_not_are_erased_too(sessions: Sessions, database: Database) -> None:
    session = sessions.create("m")
    keys = chain("a", "b", "c", "d")
    save(database, session.uid, "a")
    with database.write() as connection:
        manifests.abandon(connection, session.uid, STORE, Chain(2, head_of(keys), keys[64:]))
        short = manifest(session.uid, b"")
        manifests.cut(connection, short, Chain(0, head_of(keys), keys[:32]))
        assert manifests.load(connection, session.uid, *vars(STORE).values()) == short
    sessions.delete(session.id, None)
    with database.read() as connection:
        found = erasures.waiting(connection, STORE, 10)
    assert sorted((one.chain.first, one.chain.keys) for one in found) == [(0, keys[:32]), (2, keys[64:])]


def test_with_a_store_goes_what_was_to_be_erased_in_it(sessions: Sessions, database: Database) -> None:
    session = sessions.create("m")
    save(database, session.uid, "a")
    save(database, session.uid, "b")
    sessions.delete(session.id, None)
    other = sessions.create("m")
    save(database, other.uid, "c")
    save(database, other.uid, "d")
    with database.write() as connection:
        manifests.forget_store(connection, "f", 0, "n1")
    assert (waiting(database), listed(database)) == ([], set())
    sessions.delete(other.id, None)
    assert waiting(database) == []


# --- what else needs it


def test_what_another_session_lists_is_needed_wherever_the_two_part(database: Database) -> None:
    draw = random.Random(7)
    tree: list[Sequence[object]] = [()]
    for number in range(150):
        parent = draw.choice(tree)
        length = draw.choice([1, 2, 3, 60, 200])
        tree.append([*parent[: draw.randint(0, len(parent))], *((number, page) for page in range(length))][:400])
    saved = draw.sample(tree[1:], 90)
    for number, pages in enumerate(saved):
        save(database, f"s{number}", *pages)
    lists = [chain(*pages) for pages in saved]
    for pages in draw.sample(tree[1:], 60):
        keys = chain(*pages)
        common = max(Chain(0, b"", keys).common(other) for other in lists)
        assert common == max(
            next((page for page in range(len(pages)) if keys[: 32 * page + 32] != other[: 32 * page + 32]), len(pages))
            for other in lists
        )
        assert needed(database, keys) == common
        for first in {0, len(pages) // 2, len(pages) - 1}:
            assert needed(database, keys, first) == max(0, common - first)
    assert needed(database, chain("of nobody")) == 0
    assert needed(database, lists[0], store=StoreName("f1", 0, "n2")) == 0


def test_it_costs_a_few_look_ups_however_many_sessions_share_a_beginning(database: Database) -> None:
    """Of 200 manifests with one system prompt, two are read."""
    prompt = [f"prompt {page}" for page in range(20)]
    for number in range(200):
        save(database, f"s{number}", *prompt, number)
    statements: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        statements.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        assert needed(database, chain(*prompt, "another")) == 20
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert len([statement for statement in statements if statement.startswith("SELECT manifest")]) <= 4


def test_a_session_deleted_beside_another_with_its_pages_is_erased_as_far_as_it_was_alone(
    sessions: Sessions, database: Database
) -> None:
    one, other = sessions.create("m"), sessions.create("m")
    save(database, one.uid, "a", "b", "c")
    save(database, other.uid, "a", "b", "d")
    sessions.delete(one.id, None)
    ((_, first, keys),) = waiting(database)
    assert needed(database, keys, first) == 2
    sessions.delete(other.id, None)
    assert needed(database, keys, first) == 0


def renew_heads(database: Database) -> None:
    with database.write() as connection:
        assert manifests.renew_heads(connection, STORE, "", 100) is None


def test_a_manifest_of_an_earlier_release_is_needed_too(database: Database) -> None:
    """Its engine writes no heads."""
    save(database, "old", "a", "b")
    with database.write() as connection:
        connection.execute(sa.delete(models.manifest_heads))
    assert needed(database, chain("a", "c")) == 0
    renew_heads(database)
    assert needed(database, chain("a", "c")) == 1
    assert listed(database) == {"old"}


def test_a_manifest_that_an_earlier_release_replaced_is_needed_too(sessions: Sessions, database: Database) -> None:
    """Its engine leaves the head as it was, and another manifest may lie between."""
    live, gone, third = (sessions.create("m") for _ in range(3))
    long = next(found for n in range(50) if (found := chain("p", f"f{n}", *range(9)))[32] > 64)
    between = next(found for n in range(1000) if (found := chain("p", f"u{n}"))[32:36] < long[32:36])
    save(database, live.uid, "p")
    with database.write() as connection:
        manifests.save(connection, manifest(gone.uid, long))
        manifests.save(connection, manifest(third.uid, between))
        replaced = sa.update(models.manifests).where(models.manifests.c.session_id == live.uid)
        connection.execute(replaced.values(keys=long, tokens=2 * len(long)))
    sessions.delete(gone.id, None)
    renew_heads(database)
    assert needed(database, long) == len(long) // 32


def test_what_is_cut_when_its_session_is_gone_hides_no_other(sessions: Sessions, database: Database) -> None:
    live, cut, gone = (sessions.create("m") for _ in range(3))
    save(database, live.uid, *range(10), "more")
    save(database, gone.uid, *range(10))
    with database.write() as connection:
        manifests.cut(connection, manifest(cut.uid, chain(*range(10))))
    sessions.delete(gone.id, None)
    assert needed(database, chain(*range(10))) == 10
    assert listed(database) == {live.uid}


def test_after_a_rotation_turns_that_run_publish_nothing(database: Database) -> None:
    with database.write() as connection:
        tenants.create_key(connection, "acme")
    mine = Sessions(database, 30.0, "acme")
    session = mine.create("m")
    lease = mine.resume(session.id, lease_ttl_s=60, tail=0).lease
    with database.write() as connection:
        salts.rotate(connection)
    assert not publish(database, session.uid, "a", epoch=lease.key.epoch)
    mine.suspend(session.id, lease.key, SuspendReason.USER_WAIT)
    epoch = mine.resume(session.id, lease_ttl_s=60, tail=0).lease.key.epoch
    assert publish(database, session.uid, "a", epoch=epoch)


def test_kv_that_a_fork_is_going_to_begin_with_is_not_given_up(sessions: Sessions, database: Database) -> None:
    parent = sessions.create("m")
    append(sessions, parent.id)
    save(database, parent.uid, "a")
    sessions.fork(parent.id, None)
    lease = sessions.resume(parent.id, lease_ttl_s=60, tail=0).lease
    sessions.suspend(parent.id, lease.key, SuspendReason.DONE, release_kv=True)
    assert waiting(database) == []


def test_a_fork_whose_manifest_is_empty_has_no_pages_of_its_own(sessions: Sessions, database: Database) -> None:
    parent = sessions.create("m")
    append(sessions, parent.id)
    save(database, parent.uid, "a")
    fork = sessions.fork(parent.id, None)
    sessions.delete(parent.id, None)
    save(database, fork.uid)
    assert waiting(database) == []
    save(database, fork.uid, "a", "b")
    assert [uid for uid, _, _ in waiting(database)] == [parent.uid]
