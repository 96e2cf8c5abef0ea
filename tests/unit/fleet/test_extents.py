"""Which extents are in a shared store, who needs them, and how they leave."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable

import pytest
import sqlalchemy as sa

from agentstate.errors import TierDeleting
from agentstate.fleet import extents, manifests
from agentstate.fleet.extents import RETAKE_S, Change, Taken, Usage
from agentstate.fleet.manifests import Manifest
from agentstate.fleet.shared_rows import SharedRows
from agentstate.sql.database import Database
from agentstate.sql.models import shared_extents

STORE = "s3://bucket/agents"
PRINT, OTHER = "ab" * 32, "cd" * 32
HOUR_S = 3600.0


def keys(*pages: int) -> bytes:
    return b"".join(hashlib.sha256(page.to_bytes(4, "big")).digest() for page in pages)


def name(number: int, shard: str = "rank0", fingerprint: str = PRINT) -> str:
    digest = hashlib.sha256(f"extent {number}".encode()).hexdigest()
    return f"{fingerprint}/{shard}/{digest[:2]}/{digest}.ext"


def add(database: Database, called: str, *pages: int, owner: str = "", store: str = STORE, nbytes: int = 100) -> int:
    with database.write() as connection:
        return extents.add(connection, store, name=called, nbytes=nbytes, owner=owner, writer="n1", keys=keys(*pages))


def doom(database: Database, *ids: int, idle_s: float = 0.0) -> set[int]:
    with database.write() as connection:
        return extents.doom(connection, ids, idle_s)


def taken(database: Database, older_than_s: float = 0.0, limit: int = 100) -> Taken:
    with database.write() as connection:
        return extents.take(connection, STORE, older_than_s, limit)


def take(database: Database, older_than_s: float = 0.0, limit: int = 100) -> list[tuple[int, str]]:
    return list(taken(database, older_than_s, limit).names.items())


def forget(database: Database, *ids: int, taken_us: int) -> None:
    with database.write() as connection:
        extents.forget(connection, ids, taken_us)


def use(database: Database, *ids: int) -> set[int]:
    with database.write() as connection:
        return extents.used(connection, ids)


def follow(database: Database, since_us: int = 0, shard: str = "rank0", fingerprint: str = PRINT) -> list[Change]:
    with database.read() as connection:
        return extents.changed(connection, STORE, fingerprint, shard, since_us)


def there(database: Database, names: Iterable[str]) -> set[str]:
    with database.read() as connection:
        return extents.known(connection, STORE, list(names))


def unneeded(database: Database, idle_s: float = HOUR_S, limit: int = 100) -> list[str]:
    with database.read() as connection:
        return [one.name for one in extents.unneeded(connection, STORE, idle_s, limit)]


def age(database: Database, *columns: str, s: float = 2 * HOUR_S) -> None:
    """Make all extents so much older."""
    by_us = round(s * 1_000_000)
    times: dict[str, sa.ColumnElement[int]] = {name: shared_extents.c[name] - by_us for name in columns or TIMES}
    if "doomed_us" in times:
        times["doomed_us"] += sa.case((shared_extents.c.doomed_us < 0, 2 * by_us), else_=0)
    with database.write() as connection:
        connection.execute(sa.update(shared_extents).values(times))


TIMES = ("created_us", "changed_us", "used_us", "doomed_us")


def save(
    database: Database, session: str, *pages: int, fingerprint: str = PRINT, rank: int = 0, node: str = "n9"
) -> None:
    with database.write() as connection:
        manifests.save(
            connection, Manifest(session, fingerprint, rank, "n9", "eng", 64, 64 * len(pages), keys(*pages), 1)
        )


def test_an_extent_comes_back_as_it_was_added(database: Database) -> None:
    added = [add(database, name(1), 1, 2, owner="tenant a", nbytes=700), add(database, name(2, "rank3"), 3)]
    with database.read() as connection:
        first, second = extents.load(connection, [*reversed(added), added[0], 10_000])
    assert (first.id, first.name, first.nbytes, first.owner, first.keys) == (
        *(added[0], name(1), 700, "tenant a"),
        keys(1, 2),
    )
    assert (first.fingerprint, first.shard, second.shard) == (PRINT, "rank0", "rank3")


def test_an_extent_is_added_once_in_a_store(database: Database) -> None:
    first = add(database, name(1), 1)
    before = follow(database)
    assert add(database, name(1), 1) == first
    assert follow(database) == before  # nobody need hear of it again
    assert add(database, name(1), 1, store="s3://another") != first
    assert add(database, name(2), 1) != first


@pytest.mark.parametrize("wrong", [{"called": "no/name"}, {"keys": b"k" * 31}], ids=str)
def test_what_is_no_extent_is_not_added(database: Database, wrong: dict[str, object]) -> None:
    right: dict[str, object] = {"called": name(1), "keys": keys(1)} | wrong
    with pytest.raises(ValueError), database.write() as connection:
        extents.add(
            connection,
            STORE,
            name=str(right["called"]),
            nbytes=1,
            owner="",
            writer="n1",
            keys=right["keys"],  # type: ignore[arg-type]
        )


def test_engines_follow_the_extents_of_their_fingerprint_and_shard(database: Database) -> None:
    first, second = add(database, name(1), 1), add(database, name(2), 2)
    add(database, name(3, "rank1"), 3)
    add(database, name(4, fingerprint=OTHER), 4)
    add(database, name(5), 5, store="s3://another")
    changes = follow(database)
    assert [(one.id, one.doomed) for one in changes] == [(first, False), (second, False)]
    assert [one.id for one in follow(database, since_us=changes[-1].changed_us)][-1:] == [second]
    assert follow(database, since_us=changes[-1].changed_us + 1) == []


def test_a_doomed_extent_comes_last_in_the_feed_and_again_if_it_is_wanted_again(database: Database) -> None:
    first, second = add(database, name(1), 1), add(database, name(2), 2)
    age(database)
    assert doom(database, first) == {first}
    assert [(one.id, one.doomed) for one in follow(database)] == [(second, False), (first, True)]
    assert doom(database, first) == set()
    age(database)
    seen_us = follow(database)[-1].changed_us
    assert add(database, name(1), 1) == first
    assert [(one.id, one.doomed) for one in follow(database, since_us=seen_us + 1)] == [(first, False)]
    assert take(database) == []


def test_an_extent_that_is_used_after_it_was_found_unneeded_is_not_doomed(database: Database) -> None:
    used, added, idle = (add(database, name(number), number) for number in (1, 2, 3))
    age(database)
    assert len(unneeded(database)) == 3
    use(database, used)
    add(database, name(2), 2)
    assert doom(database, used, added, idle, idle_s=HOUR_S) == {idle}


def test_nobody_is_promised_an_extent_that_is_doomed(database: Database) -> None:
    stays, goes = add(database, name(1), 1), add(database, name(2), 2)
    doom(database, goes)
    assert use(database, stays, goes, 10_000) == {stays}
    # Nor does using it keep it.
    assert [id for id, _ in take(database)] == [goes]


def test_a_doomed_extent_is_taken_after_the_grace_the_oldest_first(database: Database) -> None:
    ids = [add(database, name(number), number) for number in range(4)]
    doom(database, ids[2])
    age(database)
    doom(database, ids[1])
    age(database)
    doom(database, ids[0])
    assert take(database, HOUR_S, limit=1) == [(ids[2], name(2))]
    assert take(database, HOUR_S) == [(ids[1], name(1))]


def test_what_was_taken_and_not_forgotten_is_taken_again_once_its_deletion_has_arrived(database: Database) -> None:
    """Its collector may have died, or may hang."""
    extent = add(database, name(1), 1)
    doom(database, extent)
    first = taken(database)
    age(database, s=0.9 * RETAKE_S)
    assert take(database) == []
    age(database, s=0.2 * RETAKE_S)
    second = taken(database, HOUR_S)
    assert list(second.names) == [extent]
    # The first collector goes on.
    forget(database, extent, taken_us=first.at_us)
    assert there(database, [name(1)]) == {name(1)}
    forget(database, extent, taken_us=second.at_us)
    assert there(database, [name(1)]) == set()


def test_an_extent_whose_object_is_being_deleted_cannot_be_had_back(database: Database) -> None:
    extent = add(database, name(1), 1)
    doom(database, extent)
    at_us = taken(database).at_us
    with pytest.raises(TierDeleting, match="publish it again"):
        add(database, name(1), 1)
    assert use(database, extent) == set()
    assert [one.doomed for one in follow(database)] == [True]
    forget(database, extent, taken_us=at_us)
    assert there(database, [name(1)]) == set()
    assert add(database, name(1), 1) != extent


def test_only_what_was_taken_is_forgotten(database: Database) -> None:
    back, gone, doomed, never = (add(database, name(number), number) for number in (1, 2, 3, 4))
    doom(database, back, gone)
    add(database, name(1), 1)
    at_us = taken(database).at_us
    doom(database, doomed)
    forget(database, back, gone, doomed, never, taken_us=at_us)
    assert there(database, map(name, (1, 2, 3, 4))) == {name(1), name(3), name(4)}


def test_an_object_without_a_row_leaves_as_others_do_unless_it_is_added(database: Database) -> None:
    first = add(database, name(1), 1)
    with database.write() as connection:
        ids = extents.adopt(connection, STORE, {name(1): 1, name(2): 20, name(3): 30})
    assert ids[name(1)] == first and len(set(ids.values())) == 3
    assert add(database, name(3), 3, 4, owner="tenant a", nbytes=300) == ids[name(3)]
    assert [one for _, one in take(database)] == [name(2)]
    with database.read() as connection:
        (third,) = (one for one in extents.load(connection, range(100)) if one.name == name(3))
    assert (third.nbytes, third.owner, third.keys) == (300, "tenant a", keys(3, 4))


def test_names_are_looked_up_in_any_number(database: Database) -> None:
    for number in range(0, 1200, 400):
        add(database, name(number), number)
    add(database, name(1), 1, store="s3://another")
    assert there(database, map(name, range(1200))) == {name(number) for number in (0, 400, 800)}


def test_an_extent_is_needed_while_a_manifest_lists_one_of_its_pages(database: Database) -> None:
    add(database, name(1), 1, 2)
    add(database, name(2), 3, 4)
    add(database, name(3), 5)
    save(database, "ses_1", 9, 2)
    age(database)
    assert unneeded(database) == [name(2), name(3)]
    assert unneeded(database, limit=1) == [name(2)]
    save(database, "ses_2", 5)
    save(database, "ses_1", 3)
    assert unneeded(database) == [name(1)]


@pytest.mark.parametrize("column", ["used_us", "created_us", "changed_us"])
def test_an_extent_is_needed_for_a_while_by_itself(database: Database, column: str) -> None:
    add(database, name(1), 1)
    age(database, *({"used_us", "created_us", "changed_us"} - {column}))
    assert unneeded(database) == []
    assert unneeded(database, idle_s=0.0) == [name(1)]
    age(database, column)
    assert unneeded(database) == [name(1)]


def test_a_manifest_needs_pages_of_its_fingerprint_and_rank(database: Database) -> None:
    add(database, name(1, "rank0"), 1)
    add(database, name(1, "rank1"), 1)
    add(database, name(1, "rank0", OTHER), 1)
    add(database, name(1, "rank1", OTHER), 1)
    save(database, "ses_1", 1, rank=1)
    save(database, "ses_1", 9, rank=0)
    save(database, "ses_1", 9, fingerprint=OTHER)
    age(database)
    assert unneeded(database) == [name(1, "rank0"), name(1, "rank0", OTHER), name(1, "rank1", OTHER)]


def test_of_a_pool_that_no_manifest_names_and_of_a_shard_of_all_ranks_any_manifest_counts(database: Database) -> None:
    add(database, name(1, "rank0", OTHER), 1)
    add(database, name(2, "rank1", OTHER), 1)
    add(database, name(3, "all"), 2)
    add(database, name(4, "all"), 3)
    save(database, "ses_1", 1, rank=0)
    save(database, "ses_1", 2, rank=1)
    age(database)
    assert unneeded(database) == [name(4, "all"), name(2, "rank1", OTHER)]


def test_what_is_doomed_or_in_another_store_is_not_found_unneeded(database: Database) -> None:
    doom(database, add(database, name(1), 1))
    add(database, name(2), 2, store="s3://another")
    age(database)
    assert unneeded(database) == []


@pytest.mark.parametrize(("extents_each", "bytes_each"), [(3, 2**20), (500, 64)])
def test_many_extents_are_looked_at_in_parts(
    database: Database, monkeypatch: pytest.MonkeyPatch, extents_each: int, bytes_each: int
) -> None:
    monkeypatch.setattr(extents, "_BATCH", extents_each)
    monkeypatch.setattr(extents, "_WANTED_BYTES", bytes_each)
    for number in range(20):
        add(database, name(number), number, *range(100, 100 + number % 4))
    save(database, "ses_1", *range(0, 20, 2))
    age(database)
    kept = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18}
    assert set(unneeded(database)) == {name(number) for number in range(20) if number not in kept}
    assert len(unneeded(database, limit=4)) == 4


def test_an_account_owns_what_is_not_doomed(database: Database) -> None:
    add(database, name(1), 1, owner="tenant a", nbytes=2**40)
    add(database, name(2), 2, owner="tenant a", nbytes=1)
    add(database, name(3), 3, nbytes=7)
    add(database, name(4), 4, owner="tenant b", nbytes=9, store="s3://another")
    doom(database, add(database, name(5), 5, owner="tenant b"))
    with database.read() as connection:
        assert extents.owned(connection, STORE) == {"tenant a": 2**40 + 1, "": 7}


def test_engines_that_use_the_same_extents_do_not_wait_for_each_other_in_a_circle(database: Database) -> None:
    """However the database looks them up: one finds them as they lie in the table, one by the index."""
    if database.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    first, second, third = (add(database, name(number), number) for number in range(3))
    use(database, first)  # which now lies behind the others
    failures: list[BaseException] = []

    def work(*scans: str) -> None:
        try:
            with database.write() as connection:
                for scan in scans:
                    connection.exec_driver_sql(f"SET LOCAL enable_{scan} = off")
                assert extents.used(connection, [first, second, third]) == {first, second, third}
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=("indexscan", "bitmapscan", "indexonlyscan")),
        threading.Thread(target=work, args=("seqscan", "bitmapscan")),
    ]
    with database.write() as holder:
        extents.used(holder, [third])
        for number, thread in enumerate(threads, 1):
            thread.start()
            waiting = 0
            while waiting < number:
                with database.read() as connection:
                    waiting = connection.exec_driver_sql(
                        "SELECT count(*) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
                    ).scalar_one()
    for thread in threads:
        thread.join()
    assert failures == []


def test_what_a_store_has_is_told_by_shard_and_owner(database: Database) -> None:
    add(database, name(1), 1, 2, 3, owner="a")
    add(database, name(2), 4, owner="a", nbytes=50)
    add(database, name(3), 5, 6)
    add(database, name(4, "rank1"), 7, owner="a")
    add(database, name(5), 8, owner="a", store="s3://bucket/others")
    doom(database, add(database, name(6), 9, owner="a", nbytes=7))
    with database.read() as connection:
        assert extents.usage(connection, STORE) == [
            Usage(PRINT, "rank0", "", extents=1, pages=2, nbytes=100, doomed=0, doomed_nbytes=0),
            Usage(PRINT, "rank0", "a", extents=2, pages=4, nbytes=150, doomed=1, doomed_nbytes=7),
            Usage(PRINT, "rank1", "a", extents=1, pages=1, nbytes=100, doomed=0, doomed_nbytes=0),
        ]


def test_what_is_there_is_listed_by_id_and_what_is_doomed_is_not(database: Database) -> None:
    first, gone, last = (add(database, name(number), number) for number in (1, 2, 3))
    add(database, name(4), 4, store="s3://bucket/others")
    doom(database, gone)
    with database.read() as connection:
        assert [one.id for one in extents.listing(connection, STORE)] == [first, last]
        assert [one.id for one in extents.listing(connection, STORE, first)] == [last]
        assert extents.listing(connection, STORE, last) == []


def test_names_are_known_in_one_store_or_in_any(database: Database) -> None:
    add(database, name(1), 1, store="s3://bucket/others")
    with database.read() as connection:
        assert extents.known(connection, STORE, [name(1), name(2)]) == set()
        assert extents.known(connection, None, [name(1), name(2)]) == {name(1)}


def make_room(database: Database, owner: str, n_bytes: int, limit: int) -> int:
    return SharedRows(None, STORE, database).make_room(owner, n_bytes, limit)  # type: ignore[arg-type]


def test_room_is_made_of_what_an_account_does_not_need_the_least_recently_used_first(database: Database) -> None:
    needed, old, new, others = (add(database, name(n), n, owner="a" if n < 4 else "b") for n in range(1, 5))
    save(database, "ses_1", 1)
    age(database, "used_us", "created_us", "changed_us")
    use(database, new)
    age(database, "used_us", s=120.0)
    assert make_room(database, "a", 100, limit=400) == 300
    assert make_room(database, "a", 100, limit=320) == 200
    assert doom(database, needed, old, new, others) == {needed, new, others}


def test_room_is_not_made_of_what_was_used_just_now_or_is_needed(database: Database) -> None:
    needed, used = (add(database, name(n), n, owner="a") for n in (1, 2))
    save(database, "ses_1", 1)
    age(database)
    use(database, used)
    assert make_room(database, "a", 100, limit=0) == 200
    assert doom(database, needed, used) == {needed, used}
