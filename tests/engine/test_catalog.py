from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from contents import keys
from sqlalchemy.engine import Connection
from turns import begin

from agentstate import ids
from agentstate.errors import DatabaseError, DatabaseUnreachable
from agentstate.fleet import engines, erasures, manifests, pins, quotas, turns
from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import Manifest
from agentstate.fleet.quotas import Quota
from agentstate.pages import ANYONE
from agentstate.pages.node import node_id
from agentstate.sql import database as database_module
from agentstate.sql import models, secret
from agentstate.sql.database import Database
from engine_patch.catalog import Catalog

ENGINE = Engine("eng_1", "n", 0, "tcp://127.0.0.1:5000", "http://127.0.0.1:30000/v1", "m", "f", "/pages")
HEARTBEAT_S = 0.02
WAIT_S = 60
SESSIONS = ["before", *(f"s{n}" for n in range(30))]


class Saved:
    """What the catalog has reported as saved; can be waited for."""

    def __init__(self) -> None:
        self.manifests: list[Manifest] = []
        self._changed = threading.Condition()

    def __call__(self, manifest: Manifest) -> None:
        with self._changed:
            self.manifests.append(manifest)
            self._changed.notify_all()

    def wait_for(self, *wanted: Manifest) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: all(one in self.manifests for one in wanted), WAIT_S)


class Switched(Database):
    """A database that can be taken down. ``refused`` is set whenever it has refused a transaction."""

    def __init__(self, url: str):
        super().__init__(url)
        self.down = False
        self.refused = threading.Event()

    @contextmanager
    def write(self) -> Iterator[Connection]:
        if self.down:
            self.refused.set()
            raise DatabaseUnreachable
        with super().write() as connection:
            yield connection


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'agentstate.db'}"


@pytest.fixture
def database(url: str) -> Iterator[Switched]:
    database = Switched(url)
    database.upgrade()
    begin(database, *SESSIONS, "s", "a", "b", "c")
    yield database
    database.close()


@pytest.fixture
def saved() -> Saved:
    return Saved()


def nothing(keys: Sequence[bytes]) -> list[bool]:
    return [False] * len(keys)


def started(
    database: Database,
    heartbeat_s: float,
    saved: Callable[[Manifest], None],
    engine: Engine = ENGINE,
    **answers: Callable[..., Any],
) -> Catalog:
    """A catalog of stores that lose nothing, unless ``answers`` say otherwise."""
    of_stores = {
        "needed": list,
        "stored": len,
        "held": nothing,
        "losers": set,
        "dead": list,
        "n_bytes": int,
        "refused": lambda manifest: None,
        **answers,
    }
    return Catalog(database, engine, heartbeat_s, saved=saved, **of_stores)


@pytest.fixture
def catalog(database: Database, saved: Saved) -> Iterator[Catalog]:
    catalog = started(database, HEARTBEAT_S, saved)
    yield catalog
    catalog.close()


def manifest(session: str, *pages: object, fingerprint: str = "f", rank: int = 0) -> Manifest:
    return Manifest(session, fingerprint, rank, "n", "eng_1", 64, 64 * len(pages), b"".join(keys(*pages)), len(pages))


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread will have done in a moment."""
    pause = threading.Event()
    for _ in range(int(WAIT_S / HEARTBEAT_S)):
        if condition():
            return
        pause.wait(HEARTBEAT_S)
    pytest.fail("it did not come to pass")


def registered(database: Database) -> list[Engine]:
    with database.read() as connection:
        return engines.registered(connection)


def test_an_engine_is_registered_until_it_closes(database: Switched, saved: Saved) -> None:
    catalog = started(database, HEARTBEAT_S, saved)
    until(lambda: len(registered(database)) == 1)
    (found,) = registered(database)
    assert (found.id, found.control_address, found.pages_dir) == ("eng_1", ENGINE.control_address, "/pages")
    until(lambda: registered(database)[0].heartbeat_us > found.heartbeat_us)
    assert registered(database)[0].started_us == found.started_us
    catalog.close()
    assert registered(database) == []


def test_an_engine_that_was_taken_off_the_list_registers_again(database: Switched, catalog: Catalog) -> None:
    until(lambda: len(registered(database)) == 1)
    with database.write() as connection:
        engines.unregister(connection, ENGINE.id)
    until(lambda: len(registered(database)) == 1)
    assert registered(database)[0].id == ENGINE.id


def test_a_manifest_is_in_sql_when_it_is_reported_as_saved(database: Switched, url: str) -> None:
    seen: list[Manifest | None] = []
    done = threading.Event()

    def look(manifest: Manifest) -> None:
        other = Database(url)
        with other.read() as connection:
            seen.append(manifests.load(connection, manifest.session_id, "f", 0, "n"))
        other.close()
        done.set()

    catalog = started(database, WAIT_S, look)
    catalog.save(manifest("s", 1, 2))
    assert done.wait(WAIT_S)
    catalog.close()
    assert seen == [manifest("s", 1, 2)]


def test_only_manifests_of_this_engines_pages_are_loaded(database: Switched, catalog: Catalog, saved: Saved) -> None:
    with database.write() as connection:
        manifests.save(connection, manifest("s", 7, fingerprint="other"))
        manifests.save(connection, manifest("s", 8, rank=1))
    assert catalog.load("s") is None
    catalog.save(manifest("s", 1))
    saved.wait_for(manifest("s", 1))
    assert catalog.load("s") == manifest("s", 1)
    assert catalog.load("other") is None


def test_no_manifest_is_lost_while_sql_is_down(database: Switched, catalog: Catalog, saved: Saved) -> None:
    catalog.save(manifest("before", 1))
    saved.wait_for(manifest("before", 1))
    database.down = True
    wanted = [manifest(f"s{n}", n, n + 1) for n in range(len(SESSIONS) - 1)]
    for one in wanted[:15]:
        catalog.save(one)
    database.refused.clear()
    assert database.refused.wait(WAIT_S)
    for one in wanted[15:]:
        catalog.save(one)
    database.refused.clear()
    assert database.refused.wait(WAIT_S)
    assert saved.manifests == [manifest("before", 1)]
    database.down = False
    saved.wait_for(*wanted)
    assert [catalog.load(one.session_id) for one in wanted] == wanted
    assert len(saved.manifests) == len(SESSIONS)


def test_the_newest_of_a_sessions_manifests_outlives_sql_being_down(
    database: Switched, catalog: Catalog, saved: Saved
) -> None:
    """Also when the older one has been tried, and refused, before."""
    database.down = True
    catalog.save(manifest("s", 1))
    database.refused.clear()
    assert database.refused.wait(WAIT_S)
    catalog.save(manifest("s", 1, 2))
    catalog.save(manifest("s", 1, 2, 3))
    database.refused.clear()
    assert database.refused.wait(WAIT_S)
    database.down = False
    saved.wait_for(manifest("s", 1, 2, 3))
    assert saved.manifests == [manifest("s", 1, 2, 3)]
    assert catalog.load("s") == manifest("s", 1, 2, 3)


def test_what_breaks_off_is_saved_again_and_nothing_else(
    database: Switched, catalog: Catalog, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = manifests.save, []

    def second_breaks(connection: Connection, one: Manifest) -> None:
        calls.append(one.session_id)
        real(connection, one)
        if len(calls) == 2:
            raise DatabaseError("from the test")

    database.down = True
    wanted = [manifest("a", 1), manifest("b", 2), manifest("c", 3)]
    for one in wanted:
        catalog.save(one)
    monkeypatch.setattr(manifests, "save", second_breaks)
    database.down = False
    saved.wait_for(*wanted)
    assert sorted(one.session_id for one in saved.manifests) == ["a", "b", "c"]
    assert [catalog.load(one.session_id) for one in wanted] == wanted
    assert len(calls) > 3


def test_a_database_without_its_schema_is_waited_for(url: str, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its sessions come with it.
    monkeypatch.setattr(manifests, "publish", lambda connection, one: not manifests.save(connection, one))
    database = Database(url)
    catalog = started(database, HEARTBEAT_S, saved)
    catalog.save(manifest("s", 1))
    with pytest.raises(DatabaseError):
        catalog.load("s")
    assert saved.manifests == []
    database.upgrade()
    saved.wait_for(manifest("s", 1))
    assert catalog.load("s") == manifest("s", 1)
    assert [engine.id for engine in registered(database)] == ["eng_1"]
    catalog.close()
    database.close()


def test_a_file_that_another_process_holds_is_waited_for(
    url: str, tmp_path: Path, saved: Saved, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_S", 0.05)
    database = Database(url)
    database.upgrade()
    begin(database, "s")
    holder = sqlite3.connect(tmp_path / "agentstate.db", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    catalog = started(database, HEARTBEAT_S, saved)
    catalog.save(manifest("s", 1))
    until(lambda: "manifests wait for the database" in caplog.text)
    assert saved.manifests == []
    holder.execute("ROLLBACK")
    holder.close()
    saved.wait_for(manifest("s", 1))
    catalog.close()
    assert caplog.text.count("manifests wait for the database") == 1
    database.close()


def test_closing_writes_what_waits(database: Switched, saved: Saved) -> None:
    catalog = started(database, WAIT_S, saved)
    wanted = [manifest(f"s{n}", n) for n in range(5)]
    for one in wanted:
        catalog.save(one)
    catalog.close()
    assert sorted(one.session_id for one in saved.manifests) == [f"s{n}" for n in range(5)]
    assert [catalog.load(one.session_id) for one in wanted] == wanted


def test_closing_ends_also_while_sql_is_down(database: Switched, saved: Saved) -> None:
    database.down = True
    catalog = started(database, WAIT_S, saved)
    catalog.save(manifest("s", 1))
    catalog.close()
    assert saved.manifests == []
    assert catalog.load("s") is None


def test_the_chains_of_all_manifests_are_told_one_by_one_when_the_database_answers(
    database: Switched, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.write() as connection:
        manifests.save(connection, manifest("a", 1, 2))
        manifests.save(connection, manifest("b", 3))
        manifests.save(connection, manifest("c", 4, fingerprint="other"))
    told: list[dict[str, list[bytes]]] = []
    read: list[str] = []
    read_when_told: list[list[str]] = []
    of_database = manifests.chains

    def chains(*of: Any) -> Iterator[tuple[str, list[bytes]]]:
        for one in of_database(*of):
            read.append(one[0])
            yield one

    def needed(chains: Iterable[tuple[str, list[bytes]]]) -> None:
        rest = iter(chains)
        first = next(rest)
        read_when_told.append(list(read))
        told.append(dict([first, *rest]))

    monkeypatch.setattr(manifests, "chains", chains)
    catalog = started(database, HEARTBEAT_S, saved, needed=needed)
    until(lambda: bool(told))
    catalog.close()
    assert told == [{"a": keys(1, 2), "b": keys(3)}]
    assert [len(sessions) for sessions in read_when_told] == [1], "all keys together may be more than memory"


class Stores:
    """What is stored of which chain, and who has lost something; and the chains that were asked for."""

    def __init__(self) -> None:
        self.pages: dict[bytes, int] = {}
        self.losers: list[set[str]] = []
        self.dead: list[list[tuple[str, int]]] = []
        self.asked: list[list[bytes]] = []

    def catalog(self, database: Database, saved: Saved) -> Catalog:
        return started(
            database,
            HEARTBEAT_S,
            saved,
            stored=self.stored,
            losers=lambda: self.losers.pop(0) if self.losers else set(),
            dead=lambda: self.dead.pop(0) if self.dead else [],
            n_bytes=lambda pages: 10 * pages,
        )

    def stored(self, chain: Sequence[bytes]) -> int:
        self.asked.append(list(chain))
        return self.pages.get(chain[-1], len(chain))


def cut_to(catalog: Catalog, session: str, pages: int) -> None:
    until(lambda: (found := catalog.load(session)) is not None and found.tokens == 64 * pages)


def test_manifests_are_cut_when_the_store_has_lost_what_they_list_and_no_others_are_read(
    database: Switched, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    with database.write() as connection:
        manifests.save(connection, manifest("a", 1, 2, 3))
        manifests.save(connection, manifest("b", 3))
        manifests.save(connection, manifest("c", 4, 5))
    stores = Stores()
    catalog = stores.catalog(database, saved)
    until(lambda: len(stores.asked) == 3)
    others, ages = [catalog.load("b"), catalog.load("c")], updated(database)
    read, load = [], manifests.load

    def watched(connection: Connection, session_id: str, *which: Any) -> Manifest | None:
        read.append(session_id)
        return load(connection, session_id, *which)

    def all_of_them(*which: Any) -> Iterator[Manifest]:
        read.append("all")
        return iter(())

    monkeypatch.setattr(manifests, "load", watched)
    monkeypatch.setattr(manifests, "of_rank", all_of_them)
    stores.pages[keys(3)[0]] = 1
    stores.losers.append({"a", "of no manifest"})
    cut_to(catalog, "a", 1)
    assert set(read) == {"a", "of no manifest"}
    assert len(stores.asked) == 4
    monkeypatch.undo()
    short = catalog.load("a")
    assert short is not None
    assert (short.page_keys(), short.nbytes, short.lost_tokens) == (keys(1), 10, 128)
    assert [catalog.load("b"), catalog.load("c")] == others
    # It is not newer for that: nothing was stored.
    assert updated(database) == ages
    # Where it may be anyone, all are looked at.
    stores.pages[keys(5)[0]] = 1
    stores.losers.append({ANYONE})
    cut_to(catalog, "c", 1)
    catalog.close()


def test_two_engines_of_a_machine_with_directories_of_their_own_leave_each_others_manifests_alone(
    database: Switched, saved: Saved, tmp_path: Path
) -> None:
    """One model, one machine: session "a" has moved from the first engine to the second, with more pages there."""
    told: dict[str, dict[str, list[bytes]]] = {}
    asked: dict[str, set[int]] = {}
    marks: dict[str, threading.Event] = {}
    catalogs = {}
    nodes = [node_id(tmp_path / name) for name in ("first", "second")]
    with database.write() as connection:
        for node, pages in zip(nodes, ((1, 2), (1, 2, 3)), strict=True):
            manifests.save(connection, replace(manifest("a", *pages), node=node))
    for node, pages in zip(nodes, (2, 3), strict=True):
        looked = marks[node] = threading.Event()

        def needed(chains: Iterable[tuple[str, list[bytes]]], node: str = node) -> None:
            found = list(chains)
            assert len(found) == len(dict(found))
            told[node] = dict(found)

        def stored(
            chain: Sequence[bytes], node: str = node, pages: int = pages, looked: threading.Event = looked
        ) -> int:
            asked.setdefault(node, set()).add(len(chain))
            looked.set()
            return min(pages, len(chain))

        catalogs[node] = started(
            database,
            HEARTBEAT_S,
            saved,
            replace(ENGINE, id=ids.new("eng"), node=node, pages_dir=node),
            needed=needed,
            stored=stored,
        )
    for looked in marks.values():
        assert looked.wait(WAIT_S)
    for catalog in catalogs.values():
        catalog.close()
    assert told == {nodes[0]: {"a": keys(1, 2)}, nodes[1]: {"a": keys(1, 2, 3)}}
    assert asked == {nodes[0]: {2}, nodes[1]: {3}}, "each is looked for where it is said to be"
    with database.read() as connection:
        left = {one.node: one.tokens for one in manifests.coverage(connection, ["a"])}
    assert left == {nodes[0]: 128, nodes[1]: 192}


def test_what_is_in_the_shared_store_is_listed_although_the_node_has_lost_it(database: Switched, saved: Saved) -> None:
    with database.write() as connection:
        manifests.save(connection, replace(manifest("a", 1, 2, 3), shared_tokens=128))
    stores = Stores()
    stores.pages[keys(3)[0]] = 0
    stores.pages[keys(1)[0]] = 0
    catalog = stores.catalog(database, saved)
    cut_to(catalog, "a", 2)
    short = catalog.load("a")
    assert short is not None
    assert (short.page_keys(), short.lost_tokens, short.shared_tokens) == (keys(1, 2), 64, 128)
    catalog.close()


def test_what_was_lost_before_the_start_is_cut_too(database: Switched, saved: Saved) -> None:
    with database.write() as connection:
        manifests.save(connection, manifest("a", 1, 2, 3))
    stores = Stores()
    stores.pages[keys(3)[0]] = 2
    catalog = stores.catalog(database, saved)
    cut_to(catalog, "a", 2)
    catalog.close()


def test_a_rank_that_another_one_writes_for_reads_its_manifests_and_changes_none(
    database: Switched, saved: Saved
) -> None:
    one, told = manifest("a", 1, 2, 3), list[Any]()
    with database.write() as connection:
        manifests.save(connection, one)
    reads = replace(ENGINE, rank=1)
    # It finds nothing, and says that of the writer's pages.
    catalog = Catalog(
        database,
        reads,
        HEARTBEAT_S,
        saved=saved,
        refused=lambda manifest: None,
        needed=told.append,
        stored=lambda keys: 0,
        held=nothing,
        losers=lambda: {"a"},
        dead=list,
        n_bytes=int,
        writer=0,
    )
    until(lambda: reads.id in [engine.id for engine in registered(database)])
    # After a round.
    before = heartbeats(database)
    until(lambda: heartbeats(database) > before)
    assert catalog.load("a") == one
    assert told == []
    catalog.close()


def heartbeats(database: Database) -> int:
    return max(engine.heartbeat_us for engine in registered(database))


def test_what_was_lost_while_sql_is_down_is_cut_when_it_answers(database: Switched, saved: Saved) -> None:
    with database.write() as connection:
        manifests.save(connection, manifest("a", 1, 2, 3))
    stores = Stores()
    catalog = stores.catalog(database, saved)
    until(lambda: len(stores.asked) == 1)
    database.down = True
    stores.pages[keys(3)[0]] = 1
    stores.dead.append([("e", 0)])
    stores.losers.append({"a"})
    database.refused.clear()
    assert database.refused.wait(WAIT_S)
    database.down = False
    cut_to(catalog, "a", 1)
    until(lambda: not stores.dead)
    catalog.close()


def test_a_manifest_that_waited_to_be_saved_is_looked_at_when_it_is(database: Switched, saved: Saved) -> None:
    stores = Stores()
    catalog = stores.catalog(database, saved)
    until(lambda: len(registered(database)) == 1)
    stores.pages[keys(3)[0]] = 1
    waited = threading.Event()

    def losing() -> set[str]:
        """Lost while the manifest is on its way."""
        if not waited.is_set():
            catalog._unsaved["a"] = manifest("a", 1, 2, 3)
            waited.set()
            return {"a"}
        return set()

    catalog._losers = losing
    cut_to(catalog, "a", 1)
    catalog.close()


def test_the_manifests_of_a_store_that_was_evicted_as_a_whole_go(database: Switched, saved: Saved) -> None:
    dead, other = 32 * "d" + 32 * "1", 32 * "e" + 32 * "1"
    with database.write() as connection:
        manifests.save(connection, manifest("a", 1, fingerprint=dead))
        manifests.save(connection, manifest("a", 1, fingerprint=dead, rank=1))
        manifests.save(connection, replace(manifest("a", 1, fingerprint=dead), node="another"))
        manifests.save(connection, manifest("a", 1, fingerprint=other))
        manifests.save(connection, manifest("b", 1, fingerprint=dead))
    stores = Stores()
    stores.dead.append([(dead[:32], 0)])
    catalog = stores.catalog(database, saved)

    def left() -> set[tuple[str, int, str]]:
        with database.read() as connection:
            found = manifests.coverage(connection, ["a", "b"])
        return {(one.fingerprint, one.rank, one.node) for one in found}

    until(lambda: len(left()) == 3)
    catalog.close()
    assert left() == {(dead, 1, "n"), (dead, 0, "another"), (other, 0, "n")}


def updated(database: Switched) -> dict[str, int]:
    with database.read() as connection:
        rows = connection.execute(sa.text("SELECT session_id, updated_us FROM manifests"))
        return dict(tuple(row) for row in rows)


def test_a_session_that_is_deleted_while_manifests_are_looked_at_does_not_come_back(
    database: Switched, saved: Saved
) -> None:
    with database.write() as connection:
        manifests.save(connection, manifest("a", 1, 2))
        manifests.save(connection, manifest("b", 3, 4))

    def stored(chain: Sequence[bytes]) -> int:
        if chain == keys(1, 2):
            with database.write() as connection:
                manifests.erase(connection, ["a"])
        return 1

    catalog = started(database, HEARTBEAT_S, saved, stored=stored)
    until(lambda: (found := catalog.load("b")) is not None and found.tokens == 64)
    catalog.close()
    assert catalog.load("a") is None


def test_a_manifest_of_a_turn_that_is_over_is_refused(database: Switched, saved: Saved) -> None:
    begin(database, "taken over", epoch=7, fence=7)
    refused = Saved()
    catalog = started(database, HEARTBEAT_S, saved, refused=refused)
    stale, unheard = replace(manifest("taken over", 1), epoch=6), manifest("unheard of", 1)
    newest = replace(manifest("taken over", 2), epoch=7)
    catalog.save(stale)
    catalog.save(unheard)
    refused.wait_for(stale, unheard)
    catalog.save(newest)
    saved.wait_for(newest)
    catalog.close()
    assert saved.manifests == [newest]
    assert [catalog.load(one.session_id) for one in (newest, unheard)] == [newest, None]


def test_turns_are_known_before_the_service_knows_the_engine(database: Switched, saved: Saved) -> None:
    catalog = started(database, WAIT_S, saved)
    until(lambda: catalog.signing_key is not None)
    assert registered(database) == []
    with database.write() as connection:
        assert catalog.signing_key == turns.signing_key(secret.read(connection))
    catalog.close()


def test_a_renewed_secret_is_learnt(database: Switched, catalog: Catalog) -> None:
    until(lambda: catalog.signing_key is not None)
    before = catalog.signing_key
    with database.write() as connection:
        secret.renew(connection)
    until(lambda: catalog.signing_key != before)


def test_what_manifests_list_no_more_and_the_stores_still_have_is_remembered(database: Switched, saved: Saved) -> None:
    """Pages after one that is gone are of no use, but they are of the session, and go with it."""
    chain = keys(*range(8))
    with database.write() as connection:
        manifests.save(connection, manifest("a", *range(8)))
    held = {chain[page] for page in (0, 1, 4, 6)}
    answers = {"stored": lambda keys: 2, "held": lambda keys: [key in held for key in keys]}
    catalog = started(database, HEARTBEAT_S, saved, **answers)
    cut_to(catalog, "a", 2)
    catalog.abandon("b", chain[:3], 2)
    catalog.abandon("c", chain, 6)
    until(lambda: not catalog.waiting)
    catalog.close()
    with database.read() as connection:
        rows = connection.execute(sa.select(models.abandoned_pages)).all()
    found = {row.session_id: (row.first_page, row._mapping["keys"]) for row in rows}
    assert found == {"a": (4, b"".join(chain[4:7])), "c": (6, chain[6])}
    assert {bytes(row.head) for row in rows} == {erasures.head_of(b"".join(chain))}


def test_what_waits_to_be_written_is_told_to_who_watches(database: Switched, saved: Saved) -> None:
    database.down = True
    catalog = started(database, HEARTBEAT_S, saved)
    catalog.save(manifest("a", 1))
    assert database.refused.wait(WAIT_S)
    with catalog.watching() as watched:
        assert manifest("a", 1) in watched
        catalog.save(manifest("b", 2))
        assert manifest("b", 2) in watched
    catalog.save(manifest("c", 3))
    assert manifest("c", 3) not in watched
    catalog.close()


def test_what_a_manifest_lists_that_another_replaces_unwritten_goes_with_the_session(
    database: Switched, saved: Saved
) -> None:
    catalog = started(database, WAIT_S, saved)
    database.down = True
    for pages in ((1, 2), (1, 3), (1, 3, 4), (1, 5)):
        catalog.save(manifest("a", *pages))
    assert database.refused.wait(WAIT_S)
    catalog.save(manifest("a", 1, 6))
    database.down = False
    catalog.close()
    assert saved.manifests[-1] == manifest("a", 1, 6)
    with database.read() as connection:
        rows = connection.execute(sa.select(models.abandoned_pages.c["keys"])).scalars().all()
    listed = {key for row in rows for key in (row[at : at + 32] for at in range(0, len(row), 32))}
    assert listed >= set(keys(2, 3, 4, 5))


def test_whose_pages_the_rank_can_read_is_told_and_counts(database: Switched, saved: Saved) -> None:
    nodes = frozenset({"n2"})
    catalog = started(database, HEARTBEAT_S, saved, reads=lambda: nodes)

    def told() -> list[frozenset[str]]:
        with database.read() as connection:
            return [engine.reads for engine in engines.registered(connection)]

    until(lambda: told() == [frozenset({"n2"})])
    with database.write() as connection:
        for node in ("n2", "n3"):
            manifests.save(connection, replace(manifest("s", 1, 2), node=node))
    assert catalog.elsewhere("s") == replace(manifest("s", 1, 2), node="n2")
    nodes = frozenset()
    until(lambda: told() == [frozenset()])
    assert catalog.elsewhere("s") is None
    catalog.close()


def test_quotas_and_pins_are_told_with_every_heartbeat(database: Switched, saved: Saved) -> None:
    told: list[Any] = []

    def take(*given: Any) -> None:
        told.append(given)
        raise RuntimeError("of this test")

    catalog = started(database, HEARTBEAT_S, saved, told=take)
    until(lambda: told[-1:] == [({}, {})])
    quota = Quota(device_bytes=5)
    with database.write() as connection:
        quotas.put(connection, "tenant a", quota)
        for session in ("a", "b", "c"):
            pins.put(connection, session, pins.PinTier.HOST, 3600.0)
        engine = {"a": ENGINE.base_url, "b": "http://another/v1"}
        for session, url in engine.items():
            connection.execute(sa.update(models.leases).where(models.leases.c.session_id == session).values(engine=url))
    until(lambda: told[-1] != ({}, {}))
    of_accounts, pinned = told[-1]
    assert of_accounts == {"tenant a": quota}
    ((session, (tier, for_s)),) = pinned.items()
    assert (session, tier) == ("a", "host") and 3000 < for_s <= 3600
    catalog.save(manifest("s", 1))
    saved.wait_for(manifest("s", 1))
    with database.write() as connection:
        quotas.put(connection, "tenant a", Quota())
        pins.remove(connection, "a")
    until(lambda: told[-1] == ({}, {}))
    catalog.close()
