"""`agentstate pages` on a shared store, and copies between it and page directories."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from contents import MARK, MHA, keys, read, reader_for, write
from documented import checked
from typer.testing import CliRunner, Result

from agentstate.cli.main import app
from agentstate.errors import PageStoreFull, PageStoreLocked, SessionExists, SettingsError, TierForeign
from agentstate.fleet import erasures, manifests
from agentstate.fleet import extents as catalogue
from agentstate.fleet.erasures import StoreName
from agentstate.fleet.extents import SharedExtent
from agentstate.fleet.manifests import Manifest
from agentstate.pages import PageStore
from agentstate.pages.files import read_header
from agentstate.pages.node import node_id
from agentstate.sessions.outcomes import SuspendReason
from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings
from agentstate.sql.database import Database
from agentstate.sql.models import leases, shared_extents
from agentstate.tiers.interface import MARK as MARK_OF_STORE

OTHER = bytes(reversed(MARK))
HOUR_US = 3_600_000_000
TENANT = "tenant a"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "share").mkdir()
    own = {
        "AGENTSTATE_HOME": str(tmp_path),
        "AGENTSTATE_DATABASE_URL": "",
        "AGENTSTATE_PAGES_DIR": "",
        "AGENTSTATE_SHARED_STORE": f"file://{tmp_path / 'share'}",
        "AGENTSTATE_STORE_KEY": "k" * 32,
        "AGENTSTATE_PAGES_FREE_FRACTION": "0",
        "COLUMNS": "200",
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.fixture
def database(home: Path) -> Iterator[Database]:
    database = Database(Settings().sqlalchemy_url)
    database.upgrade()
    yield database
    database.close()


@pytest.fixture
def store(home: Path, database: Database) -> Path:
    """Three extents: the pages 1 to 3, 4, and 5 to 6, the last of a tenant."""
    directory = home / "pages" / MARK.hex()[:32] / "rank0"
    node_id(home / "pages")
    store = PageStore(directory, MARK, MHA)
    for names, owner in (((1, 2, 3), ""), ((4,), ""), ((5, 6), TENANT)):
        write(store, keys(*names), owner=owner)
    store.close()
    return directory


@pytest.fixture
def pushed(store: Path) -> Path:
    answer("push")
    return store


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["pages", *arguments])


def answer(*arguments: str, exit_code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, (result.output, result.exception)
    shared = " --shared" if "--shared" in arguments else ""
    return checked(f"pages {arguments[0]}{shared}", json.loads(result.stdout))


def save(database: Database, name: str, pages: list[bytes], *, node: str, fingerprint: bytes = MARK) -> str:
    """A session whose turn has stored ``pages`` on a node: its id for engines."""
    sessions = Sessions(database, 10.0)
    with suppress(SessionExists):
        sessions.create("llama", session_id=name)
    turn = sessions.resume(name, lease_ttl_s=3600, tail=0)
    uid, tokens = turn.session.uid, MHA.page_size * len(pages)
    with database.write() as connection:
        epoch = connection.execute(sa.select(leases.c.epoch).where(leases.c.session_id == uid)).scalar_one()
        one = Manifest(uid, fingerprint.hex(), 0, node, "eng", MHA.page_size, tokens, b"".join(pages), 600, epoch=epoch)
        assert manifests.publish(connection, one)
    sessions.suspend(name, turn.lease.key, SuspendReason.DONE)
    return uid


def manifest(database: Database, uid: str, node: str) -> Manifest | None:
    with database.read() as connection:
        return manifests.load(connection, uid, MARK.hex(), 0, node)


def stored(directory: Path, *names: int) -> list[bool]:
    store = PageStore(directory, MARK, MHA)
    try:
        return store.stored(keys(*names))
    finally:
        store.close()


def bytes_of(directory: Path, *names: int) -> dict[bytes, bytes]:
    """The pages as they are read back, each verified."""
    store, reader = PageStore(directory, MARK, MHA), reader_for(MHA)
    try:
        with store.pin(keys(*names)) as pin:
            return read(reader, [pin])
    finally:
        reader.close()
        store.close()


def objects(home: Path) -> list[Path]:
    return sorted((home / "share").rglob("*.ext"))


def flip(path: Path) -> None:
    """Change the first byte of the last page in the last layer."""
    header = read_header(path)
    last = len(header.keys) - 1, len(MHA.component_bytes) - 1
    offset, _ = header.component_range(MHA.layers - 1, last[1], last[0], 1)
    path.chmod(0o600)
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def make_older(database: Database, hours: int, *paths: Path) -> None:
    times = {c: shared_extents.c[c] - hours * HOUR_US for c in ("created_us", "changed_us", "used_us", "doomed_us")}
    with database.write() as connection:
        connection.execute(sa.update(shared_extents).values(times))
    for path in paths:
        os.utime(path, (time.time() - hours * 3600,) * 2)


def ids(database: Database) -> list[int]:
    """Of the rows, that of pages 1 to 3 first, then 4, then 5 to 6."""
    with database.read() as connection:
        rows = connection.execute(sa.select(shared_extents.c.id, shared_extents.c["keys"])).all()
    order = [key for number in range(1, 7) for key in keys(number)]
    return [row.id for row in sorted(rows, key=lambda row: order.index(bytes(row[1])[:32]))]


def listed(database: Database) -> list[SharedExtent]:
    """In the same order."""
    with database.read() as connection:
        found = {one.id: one for one in catalogue.load(connection, ids(database))}
    return [found[number] for number in ids(database)]


# Pushing


def test_push_publishes_what_is_there_and_nothing_twice(store: Path, home: Path) -> None:
    first = answer("push")
    assert (first["extents"], first["new"], first["unreadable"]) == (3, 3, 0)
    assert first["bytes"] == sum(path.stat().st_size for path in objects(home))
    again = answer("push")
    assert (again["extents"], again["new"], again["bytes"]) == (3, 0, 0)
    assert len(objects(home)) == 3


def test_push_of_a_session_publishes_only_what_it_needs(store: Path, home: Path, database: Database) -> None:
    save(database, "mine", keys(1, 2, 3, 4), node="elsewhere")
    save(database, "other", keys(5, 6), node="elsewhere")
    assert answer("push", "--session", "mine")["new"] == 2
    (row,) = answer("ls", "--shared")
    assert row["pages"] == 4
    assert answer("push", "--model", "llama")["new"] == 1


def test_push_of_a_session_that_nobody_knows_says_so(store: Path, home: Path) -> None:
    result = run("push", "--session", "nobody")
    assert isinstance(result.exception, SettingsError)
    assert "session nobody" in str(result.exception)
    assert not objects(home)


def test_push_says_what_of_a_session_is_there(store: Path, home: Path, database: Database) -> None:
    node = node_id(home / "pages")
    whole, partly = save(database, "a", keys(1, 2, 3, 4), node=node), save(database, "b", keys(5, 6, 7), node=node)
    apart = save(database, "c", keys(1, 2, 3), node="another")
    assert answer("push")["manifests"] == 2
    tokens = [manifest(database, *of).shared_tokens for of in ((whole, node), (partly, node), (apart, "another"))]
    assert tokens == [4 * MHA.page_size, 2 * MHA.page_size, 0]
    assert answer("push")["manifests"] == 0


def test_push_leaves_to_engines_what_several_pools_have(store: Path, home: Path, database: Database) -> None:
    node = node_id(home / "pages")
    uid = save(database, "a", keys(1, 2, 3), node=node)
    beside = PageStore(home / "pages" / OTHER.hex()[:32] / "rank0", OTHER, MHA)
    write(beside, keys(3))
    beside.close()
    assert answer("push")["manifests"] == 0
    assert manifest(database, uid, node).shared_tokens == 0


def test_push_leaves_out_what_cannot_be_read(store: Path, home: Path) -> None:
    (store / "extents" / "0000000000000001.ext").write_bytes(b"no extent")
    pushed = answer("push")
    assert (pushed["extents"], pushed["unreadable"]) == (2, 1)


def test_push_waits_for_what_is_being_deleted(pushed: Path, database: Database, home: Path) -> None:
    with database.write() as connection:
        catalogue.doom(connection, ids(database))
    with database.write() as connection:
        assert len(catalogue.take(connection, (home / "share" / MARK_OF_STORE).read_text(), 0.0, 10).names) == 3
    assert answer("push")["extents"] == 0


def test_there_must_be_a_shared_store(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSTATE_SHARED_STORE", "")
    for command in (["push"], ["pull"], ["ls", "--shared"], ["du", "--shared"], ["check", "--shared"]):
        assert isinstance(run(*command).exception, SettingsError)


# Pulling


def elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another node's page directory, which is the one that commands mean: its store."""
    monkeypatch.setenv("AGENTSTATE_PAGES_DIR", str(home / "pages-b"))
    return home / "pages-b" / MARK.hex()[:32] / "rank0"


def test_pull_copies_pages_and_their_owners(pushed: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = elsewhere(home, monkeypatch)
    copied = answer("pull")
    assert (copied["extents"], copied["new"], copied["unreadable"]) == (3, 3, 0)
    assert bytes_of(directory, 1, 2, 3, 4, 5, 6) == bytes_of(pushed, 1, 2, 3, 4, 5, 6)
    assert set(answer("ls")[0]["owners"]) == {"none", TENANT}
    assert answer("check")["broken"] == []
    again = answer("pull")
    assert (again["extents"], again["new"]) == (3, 0)


def test_pull_copies_what_is_missing_only(pushed: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = elsewhere(home, monkeypatch)
    own = PageStore(directory, MARK, MHA)
    write(own, keys(2))
    own.close()
    answer("pull")
    assert stored(directory, 1, 2, 3, 4, 5, 6) == [True] * 6
    (row,) = answer("ls")
    assert (row["extents"], row["pages"]) == (4, 6)


def test_pull_of_a_session_copies_what_it_needs_and_has_it_erased_with_the_session(
    pushed: Path, home: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    uid = save(database, "mine", keys(1, 2, 3, 4), node=node_id(home / "pages"))
    directory = elsewhere(home, monkeypatch)
    assert answer("pull", "--session", "mine")["new"] == 2
    assert stored(directory, 1, 2, 3, 4, 5, 6) == [True] * 4 + [False] * 2
    node = node_id(home / "pages-b")
    assert manifest(database, uid, node).page_keys() == keys(1, 2, 3, 4)
    Sessions(database, 10.0).delete("mine", None)
    with database.read() as connection:
        (erasure,) = erasures.waiting(connection, StoreName(MARK.hex(), 0, node), 10)
    assert erasure.chain.keys == b"".join(keys(1, 2, 3, 4))


def test_pull_keeps_what_the_node_says_of_a_session(
    pushed: Path, home: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = elsewhere(home, monkeypatch)
    node = node_id(home / "pages-b")
    own = PageStore(directory, MARK, MHA)
    write(own, keys(1, 9))
    own.close()
    uid = save(database, "mine", keys(1, 2, 3), node=node_id(home / "pages"))
    save(database, "mine", keys(1, 9), node=node)
    answer("pull", "--session", "mine")
    assert manifest(database, uid, node).page_keys() == keys(1, 9)
    Sessions(database, 10.0).delete("mine", None)
    with database.read() as connection:
        found = erasures.waiting(connection, StoreName(MARK.hex(), 0, node), 10)
    erased = {key for one in found for key in manifests.split_keys(one.chain.keys)}
    assert erased == set(keys(1, 2, 3, 9))


def test_pull_leaves_out_pages_that_are_wrong(pushed: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in objects(home):
        flip(path)
    directory = elsewhere(home, monkeypatch)
    copied = answer("pull", exit_code=1)
    assert copied["unreadable"] == 3
    assert stored(directory, 1, 2, 3, 4, 5, 6) == [True, True, False, False, True, False]


def test_pull_refuses_what_another_key_signed(pushed: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSTATE_STORE_KEY", "x" * 32)
    directory = elsewhere(home, monkeypatch)
    assert answer("pull", exit_code=1)["new"] == 0
    assert not directory.exists()


def test_pull_goes_on_after_what_cannot_be_used(pushed: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, *others = objects(home)
    for path in others:
        path.unlink()
    elsewhere(home, monkeypatch)
    copied = answer("pull", exit_code=1)
    assert (copied["extents"], copied["new"], copied["unreadable"]) == (1, 1, 2)


def test_pull_refuses_a_store_that_is_open(pushed: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = PageStore(elsewhere(home, monkeypatch), MARK, MHA)
    try:
        assert isinstance(run("pull").exception, PageStoreLocked)
    finally:
        engine.close()


def test_pull_evicts_nothing(pushed: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = elsewhere(home, monkeypatch)
    own = PageStore(directory, MARK, MHA)
    write(own, keys(9))
    own.close()
    monkeypatch.setenv("AGENTSTATE_PAGES_FREE_FRACTION", "0.9999999")
    assert isinstance(run("pull").exception, PageStoreFull)
    assert stored(directory, 9, 1) == [True, False]


# Looking


def test_ls_and_du_tell_what_the_catalogue_lists(pushed: Path, home: Path, database: Database) -> None:
    save(database, "mine", keys(1, 2, 3), node="anywhere")
    sizes = {path.name: path.stat().st_size for path in objects(home)}
    (row,) = answer("ls", "--shared")
    assert (row["fingerprint"], row["rank"]) == (MARK.hex()[:32], "rank0")
    assert (row["extents"], row["pages"], row["bytes"]) == (3, 6, sum(sizes.values()))
    assert row["owners"].keys() == {"none", TENANT}
    with database.write() as connection:
        catalogue.doom(connection, ids(database)[1:2])
    (row,) = answer("du", "--shared")
    needed, doomed, unneeded = (one.nbytes for one in listed(database))
    assert row == {
        "fingerprint": MARK.hex()[:32],
        "rank": "rank0",
        "needed": needed,
        "unneeded": unneeded,
        "doomed": doomed,
        "total": sum(sizes.values()),
    }
    assert f"{needed:,}" in run("du", "--shared").stdout


def test_check_finds_nothing_where_nothing_is_wrong(pushed: Path) -> None:
    assert answer("check", "--shared") == {"extents": 3, "broken": [], "repaired": False, "unlisted": []}


def test_check_finds_every_kind_of_damage(pushed: Path, home: Path, database: Database) -> None:
    first, second, third = (home / "share" / one.name for one in listed(database))
    flip(first)
    second.unlink()
    third.chmod(0o600)
    third.write_bytes(b"x" * third.stat().st_size)
    found = {item["extent"].rsplit("/")[-1]: item for item in answer("check", "--shared", exit_code=1)["broken"]}
    assert found[first.name]["broken_pages"] == [keys(3)[0].hex()]
    assert "missing" in found[second.name]["damage"]
    assert found[third.name]["damage"] and found[third.name]["broken_pages"] is None
    assert "3 broken" in run("check", "--shared").stdout


def test_what_is_repaired_is_used_by_nobody_any_more(pushed: Path, home: Path, database: Database) -> None:
    flip(objects(home)[0])
    assert answer("check", "--shared", "--repair")["broken"]
    assert answer("check", "--shared") == {"extents": 2, "broken": [], "repaired": False, "unlisted": []}


def test_a_row_that_lists_other_pages_than_its_object_is_damage(pushed: Path, database: Database) -> None:
    with database.write() as connection:
        changed = sa.update(shared_extents).where(shared_extents.c.id == ids(database)[0])
        connection.execute(changed.values({"keys": b"".join(keys(1, 2, 9))}))
    (item,) = answer("check", "--shared", exit_code=1)["broken"]
    assert "other pages" in item["damage"]


def test_check_names_old_objects_that_no_row_tells_of(pushed: Path, home: Path, database: Database) -> None:
    with database.write() as connection:
        connection.execute(sa.delete(shared_extents).where(shared_extents.c.id == ids(database)[0]))
    assert answer("check", "--shared")["unlisted"] == []
    make_older(database, 2, *objects(home))
    assert len(answer("check", "--shared")["unlisted"]) == 1


# Collecting


def test_gc_deletes_what_nobody_needs_in_two_steps(
    pushed: Path, home: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(database, "mine", keys(1, 2, 3), node="anywhere")
    assert answer("gc", "--shared")["doomed"] == 0
    monkeypatch.setenv("AGENTSTATE_SHARED_KEEP_S", "60")
    make_older(database, 1)
    would = answer("gc", "--shared", "--dry-run")
    assert (would["doomed"], would["deleted"], len(objects(home))) == (2, 0, 3)
    done = answer("gc", "--shared")
    assert (done["doomed"], done["doomed_bytes"], done["deleted"]) == (2, would["doomed_bytes"], 0)
    assert len(objects(home)) == 3
    make_older(database, 2)
    assert answer("gc", "--shared")["deleted"] == 2
    assert len(objects(home)) == 1
    assert answer("check", "--shared")["extents"] == 1


def test_gc_deletes_what_no_row_tells_of(pushed: Path, home: Path, database: Database) -> None:
    with database.write() as connection:
        connection.execute(sa.delete(shared_extents).where(shared_extents.c.id == ids(database)[0]))
    make_older(database, 2, *objects(home))
    assert answer("gc", "--shared", "--dry-run")["unlisted"] == 1
    assert answer("gc", "--shared")["unlisted"] == 1
    make_older(database, 2)
    assert answer("gc", "--shared")["deleted"] == 1
    assert len(objects(home)) == 2


def test_gc_leaves_what_is_listed_under_another_url(pushed: Path, home: Path, database: Database) -> None:
    with database.write() as connection:
        connection.execute(
            sa.update(shared_extents).where(shared_extents.c.id == ids(database)[0]).values(store="file:///elsewhere")
        )
    make_older(database, 2, *objects(home))
    assert answer("gc", "--shared")["unlisted"] == 0


def test_a_database_that_knows_nothing_of_the_store_is_refused(
    pushed: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not delete all of it once the store is claimed."""
    url = f"sqlite:///{home / 'other.db'}"
    other = Database(url)
    other.upgrade()
    other.close()
    monkeypatch.setenv("AGENTSTATE_DATABASE_URL", url)
    for arguments in (["gc", "--shared"], ["ls", "--shared"], ["push"], ["pull"]):
        assert isinstance(run(*arguments).exception, TierForeign)
    assert run("claim").exit_code == 0
    assert answer("ls", "--shared") == []
    for arguments in (["gc", "--shared"], ["gc", "--shared", "--dry-run"]):
        assert isinstance(run(*arguments).exception, SettingsError)
    assert len(objects(home)) == 3


def test_what_is_there_is_listed_while_the_store_does_not_answer(pushed: Path, home: Path) -> None:
    (home / "share").rename(home / "unmounted")
    assert answer("ls", "--shared")[0]["extents"] == 3
    assert answer("du", "--shared")[0]["total"] > 0
