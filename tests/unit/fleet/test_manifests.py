from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import sqlalchemy as sa
from turns import begin

from agentstate.fleet import manifests
from agentstate.fleet.manifests import Coverage, Manifest
from agentstate.sql.database import Database
from agentstate.sql.models import sessions


def manifest(session_id: str = "ses_1", fingerprint: str = "f1", rank: int = 0, pages: int = 3) -> Manifest:
    keys = b"".join(hashlib.sha256(bytes([page])).digest() for page in range(pages))
    return Manifest(
        session_id=session_id,
        fingerprint=fingerprint,
        rank=rank,
        node="n1",
        engine_id="eng_1",
        page_size=64,
        tokens=64 * pages,
        keys=keys,
        nbytes=1000 * pages,
    )


def test_a_manifest_comes_back_as_it_was_saved(database: Database) -> None:
    saved = manifest()
    with database.write() as connection:
        manifests.save(connection, saved)
    with database.read() as connection:
        assert manifests.load(connection, "ses_1", "f1", 0, "n1") == saved
        assert manifests.load(connection, "ses_1", "f1", 1, "n1") is None
        assert manifests.load(connection, "ses_1", "f1", 0, "n2") is None
        assert manifests.load(connection, "ses_2", "f1", 0, "n1") is None
    assert saved.page_keys() == [hashlib.sha256(bytes([page])).digest() for page in range(3)]


def test_a_newer_manifest_of_a_node_takes_the_place_of_the_older(database: Database) -> None:
    with database.write() as connection:
        manifests.save(connection, manifest(pages=5))
        manifests.save(connection, replace(manifest(pages=2), engine_id="eng_2"))
    with database.read() as connection:
        found = manifests.load(connection, "ses_1", "f1", 0, "n1")
        rows = connection.execute(sa.text("SELECT count(*) FROM manifests")).scalar()
    assert found == replace(manifest(pages=2), engine_id="eng_2")
    assert rows == 1


def test_ranks_fingerprints_and_nodes_have_manifests_of_their_own(database: Database) -> None:
    with database.write() as connection:
        for rank in (0, 1):
            for fingerprint in ("f1", "f2"):
                for node in ("n1", "n2"):
                    manifests.save(connection, replace(manifest("ses_1", fingerprint, rank, rank + 1), node=node))
    with database.read() as connection:
        found = manifests.load(connection, "ses_1", "f2", 1, "n2")
    assert found == replace(manifest(fingerprint="f2", rank=1, pages=2), node="n2")


def test_coverage_is_the_newest_first_and_without_the_keys(database: Database) -> None:
    with database.write() as connection:
        assert manifests.coverage(connection, ["ses_1"]) == []
        manifests.save(connection, manifest(fingerprint="f1", pages=9))
        connection.execute(sa.text("UPDATE manifests SET updated_us = updated_us - 1000000"))
        manifests.save(connection, manifest(fingerprint="f2", pages=4))
        manifests.save(connection, manifest("ses_2"))
        found = manifests.coverage(connection, ["ses_1"])
    assert [replace(one, updated_us=0) for one in found] == [
        Coverage("ses_1", "f2", 0, "n1", "eng_1", page_size=64, tokens=256, nbytes=4000, lost_tokens=0, updated_us=0),
        Coverage("ses_1", "f1", 0, "n1", "eng_1", page_size=64, tokens=576, nbytes=9000, lost_tokens=0, updated_us=0),
    ]


def test_forgetting_a_session_leaves_the_others(database: Database) -> None:
    with database.write() as connection:
        manifests.save(connection, manifest("ses_1"))
        manifests.save(connection, manifest("ses_2"))
        manifests.erase(connection, ["ses_1"])
        assert [one.session_id for one in manifests.coverage(connection, ["ses_1", "ses_2"])] == ["ses_2"]


def test_an_empty_manifest_says_that_nothing_is_stored(database: Database) -> None:
    with database.write() as connection:
        manifests.save(connection, manifest(pages=0))
        assert manifests.load(connection, "ses_1", "f1", 0, "n1") == manifest(pages=0)


@pytest.mark.parametrize(
    "change", [{"keys": b"k" * 95}, {"keys": b""}, {"tokens": 100}, {"tokens": 128}, {"page_size": 0}, {"tokens": -64}]
)
def test_a_manifest_whose_numbers_disagree_cannot_be_made(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="ses_1"):
        replace(manifest(), **change)


def test_the_chains_of_a_store_are_those_of_all_its_sessions(database: Database) -> None:
    with database.write() as connection:
        for session, pages in (("ses_1", 3), ("ses_2", 0), ("ses_3", 1)):
            manifests.save(connection, manifest(session, pages=pages))
        manifests.save(connection, manifest("ses_4", fingerprint="f2"))
        manifests.save(connection, manifest("ses_5", rank=1))
        manifests.save(connection, replace(manifest(pages=1), node="n2"))
    with database.read() as connection:
        found = sorted(manifests.chains(connection, "f1", 0, "n1"), key=lambda one: len(one[1]))
    right = [("ses_2", 0), ("ses_3", 1), ("ses_1", 3)]
    assert found == [(session, manifest(pages=pages).page_keys()) for session, pages in right]


def published(database: Database, manifest: Manifest) -> bool:
    with database.write() as connection:
        return manifests.publish(connection, manifest)


@pytest.mark.parametrize(
    ("fence", "epochs", "right"),
    [
        (0, [3], [True]),  # its turn runs, or is over and none has come after it
        (0, [2], [True]),  # it ended by itself, and was late
        (3, [2], [False]),  # it lapsed and was taken over
        (0, [4], [False]),  # no turn yet
        (0, [3, 2, 3], [True, False, True]),
    ],
    ids=str,
)
def test_manifests_are_accepted_of_turns_that_count(
    database: Database, fence: int, epochs: list[int], right: list[bool]
) -> None:
    begin(database, "ses_1", epoch=3, fence=fence)
    assert [published(database, replace(manifest(), epoch=epoch)) for epoch in epochs] == right
    with database.read() as connection:
        found = manifests.load(connection, "ses_1", "f1", 0, "n1")
    kept = [epoch for epoch, taken in zip(epochs, right, strict=True) if taken]
    assert (found.epoch if found else None) == (kept[-1] if kept else None)


def test_nothing_is_published_of_a_session_that_is_not_there(database: Database) -> None:
    assert not published(database, manifest())
    begin(database, "ses_1")
    with database.write() as connection:
        connection.execute(sa.update(sessions).values(deleted_us=1))
    assert not published(database, replace(manifest(), epoch=1))
    with database.read() as connection:
        assert manifests.load(connection, "ses_1", "f1", 0, "n1") is None
