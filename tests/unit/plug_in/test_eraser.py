"""What is erased from real stores, as SQL asks for it: every file is searched for the bytes of pages."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from contents import MARK, MHA, MLA, keys, write

from agentstate.errors import DatabaseUnreachable
from agentstate.fleet import erasures, manifests
from agentstate.fleet.engines import Engine
from agentstate.fleet.erasures import StoreName
from agentstate.fleet.manifests import Manifest
from agentstate.pages import PageStore
from agentstate.pages.testing.pages import traces
from agentstate.sessions import salts, tenants
from agentstate.sessions.collection import release_expired, remove_tenant
from agentstate.sessions.outcomes import SuspendReason
from agentstate.sessions.transcript import NewEntry
from agentstate.sessions.verbs import Sessions
from agentstate.sql import models
from agentstate.sql.database import Database
from agentstate.sql.models import EntryKind
from engine_patch.catalog import Catalog
from engine_patch.erasing import Eraser

ENGINE = Engine("eng_1", "n", 0, "tcp://127.0.0.1:5000", "http://127.0.0.1:30000/v1", "m", MARK.hex(), "/pages")
STORE = StoreName(ENGINE.fingerprint, ENGINE.rank, ENGINE.node)
POLL_S = 0.05
WAIT_S = 60
GEOMETRIES = (MLA, MHA)


class Stores:
    """Two stores of a rank, as `StoredPools` has one a pool, and the thread that publishes and settles."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.stores = [PageStore(directory / f"pool{i}", MARK, geometry) for i, geometry in enumerate(GEOMETRIES)]
        self._publisher = ThreadPoolExecutor(1)
        self.removed = threading.Event()

    def held(self, keys: Sequence[bytes]) -> list[bool]:
        return [any(of_page) for of_page in zip(*(store.stored(keys) for store in self.stores), strict=True)]

    def remove(self, keys: Collection[bytes]) -> None:
        for store in self.stores:
            store.remove(keys)
        self.removed.set()

    def scrub(self, keys: Collection[bytes], stop: Callable[[], bool]) -> bool:
        return all([store.scrub(keys, stop) for store in self.stores])

    def then(self, action: Callable[[], None]) -> None:
        self._publisher.submit(action)

    def write(self, *pages: object) -> None:
        for store in self.stores:
            write(store, keys(*pages))

    def left(self, *pages: object) -> set[object]:
        found = [traces(store.directory, store.geometry, keys(*pages)) for store in self.stores]
        return {page for page in pages if any(keys(page)[0] in of_store for of_store in found)}

    def close(self) -> None:
        self._publisher.shutdown()
        for store in self.stores:
            store.close()


class Rank:
    """A rank that has served sessions. `erasing` is it while it is alive."""

    def __init__(self, database: Database, directory: Path):
        self.database = database
        self.stores = Stores(directory)
        self.unsettled: list[bytes] = []

    def serve(self, session_id: str, *pages: object) -> None:
        """Store what is new of a session's pages, and its manifest."""
        self.stores.write(*[page for page in pages if not self.stores.held(keys(page))[0]])
        with self.database.write() as connection:
            manifests.save(connection, manifest(session_id, *pages))

    @contextmanager
    def erasing(self) -> Iterator[Catalog]:
        answers: dict[str, Any] = {"needed": list, "stored": len, "losers": set, "dead": list, "n_bytes": int}
        answers |= {"saved": lambda one: None, "refused": lambda one: None}
        catalog = Catalog(self.database, ENGINE, 1, held=self.stores.held, **answers)
        eraser = Eraser(self.database, ENGINE, self.stores, catalog, lambda: self.unsettled, poll_s=POLL_S)
        try:
            yield catalog
        finally:
            assert eraser.close()
            catalog.close()

    def waiting(self) -> int:
        with self.database.read() as connection:
            return erasures.count(connection, STORE)

    def erase(self) -> None:
        """Let everything be erased that is asked for."""
        with self.erasing():
            until(lambda: not self.waiting())


def manifest(session_id: str, *pages: object) -> Manifest:
    return Manifest(session_id, *STORE_KEY, "eng_1", 4, 4 * len(pages), b"".join(keys(*pages)), 1)


STORE_KEY = (STORE.fingerprint, STORE.rank, STORE.node)


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(int(WAIT_S / POLL_S)):
        if condition():
            return
        pause.wait(POLL_S)
    pytest.fail("it did not come to pass")


@pytest.fixture
def rank(database: Database, tmp_path: Path) -> Iterator[Rank]:
    rank = Rank(database, tmp_path / "pages")
    yield rank
    rank.stores.close()


@pytest.fixture
def tenant(database: Database) -> Sessions:
    """The sessions of a tenant that has a key, and so a salt."""
    with database.write() as connection:
        tenants.create_key(connection, "acme")
    return Sessions(database, 30.0, "acme")


def ran(sessions: Sessions, session: Any) -> None:
    """A turn of the session, so that it may have a manifest."""
    lease = sessions.resume(session.id, lease_ttl_s=60, tail=0).lease
    sessions.suspend(session.id, lease.key, SuspendReason.USER_WAIT)


def end(database: Database, sessions: Sessions, how: str, session: Any) -> None:
    if how == "deleted":
        sessions.delete(session.id, None)
    elif how == "expired":
        with database.write() as connection:
            of_session = models.sessions.c.id == session.uid
            connection.execute(sa.update(models.sessions).where(of_session).values(expires_us=1))
        release_expired(database)
    elif how == "tenant removed":
        remove_tenant(database, "acme")
    else:
        with database.write() as connection:
            salts.rotate(connection)


@pytest.mark.parametrize("how", ["deleted", "expired", "tenant removed", "secret rotated"])
def test_no_byte_is_left_of_a_session_that_is_gone_but_of_what_another_one_needs(
    rank: Rank, database: Database, tenant: Sessions, how: str
) -> None:
    gone, other = tenant.create("m"), Sessions(database, 30.0, "other").create("m")
    rank.serve(gone.uid, 1, 2, 3, 4)
    if how != "secret rotated":
        rank.serve(other.uid, 1, 2, 5)
    else:
        rank.serve("ses_without_a_scope", 1, 2, 5)
    end(database, tenant, how, gone)
    with rank.erasing():
        until(lambda: not rank.waiting())
    assert rank.stores.left(1, 2, 3, 4, 5) == {1, 2, 5}
    assert rank.stores.held(keys(1, 2, 3, 4, 5)) == [True, True, False, False, True]


def test_the_last_of_two_sessions_with_the_same_pages_takes_them_along(
    rank: Rank, database: Database, sessions: Sessions
) -> None:
    both = [sessions.create("m") for _ in range(2)]
    for session in both:
        rank.serve(session.uid, 1, 2)
    sessions.delete(both[0].id, None)
    rank.erase()
    assert rank.stores.left(1, 2) == {1, 2}
    sessions.delete(both[1].id, None)
    rank.erase()
    assert rank.stores.left(1, 2) == set()


def test_a_fork_finds_what_it_begins_with_also_when_its_parent_is_gone(
    rank: Rank, database: Database, sessions: Sessions
) -> None:
    parent = sessions.create("m")
    lease = sessions.resume(parent.id, lease_ttl_s=60, tail=0).lease
    sessions.append(parent.id, lease.key, [NewEntry(EntryKind.MESSAGE, {"role": "user", "content": "x"})])
    sessions.suspend(parent.id, lease.key, "idle")  # type: ignore[arg-type]
    rank.serve(parent.uid, 1, 2, 3)
    fork = sessions.fork(parent.id, None)
    sessions.delete(parent.id, None)
    rank.erase()
    assert rank.stores.held(keys(1, 2, 3)) == [True] * 3
    rank.serve(fork.uid, 1, 2, 4)
    rank.erase()
    assert rank.stores.left(1, 2, 3, 4) == {1, 2, 4}


def test_what_a_session_went_away_from_goes_with_it(rank: Rank, database: Database, sessions: Sessions) -> None:
    session = sessions.create("m")
    for pages in ((1, 2, 3), (1, 4), (1, 4, 5)):
        rank.serve(session.uid, *pages)
    rank.erase()
    assert rank.stores.left(1, 2, 3, 4, 5) == {1, 2, 3, 4, 5}
    sessions.delete(session.id, None)
    rank.erase()
    assert rank.stores.left(1, 2, 3, 4, 5) == set()


def test_what_is_stored_after_a_page_that_is_not_goes_too(rank: Rank, database: Database, sessions: Sessions) -> None:
    session = sessions.create("m")
    rank.stores.write(1)
    rank.stores.write(3, 4)
    ran(sessions, session)
    with rank.erasing() as catalog:
        catalog.save(manifest(session.uid, 1))
        catalog.abandon(session.uid, keys(1, 2, 3, 4, 5), 1)
        until(lambda: not catalog.waiting)
        sessions.delete(session.id, None)
        until(lambda: rank.stores.left(1, 3, 4) == set() and not rank.waiting())


def test_stores_that_nobody_had_open_are_erased_from_when_they_are_opened(
    database: Database, sessions: Sessions, tmp_path: Path
) -> None:
    before = Rank(database, tmp_path)
    session = sessions.create("m")
    before.serve(session.uid, 1, 2)
    before.serve("another", 1)
    before.stores.close()
    sessions.delete(session.id, None)
    after = Rank(database, tmp_path)
    assert after.stores.left(1, 2) == {1, 2}
    after.erase()
    assert after.stores.left(1, 2) == {1}
    after.stores.close()


def test_what_an_engine_stores_of_a_session_that_is_gone_is_erased_when_that_is_known(
    rank: Rank, database: Database, sessions: Sessions
) -> None:
    """A request that was under way when its session was deleted."""
    session = sessions.create("m")
    with rank.erasing() as catalog:
        sessions.delete(session.id, None)
        rank.stores.write(1, 2)
        catalog.save(manifest(session.uid, 1, 2))
        until(lambda: rank.stores.left(1, 2) == set() and not rank.waiting())


def test_what_a_manifest_lists_that_waits_for_sql_is_kept(
    rank: Rank, database: Database, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, other = sessions.create("m"), sessions.create("m")
    rank.serve(gone.uid, 1, 2, 3)
    go, real = threading.Event(), Catalog._write

    def late(catalog: Catalog, batch: dict[str, Manifest], closing: bool) -> None:
        if not go.is_set():
            raise DatabaseUnreachable
        real(catalog, batch, closing)

    monkeypatch.setattr(Catalog, "_write", late)
    ran(sessions, other)
    with rank.erasing() as catalog:
        catalog.save(manifest(other.uid, 1, 4))
        sessions.delete(gone.id, None)
        until(lambda: rank.stores.left(2, 3) == set())
        # It is asked for still: the manifest may be lost with this process.
        assert (rank.waiting(), rank.stores.left(1)) == (1, {1})
        go.set()
        until(lambda: not rank.waiting())
    assert rank.stores.left(1, 2, 3) == {1}


def test_what_a_request_has_that_is_not_settled_yet_is_kept(rank: Rank, database: Database, sessions: Sessions) -> None:
    session = sessions.create("m")
    rank.serve(session.uid, 1, 2)
    rank.unsettled = keys(1, 3)
    sessions.delete(session.id, None)
    with rank.erasing():
        until(lambda: rank.stores.left(2) == set())
        assert (rank.waiting(), rank.stores.left(1)) == (1, {1})
        # It has failed, and no manifest lists it.
        rank.unsettled = []
        until(lambda: not rank.waiting())
    assert rank.stores.left(1) == set()


def test_what_is_being_read_is_erased_when_that_is_over(rank: Rank, database: Database, sessions: Sessions) -> None:
    session = sessions.create("m")
    rank.serve(session.uid, 1, 2)
    with rank.stores.stores[0].pin(keys(1)), rank.erasing():
        sessions.delete(session.id, None)
        assert rank.stores.removed.wait(WAIT_S)
        assert rank.waiting() == 1 and rank.stores.left(1, 2) == {1, 2}
    rank.erase()
    assert rank.stores.left(1, 2) == set()


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import test_eraser
from agentstate.sql.database import Database
rank = test_eraser.Rank(Database(sys.argv[1]), Path(sys.argv[2]))
rank.stores.scrub = lambda keys, stop: os.kill(os.getpid(), signal.SIGKILL)
rank.erase()
"""


def test_an_engine_that_is_killed_in_the_middle_leaves_the_rest_to_the_next_one(
    database: Database, database_url: str, sessions: Sessions, tmp_path: Path
) -> None:
    """Pages are missing already, and their bytes are there still. What the disk may look like at any other moment is
    told by the faults at every call."""
    before = Rank(database, tmp_path)
    session = sessions.create("m")
    before.serve(session.uid, 1, 2)
    before.serve("another", 1, 3)
    before.stores.close()
    sessions.delete(session.id, None)
    here = Path(__file__).parent
    run = subprocess.run([sys.executable, "-c", KILLED, database_url, str(tmp_path), str(here), str(here.parents[1])])
    assert run.returncode == -signal.SIGKILL
    after = Rank(database, tmp_path)
    assert (after.waiting(), after.stores.left(1, 2, 3)) == (1, {1, 2, 3})
    after.erase()
    assert after.stores.left(1, 2, 3) == {1, 3}
    assert after.stores.held(keys(1, 2, 3)) == [True, False, True]
    after.stores.close()
