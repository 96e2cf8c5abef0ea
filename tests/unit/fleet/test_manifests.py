from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import sqlalchemy as sa
from turns import begin

from agentstate.fleet import manifests
from agentstate.fleet.erasures import Chain
from agentstate.fleet.manifests import Coverage, Manifest
from agentstate.sql.database import Database
from agentstate.sql.models import manifest_heads, sessions


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


def test_an_earlier_turn_that_comes_late_from_another_node_is_not_what_a_session_is_now(database: Database) -> None:
    begin(database, "ses_1", epoch=3)
    later = replace(manifest(), epoch=3, node="n2")
    assert published(database, replace(manifest(), epoch=1))
    assert published(database, later)
    assert not published(database, replace(manifest(), epoch=2))
    # Other ranks and weights are others' business.
    assert published(database, replace(manifest(), epoch=2, rank=1))
    assert published(database, replace(manifest(), epoch=2, fingerprint="f2"))
    with database.read() as connection:
        before, now = (manifests.load(connection, "ses_1", "f1", 0, node) for node in ("n1", "n2"))
    assert before is not None and before.epoch == 1 and now == later


def test_nothing_is_published_of_a_session_that_is_not_there(database: Database) -> None:
    assert not published(database, manifest())
    begin(database, "ses_1")
    with database.write() as connection:
        connection.execute(sa.update(sessions).values(deleted_us=1))
    assert not published(database, replace(manifest(), epoch=1))
    with database.read() as connection:
        assert manifests.load(connection, "ses_1", "f1", 0, "n1") is None


def shared(database: Database, session_id: str = "ses_1", node: str = "n1") -> int | None:
    with database.read() as connection:
        found = manifests.load(connection, session_id, "f1", 0, node)
        (of_coverage,) = [one for one in manifests.coverage(connection, [session_id]) if one.node == node] or [None]
    assert (found and found.shared_tokens) == (of_coverage and of_coverage.shared_tokens)
    return found.shared_tokens if found else None


def test_how_much_is_shared_comes_back_as_it_was_saved(database: Database) -> None:
    begin(database, "ses_2")
    with database.write() as connection:
        manifests.save(connection, replace(manifest(), shared_tokens=128))
        assert manifests.publish(connection, replace(manifest("ses_2"), shared_tokens=64, epoch=1))
    assert (shared(database), shared(database, "ses_2")) == (128, 64)


def test_what_is_shared_stays_so_while_a_history_goes_on(database: Database) -> None:
    another = b"".join(hashlib.sha256(bytes([page])).digest() for page in (0, 7, 8, 9))
    for saved, right in (
        (replace(manifest(), shared_tokens=128), 128),
        (manifest(pages=4), 128),
        (replace(manifest(pages=4), shared_tokens=192), 192),
        (manifest(pages=4), 192),
        (replace(manifest(pages=4), keys=another), 0),
        (replace(manifest(pages=4), keys=another, shared_tokens=64), 64),
        (manifest(pages=3), 0),
    ):
        with database.write() as connection:
            manifests.save(connection, saved)
        assert shared(database) == right


def test_what_is_shared_does_not_go_with_what_a_node_has_lost(database: Database) -> None:
    with database.write() as connection:
        manifests.save(connection, replace(manifest(), shared_tokens=128))
        manifests.cut(connection, replace(manifest(pages=2), lost_tokens=64))
    assert shared(database) == 128


def test_what_is_shared_does_not_go_with_a_store_either(database: Database) -> None:
    with database.write() as connection:
        manifests.save(connection, replace(manifest(pages=4), shared_tokens=128, lost_tokens=64))
        manifests.save(connection, replace(manifest("ses_2"), shared_tokens=192))
        manifests.save(connection, manifest("ses_3"))
        manifests.save(connection, replace(manifest("ses_3"), node="n2"))
        for _ in range(2):
            manifests.forget_store(connection, "f", 0, "n1")
        cut, whole = (manifests.load(connection, session, "f1", 0, "n1") for session in ("ses_1", "ses_2"))
        heads = connection.execute(sa.select(manifest_heads.c.session_id, manifest_heads.c.node)).all()
        left = {(one.session_id, one.node) for one in manifests.coverage(connection, ["ses_1", "ses_2", "ses_3"])}
    assert cut == replace(manifest(pages=2), shared_tokens=128, lost_tokens=192)
    assert whole == replace(manifest("ses_2"), shared_tokens=192)
    assert left == {("ses_1", "n1"), ("ses_2", "n1"), ("ses_3", "n2")}
    assert set(heads) == left


@pytest.mark.parametrize(
    ("key", "tokens", "page", "right"),
    [
        ({}, 128, 1, 128),
        ({}, 192, 2, 192),
        ({}, 192, 1, 64),  # another page is there now: it went another way
        ({}, 256, 2, 64),  # it is shorter now
        ({}, 64, 0, 64),  # and of what was shared before nothing is lost
        ({"session_id": "ses_2"}, 128, 1, 64),
        ({"fingerprint": "f2"}, 128, 1, 64),
        ({"rank": 1}, 128, 1, 64),
        ({"node": "n2"}, 128, 1, 64),
    ],
    ids=str,
)
def test_pages_are_shared_of_a_manifest_that_lists_them_still(
    database: Database, key: dict[str, object], tokens: int, page: int, right: int
) -> None:
    found = {"session_id": "ses_1", "fingerprint": "f1", "rank": 0, "node": "n1"} | key
    with database.write() as connection:
        manifests.save(connection, replace(manifest(), shared_tokens=64))
        done = manifests.share(connection, **found, tokens=tokens, last_key=manifest().page_keys()[page])  # type: ignore[arg-type]
    assert shared(database) == right
    assert done == (right == tokens)


def test_sharing_less_than_before_takes_nothing_back(database: Database) -> None:
    with database.write() as connection:
        manifests.save(connection, replace(manifest(), shared_tokens=192))
        assert manifests.share(connection, "ses_1", "f1", 0, "n1", 64, manifest().page_keys()[0])
    assert shared(database) == 192


@pytest.mark.parametrize("page", [0, 1, 126, 127, 128, 199])
@pytest.mark.parametrize("first_digits", [bytes(4), b"\xff" * 4])
def test_what_left_the_shared_store_is_said_of_no_manifest_that_lists_it(
    database: Database, page: int, first_digits: bytes
) -> None:
    common = [first_digits + hashlib.sha256(bytes([n])).digest()[4:] for n in range(200)]

    def listing(session: str, pages: int, **fields: object) -> Manifest:
        """The first pages of the chain, and others."""
        own = [hashlib.sha256(f"{session} {n}".encode()).digest() for n in range(210 - pages)]
        packed = b"".join([*common[:pages], *own])
        return replace(manifest(session, pages=210), keys=packed, shared_tokens=640, **fields)  # type: ignore[arg-type]

    listings = {pages: listing(f"s{pages}", pages) for pages in (0, 1, 2, 3, 126, 127, 128, 129, 199, 200)}
    others = [listing("s", 200, fingerprint="f2"), listing("s", 200, rank=1)]
    elsewhere = listing("s200", 200, node="n2")
    chain = Chain.whole(b"".join(common))
    with database.write() as connection:
        for one in (*listings.values(), *others, elsewhere):
            manifests.save(connection, one)
        manifests.unshare(connection, "f1", 0, chain, page)
        found = {
            one: manifests.load(connection, one.session_id, one.fingerprint, one.rank, one.node)
            for one in (*listings.values(), *others, elsewhere)
        }
    left = {pages for pages, one in listings.items() if (saved := found[one]) and not saved.shared_tokens}
    # Heads tell the first 128 pages: of more that are alike, nothing is said too.
    assert left == {pages for pages in listings if pages > min(page, 127)}
    assert [found[one] for one in others] == others
    assert found[elsewhere] == replace(elsewhere, shared_tokens=0)


def test_elsewhere_most_of_a_session_is_shared_by_one_of_the_other_nodes(database: Database) -> None:
    def elsewhere() -> Manifest | None:
        with database.read() as connection:
            assert manifests.elsewhere(connection, "ses_1", "f1", 0, "n1", shared=False) is None
            return manifests.elsewhere(connection, "ses_1", "f1", 0, "n1", shared=True)

    def save(manifest: Manifest) -> None:
        with database.write() as connection:
            connection.execute(sa.text("UPDATE manifests SET updated_us = updated_us - 1000000"))
            manifests.save(connection, manifest)

    save(replace(manifest(pages=9), shared_tokens=576))
    save(replace(manifest(pages=9), node="n2"))
    for other in ({"session_id": "ses_2"}, {"fingerprint": "f2"}, {"rank": 1}):
        save(replace(manifest(pages=9), node="n2", shared_tokens=576, **other))  # type: ignore[arg-type]
    assert elsewhere() is None
    most = replace(manifest(pages=3), node="n3", shared_tokens=192)
    save(most)
    save(replace(manifest(pages=4), node="n4", shared_tokens=128))
    assert elsewhere() == most
    newest = replace(manifest(pages=5), node="n5", shared_tokens=192)
    save(newest)
    assert elsewhere() == newest


def test_elsewhere_all_that_a_node_of_the_machine_has_can_be_restored(database: Database) -> None:
    def elsewhere(*reads: str, shared: bool = False) -> str | None:
        with database.read() as connection:
            found = manifests.elsewhere(connection, "ses_1", "f1", 0, "n1", reads=reads, shared=shared)
        return None if found is None else found.node

    with database.write() as connection:
        for node, pages, shared_tokens in (("n1", 9, 576), ("n2", 4, 128), ("n3", 3, 0), ("n4", 9, 256)):
            manifests.save(connection, replace(manifest(pages=pages), node=node, shared_tokens=shared_tokens))
        manifests.save(connection, replace(manifest("ses_2", pages=9), node="n2"))
    assert elsewhere() is None
    assert elsewhere("n3") == "n3" and elsewhere("n2", "n3") == "n2"
    assert elsewhere(shared=True) == "n4"
    assert elsewhere("n3", shared=True) == "n4", "that is more"
    assert elsewhere("n2", shared=True) == "n2", "that is nearer"
    assert elsewhere("n1", "n9") is None


def test_the_keys_of_sessions_are_those_of_all_their_manifests(database: Database) -> None:
    begin(database, "mine", "other", "gone")
    with database.write() as connection:
        manifests.save(connection, manifest("mine", pages=2))
        manifests.save(connection, replace(manifest("mine", pages=3), node="n2"))
        manifests.save(connection, manifest("other", pages=5))
        manifests.save(connection, manifest("gone", pages=7))
        connection.execute(sa.update(sessions).where(sessions.c.id == "gone").values(deleted_us=1))
        connection.execute(sa.update(sessions).where(sessions.c.id == "other").values(name="agent-17"))
    of = [set(manifest(pages=pages).page_keys()) for pages in range(6)]
    with database.read() as connection:
        assert manifests.keys_of_sessions(connection, session="mine") == of[3]
        assert manifests.keys_of_sessions(connection, session="other") == of[5]
        assert manifests.keys_of_sessions(connection, session="agent-17") == of[5]
        assert manifests.keys_of_sessions(connection, model="m") == of[5]
        assert manifests.keys_of_sessions(connection, session="mine", model="another") == set()
        assert manifests.keys_of_sessions(connection, session="gone") == set()
