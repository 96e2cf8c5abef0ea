"""Whose a shared store is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from agentstate.errors import DatabaseError, TierForeign, TierUnavailable
from agentstate.fleet import extents, stores
from agentstate.sql.database import Database
from agentstate.sql.models import shared_extents, shared_stores
from agentstate.tiers import DirectoryTier
from agentstate.tiers.interface import MARK

URL, SPELLED = "file:///the/share", "file:///the//share/"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "share").mkdir()
    return tmp_path / "share"


@pytest.fixture
def tier(root: Path) -> Iterator[DirectoryTier]:
    with DirectoryTier(root) as tier:
        yield tier


@pytest.fixture
def others(migrated_file: Path, tmp_path: Path) -> Iterator[Database]:
    """Another installation's database."""
    shutil.copy(migrated_file, tmp_path / "others.db")
    database = Database(f"sqlite:///{tmp_path / 'others.db'}")
    yield database
    database.close()


def reopened(root: Path) -> DirectoryTier:
    return DirectoryTier(root)


def add(database: Database, number: int, store: str = URL) -> int:
    name = f"{'ab' * 32}/rank0/{number:02x}/{number:02x}{'0' * 62}.ext"
    with database.write() as connection:
        return extents.add(connection, store, name=name, nbytes=9, owner="", writer="n", keys=b"k" * 32)


def listed(database: Database, store: str) -> list[int]:
    with database.read() as connection:
        return [one.id for one in extents.listing(connection, store)]


def test_a_new_store_is_marked_and_is_one_however_its_url_is_written(
    database: Database, tier: DirectoryTier, root: Path
) -> None:
    id = stores.identify(database, tier, URL)
    assert (root / MARK).read_text() == id
    with reopened(root) as again:
        assert stores.identify(database, again, URL) == stores.identify(database, again, SPELLED) == id
    with database.read() as connection:
        assert stores.known(connection, SPELLED) == id


def test_another_installations_store_is_refused_until_it_is_claimed(
    database: Database, others: Database, tier: DirectoryTier
) -> None:
    id = stores.identify(others, tier, URL)
    for _ in range(2):
        with pytest.raises(TierForeign, match="agentstate pages claim"):
            stores.identify(database, tier, URL)
    assert stores.claim(database, tier, URL) == id
    assert stores.identify(database, tier, URL) == id


def test_a_store_that_has_lost_its_mark_is_refused_until_it_is_claimed(
    database: Database, tier: DirectoryTier, root: Path
) -> None:
    """As the directory below a mount is, before it is mounted."""
    id = stores.identify(database, tier, URL)
    (root / MARK).unlink()
    with reopened(root) as unmounted:
        with pytest.raises(TierForeign, match="is it mounted"):
            stores.identify(database, unmounted, URL)
        assert not (root / MARK).exists()
        assert stores.claim(database, unmounted, URL) == (root / MARK).read_text() != id


@pytest.mark.parametrize("marked", [True, False])
def test_rows_of_before_go_by_the_id(database: Database, tier: DirectoryTier, root: Path, marked: bool) -> None:
    if marked:
        (root / MARK).write_text("by a release of before")
    first, second = add(database, 1), add(database, 2)
    elsewhere = add(database, 1, "s3://another")
    with database.read() as connection:
        before_us = max(change.changed_us for change in extents.changed(connection, URL, "ab" * 32, "rank0", 0))
    id = stores.identify(database, tier, URL)
    assert marked == (id == "by a release of before")
    assert (listed(database, id), listed(database, URL)) == ([first, second], [])
    assert listed(database, "s3://another") == [elsewhere]
    with database.read() as connection:
        # Whoever follows the id already hears of them.
        changes = extents.changed(connection, id, "ab" * 32, "rank0", before_us)
    assert [change.id for change in changes] == [first, second]


def test_of_rows_of_before_under_two_urls_one_stays(database: Database, tier: DirectoryTier) -> None:
    first, other = add(database, 1), add(database, 2, SPELLED)
    twice = add(database, 1, SPELLED)
    id = stores.identify(database, tier, URL)
    assert stores.identify(database, tier, SPELLED) == id
    assert listed(database, id) == [first, other]
    with database.read() as connection:
        assert twice not in connection.execute(sa.select(shared_extents.c.id)).scalars().all()


@pytest.mark.parametrize("when", ["before its mark is there", "after it"])
def test_who_dies_while_a_store_is_marked_knows_it_later(
    database: Database, tier: DirectoryTier, when: str, root: Path
) -> None:
    asked = 0

    def answer(future: object) -> object:
        nonlocal asked
        asked += 1
        if asked == 2 and when == "before its mark is there":
            raise DatabaseError
        found = future.result()  # type: ignore[attr-defined]
        if asked == 2:
            raise DatabaseError
        return found

    class Dead(DirectoryTier):
        def mark(self, proposed: str | None = None) -> object:  # type: ignore[override]
            if proposed is not None and when == "before its mark is there":
                raise DatabaseError
            return super().mark(proposed)

    with Dead(root) as dead, pytest.raises(DatabaseError):
        stores.identify(database, dead, URL, answer)
    assert (root / MARK).exists() == (when == "after it")
    id = stores.identify(database, tier, URL)
    with database.read() as connection:
        assert connection.execute(sa.select(shared_stores.c.id)).scalars().all() == [id]


def test_of_two_that_mark_a_store_at_once_both_know_it(database: Database, tier: DirectoryTier, root: Path) -> None:
    other = reopened(root)

    class Late(DirectoryTier):
        def mark(self, proposed: str | None = None) -> object:  # type: ignore[override]
            if proposed is not None:
                stores.identify(database, other, URL)
            return super().mark(proposed)

    with other, Late(root) as late:
        assert stores.identify(database, late, URL) == stores.identify(database, tier, URL)


def test_a_store_that_does_not_answer_is_not_judged(database: Database, root: Path) -> None:
    stores.identify(database, DirectoryTier(root), URL)
    root.rename(root.with_name("gone"))
    with reopened(root) as tier, pytest.raises(TierUnavailable):
        stores.identify(database, tier, URL)
    root.with_name("gone").rename(root)
    with reopened(root) as tier:
        assert stores.identify(database, tier, URL)
