"""What nodes tell each other by way of a shared store and SQL, a round at a time."""

from __future__ import annotations

import logging
import mmap
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import places
import pytest
import sqlalchemy as sa
from contents import MHA, keys, reader_for
from nodes import PAGE_SIZE, URL, Fragile, Node, age, rows

from agentstate.errors import (
    BadExtent,
    DatabaseError,
    DatabaseUnreachable,
    TierDeleting,
    TierMissing,
    TierRefused,
    TierUnavailable,
)
from agentstate.fleet import erasures, manifests, stores
from agentstate.fleet import extents as catalogue
from agentstate.fleet.erasures import Chain
from agentstate.pages import Quota, merge
from agentstate.sql import models
from agentstate.tiers.interface import MARK
from agentstate.tiers.testing.conformance import names
from engine_patch.sharing import access, deletions, feed, promises, publisher, thread, uploads
from engine_patch.sharing.context import FOLLOW_S, OVERLAP_US

WAIT_S = 60
# More than any of the times that a node waits for.
LATER_S = 100_000.0
ERASED_S = deletions.ERASE_S + deletions.MARGIN_S
MakeNode = Callable[..., Node]


@pytest.fixture
def place(backend: str, tmp_path: Path) -> places.Place:
    """Of each kind one, with a database of each kind."""
    if backend == "postgresql":
        return places.in_memory()
    (tmp_path / "share").mkdir()
    return places.Directory(tmp_path / "share")


@pytest.fixture
def make_node(database_url: str, place: places.Place, tmp_path: Path) -> Iterator[MakeNode]:
    made: list[Node] = []

    def make(name: str = "a", **how: object) -> Node:
        made.append(Node(name, tmp_path / name, database_url, place, **how))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for node in made:
        node.close()


@pytest.fixture
def node(make_node: MakeNode) -> Node:
    return make_node()


@pytest.fixture
def other(make_node: MakeNode) -> Node:
    return make_node("b")


def there(node: Node) -> set[str]:
    """The names of what is in the store."""
    return set(names(node.guard))


def restarted(node: Node, make_node: MakeNode, **how: object) -> Node:
    node.close()
    return make_node(node.name, **how)


def assert_all_shared(node: Node, session_id: str, *pages: object) -> None:
    assert node.shared_tokens(session_id) == PAGE_SIZE * len(pages)
    assert node.finds(*pages) == len(pages)


# What is published


def test_a_session_is_published_and_sql_and_other_nodes_learn_of_it(node: Node, other: Node) -> None:
    other.round()
    node.publish("s", 1, 2, 3, 4)
    assert_all_shared(node, "s", 1, 2, 3, 4)
    assert node.sharing.stats.waiting == 0
    other.round()
    assert other.finds(1, 2, 3, 4) == 4 and other.restores(1, 2, 3, 4)
    assert {row.owner for row in rows(node.database)} == {""} and {row.writer for row in rows(node.database)} == {"a"}


def test_a_session_that_goes_on_is_published_from_where_it_was(node: Node, other: Node) -> None:
    node.publish("s", 1, 2, 3)
    assert node.tier.sent["publish"] == 2  # one of each pool
    node.publish("s", 1, 2, 3, 4, 5)
    assert node.tier.sent["publish"] == 4
    assert_all_shared(node, "s", 1, 2, 3, 4, 5)
    other.round()
    assert other.restores(1, 2, 3, 4, 5)


def test_what_goes_on_from_pages_that_only_the_share_has_is_published(node: Node, other: Node) -> None:
    other.publish("t", 1, 2)
    node.round()
    node.stores.write(keys(3, 4))
    with node.database.write() as connection:
        manifests.save(connection, node.manifest("s", 1, 2, 3, 4))
    node.sharing.publish("s", keys(1, 2, 3, 4))
    node.round()
    assert_all_shared(node, "s", 1, 2, 3, 4)
    other.round()
    assert other.restores(1, 2, 3, 4)


def test_only_what_is_asked_for_is_published(node: Node) -> None:
    node.serve("s", 1, 2, 3)
    node.round()
    node.serve("another", 5, 6)
    node.sharing.publish("s", keys(1, 2))
    for _ in range(3):
        node.round()
    assert node.finds(5) == 0


@pytest.mark.parametrize("when", ["before the start", "after it"])
def test_with_through_everything_is_published(make_node: MakeNode, other: Node, when: str) -> None:
    node = make_node(through=True)
    chains = [(first, first + 1, first + 2) for first in range(0, 30, 3)]
    for chain in chains if when == "before the start" else chains[:3]:
        node.stores.write(keys(*chain))
    node.round()
    for chain in chains:
        node.stores.write(keys(*chain))
    node.round()
    other.round()
    assert [other.restores(*chain) for chain in chains] == [True] * len(chains)
    sent = node.tier.sent["publish"]
    assert sent == 2 * len(chains)
    node.round()
    node = restarted(node, make_node, through=True)
    node.round()
    assert node.tier.sent["publish"] == 0


def test_others_are_followed_and_promises_made_while_much_is_published(
    make_node: MakeNode, other: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(through=True)
    node.round()
    other.publish("of another", 901, 902)
    node.serve("first", 1, 2, 3)
    publication = node.sharing.publish("first", keys(1, 2, 3))
    for number in range(10, 40, 3):
        node.stores.write(keys(number, number + 1, number + 2))
    seen: list[tuple[int, int, int]] = []
    wait = node.sharing._uploads.wait

    def slowly() -> None:
        node.now_s += 2.0
        wait()
        seen.append((node.finds(901, 902), publication.promised, node.sharing.stats.published))

    monkeypatch.setattr(node.sharing._uploads, "wait", slowly)
    node.round()
    # Long before everything is published.
    assert any((found, promised) == (2, 3) and published <= 18 for found, promised, published in seen)
    assert node.sharing.stats.new == 22


def merged(node: Node, *pages: object) -> None:
    reader = reader_for(MHA)
    store, _ = node.stores.stores
    merge(store, reader, keys(*pages), mmap.mmap(-1, 1 << 20), 4 * MHA.layer_bytes)
    reader.close()


@pytest.mark.parametrize("through", [True, False])
def test_nothing_is_published_twice_after_it_was_merged(make_node: MakeNode, through: bool) -> None:
    node = make_node(through=through)
    for length in range(1, 5):
        node.publish("s", *range(length))
    before, sent = node.stores.stores[0].extents(), node.tier.sent["publish"]
    merged(node, *range(4))
    assert node.stores.stores[0].extents() != before
    node.publish("s", *range(4))
    node.round(LATER_S)
    assert node.tier.sent["publish"] == sent
    node = restarted(node, make_node, through=through)
    node.publish("s", *range(4))
    assert node.tier.sent["publish"] == 0


def test_what_two_nodes_have_computed_alike_is_published_once(node: Node, other: Node) -> None:
    node.publish("s", 1, 2, 3)
    other.publish("t", 1, 2, 3)
    assert other.tier.sent["publish"] == 0
    assert_all_shared(other, "t", 1, 2, 3)


def test_what_two_nodes_publish_at_once_is_one_object(node: Node, other: Node) -> None:
    other.tier.fault = lambda what, name: TierUnavailable("not yet")
    other.publish("t", 1, 2, 3)
    node.publish("s", 1, 2, 3)
    # It does not know of the others' yet.
    other.tier.fault = lambda what, name: None
    other.now_s += LATER_S
    other.sharing._publisher.publish()
    assert other.tier.sent["publish"] > 1 and len(rows(node.database)) == len(there(node)) == 2
    other.round()
    assert_all_shared(other, "t", 1, 2, 3)


def test_a_rank_that_another_one_writes_for_finds_what_that_publishes_and_publishes_nothing(
    node: Node, make_node: MakeNode
) -> None:
    beside = make_node("beside", through=True, rank=1)
    node.publish("a", 1, 2, 3)
    beside.round()
    assert beside.finds(1, 2, 3) == 3 and beside.restores(1, 2, 3)
    beside.stores.write(keys(7, 8))
    beside.sharing.publish("a", keys(1, 2, 3))
    for _ in range(3):
        beside.round(1000.0)
    assert beside.sharing.stats.published == 0
    assert node.shared_tokens("a") == 3 * PAGE_SIZE


def test_what_a_process_has_not_published_the_next_one_does(node: Node, make_node: MakeNode, other: Node) -> None:
    node.serve("s", 1, 2, 3)
    node.publish("t", 1, 2)
    node.serve("u", 7)
    node = restarted(node, make_node)
    node.round()
    for session, *pages in (("s", 1, 2, 3), ("t", 1, 2), ("u", 7)):
        assert_all_shared(node, str(session), *pages)
    other.round()
    assert other.restores(1, 2, 3) and other.restores(7)


def test_sql_is_told_of_a_manifest_that_comes_later(node: Node) -> None:
    """It is written by another thread."""
    node.stores.write(keys(1, 2))
    node.sharing.publish("s", keys(1, 2))
    node.round()
    assert node.finds(1, 2) == 2
    node.serve("s", 1, 2)
    node.round()
    assert_all_shared(node, "s", 1, 2)


def test_what_is_told_of_a_session_that_is_gone_is_given_up(node: Node) -> None:
    node.stores.write(keys(1, 2))
    node.sharing.publish("s", keys(1, 2))
    for _ in range(promises.TELLINGS):
        assert node.sharing.stats.waiting == 1 or not node.finds(1)
        node.round()
    assert node.sharing.stats.waiting == 0


def test_what_is_noted_is_not_published_and_takes_the_place_of_nothing_that_is(node: Node, other: Node) -> None:
    other.publish("t", 1, 2)
    node.round()
    node.serve("s", 1, 2, 3, 4)
    node.sharing.note("s", keys(1, 2))
    sent = node.tier.sent["publish"]
    node.round()
    assert node.shared_tokens("s") == 2 * PAGE_SIZE and node.tier.sent["publish"] == sent
    node.sharing.note("s", [])
    assert node.sharing.stats.waiting == 0
    node.sharing.publish("s", keys(1, 2, 3, 4))
    node.sharing.note("s", keys(1, 2))
    node.round()
    assert_all_shared(node, "s", 1, 2, 3, 4)


def test_nothing_is_said_of_another_history(node: Node) -> None:
    node.publish("s", 1, 2, 3)
    node.serve("s", 1, 9)
    node.sharing.publish("s", keys(1, 2, 3))
    node.round()
    assert node.shared_tokens("s") == 0


def test_whose_an_extent_is_is_told(node: Node, other: Node) -> None:
    node.serve("s", 1, 2, owner="tenant acme")
    node.sharing.publish("s", keys(1, 2))
    node.round()
    assert {row.owner for row in rows(node.database)} == {"tenant acme"}
    other.round()
    assert other.restores(1, 2)


# What was stored before


def takes(node: Node, seconds: float) -> list[str]:
    """An upload takes so long from now on: the names of what is published, as it is."""
    published: list[str] = []

    def after(what: str, name: str) -> None:
        if what == "publish":
            node.now_s += seconds
            published.append(name)

    node.tier.after = after
    return published


@pytest.mark.parametrize("through", [True, False])
def test_what_was_stored_before_takes_half_of_the_time_of_one_upload(
    make_node: MakeNode, other: Node, through: bool
) -> None:
    node = make_node(through=through)
    for n in range(12):
        node.serve(f"s{n}", n)
    published = takes(node, 0.6 * publisher.BEHIND_S)
    node.round()
    assert len(published) == 2, "an upload is not broken off"
    node.round(0.9 * publisher.BEHIND_S)
    assert len(published) == 2
    node.round(0.4 * publisher.BEHIND_S)
    assert len(published) == 4
    for _ in range(20):
        node.round(2 * publisher.BEHIND_S)
    other.round()
    assert all(other.restores(n) for n in range(12)) and len(published) == 24
    assert {node.shared_tokens(f"s{n}") for n in range(12)} == {PAGE_SIZE}


def test_what_is_new_goes_before_what_was_stored_before_and_of_that_the_newest_first(
    make_node: MakeNode, other: Node
) -> None:
    node = make_node()
    for n in range(4):
        node.serve(f"s{n}", n)
    takes(node, publisher.BEHIND_S)
    node.round()
    node.round(2 * publisher.BEHIND_S)
    assert [node.finds(n) for n in range(4)] == [0, 0, 0, 1]
    node.publish("new", 10)
    assert_all_shared(node, "new", 10)
    assert [node.finds(n) for n in range(4)] == [0, 0, 0, 1]
    # It was stored before, and its turn has ended now.
    node.publish("s0", 0, 11)
    assert_all_shared(node, "s0", 0, 11)
    for _ in range(8):
        node.round(2 * publisher.BEHIND_S)
    assert [node.finds(n) for n in range(4)] == [1, 1, 1, 1]


def test_what_cannot_be_published_does_not_keep_what_is_older_waiting_for_good(node: Node) -> None:
    node.serve("older", 100)
    for n in range(promises.MOST_BEHIND):
        node.serve(f"s{n}", n)
        for store in node.stores.stores:
            store.extents()[-1].path.unlink()
    for _ in range(promises.TELLINGS + 2):
        node.round()
    assert_all_shared(node, "older", 100)
    assert node.sharing.stats.waiting == 0


# What is about to be evicted

EXTENTS = 16


@pytest.fixture
def small(make_node: MakeNode) -> Node:
    """A node with room for `EXTENTS` of two pages in each pool, which publishes what is about to be evicted."""
    node = make_node(evict=True)
    for store in node.stores.stores:
        store.quota = Quota(EXTENTS * store.draft_bytes(2))
    return node


def serve(node: Node, *chains: int) -> None:
    """Sessions, each of two pages, whose manifests need them."""
    for n in chains:
        node.serve(f"s{n}", 2 * n, 2 * n + 1)
        for store in node.stores.stores:
            store.need(keys(2 * n, 2 * n + 1), f"s{n}")


def shared(node: Node, *chains: int) -> list[bool]:
    return [node.finds(2 * n, 2 * n + 1) == 2 for n in chains]


def here(node: Node, n: int) -> bool:
    return node.stores.stores[0].prefix_length(keys(2 * n, 2 * n + 1), use=False) == 2


def test_what_is_about_to_be_evicted_is_published_and_what_is_not_stays(small: Node, other: Node) -> None:
    node = small
    serve(node, *range(EXTENTS - 2))
    node.round()
    assert node.tier.sent["publish"] == 0
    serve(node, EXTENTS - 2)
    node.round()
    assert shared(node, 0, 1, 2) == [True, False, False]
    for n in range(EXTENTS - 1, 3 * EXTENTS):
        serve(node, n)
        node.round()
    evicted = [n for n in range(3 * EXTENTS) if not here(node, n)]
    assert len(evicted) == 2 * EXTENTS and node.sharing.stats.evicted == 0
    other.round()
    for n in evicted:
        assert other.restores(2 * n, 2 * n + 1)
        assert node.shared_tokens(f"s{n}") == 2 * PAGE_SIZE, "SQL says so"
    # As far ahead as an eighth of the room.
    assert shared(node, *range(2 * EXTENTS + 2, 3 * EXTENTS)) == [False] * (EXTENTS - 2)
    sent = node.tier.sent["publish"]
    node.round(LATER_S)
    assert node.tier.sent["publish"] == sent


def test_sql_is_told_of_what_was_published_when_it_failed(small: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node = small
    serve(node, *range(EXTENTS - 1))
    load = manifests.load

    def fails(*arguments: object) -> None:
        monkeypatch.setattr(manifests, "load", load)
        raise DatabaseUnreachable("of this test")

    monkeypatch.setattr(manifests, "load", fails)
    with pytest.raises(DatabaseError):
        node.round()
    assert shared(node, 0) == [True] and node.shared_tokens("s0") == 0
    for _ in range(2):
        node.round()
    assert node.shared_tokens("s0") == 2 * PAGE_SIZE


def test_what_nobody_comes_back_for_is_evicted_unpublished(small: Node) -> None:
    node = small
    for n in range(3 * EXTENTS):
        node.stores.write(keys(2 * n, 2 * n + 1))
        if n == 1:
            for store in node.stores.stores:
                store.prefix_length(keys(2, 3))
        node.round()
    assert shared(node, *range(3 * EXTENTS)) == [n == 1 for n in range(3 * EXTENTS)]
    assert node.sharing.stats.evicted == 0


def test_a_quota_of_an_owner_is_looked_ahead_of(small: Node) -> None:
    node = small
    for store in node.stores.stores:
        limit = 8 * store.draft_bytes(2, "tenant a")
        store._space.limits = lambda owner, limit=limit: limit if owner == "tenant a" else None
    for n in range(12):
        node.serve(f"s{n}", 2 * n, 2 * n + 1, owner="tenant a")
        for store in node.stores.stores:
            store.need(keys(2 * n, 2 * n + 1), f"s{n}")
        node.round()
    assert [here(node, n) for n in range(12)] == [False] * 4 + [True] * 8
    assert shared(node, *range(12)) == [True] * 5 + [False] * 7


def test_eviction_does_not_wait_for_a_store_that_fails(
    small: Node, other: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node = small
    node.tier.fault = lambda what, name: TierUnavailable("down")
    for n in range(2 * EXTENTS):
        serve(node, n)
        node.round(access.PAUSE_S / 2)
    assert [here(node, n) for n in range(2 * EXTENTS)] == [False] * EXTENTS + [True] * EXTENTS
    assert node.sharing.stats.evicted == 2 * 2 * EXTENTS
    assert len([record for record in caplog.records if "before they are published" in record.message]) == 1
    node.tier.fault = lambda what, name: None
    node.round(LATER_S)
    node.round()
    other.round()
    assert other.restores(2 * EXTENTS, 2 * EXTENTS + 1)


@pytest.mark.parametrize("own", [True, False], ids=["this node finds out", "another one does"])
def test_what_a_session_is_asked_to_share_is_published_with_evict_too_and_again_when_it_goes(
    small: Node, other: Node, place: places.Place, own: bool
) -> None:
    node = small
    serve(node, *range(4))
    node.sharing.publish("s1", keys(2, 3))
    node.round(LATER_S)
    assert shared(node, 0, 1, 2, 3) == [False, True, False, False]
    assert_all_shared(node, "s1", 2, 3)
    other.round()
    for row in rows(node.database):
        place.remove(row.name)
    who = node if own else other
    assert not who.restores(2, 3)
    if not own:
        other.round()
        assert node.shared_tokens("s1") == 0
    for _ in range(3):
        node.round(LATER_S)
    assert_all_shared(node, "s1", 2, 3)
    assert shared(node, 0, 1, 2, 3) == [False, True, False, False]
    other.round()
    assert other.restores(2, 3)


# When the store fails


@pytest.mark.parametrize("error", [TierUnavailable("down"), TierRefused("full")])
@pytest.mark.parametrize("through", [True, False])
def test_what_the_store_does_not_take_is_published_once_it_does(
    make_node: MakeNode, other: Node, through: bool, error: Exception
) -> None:
    node = make_node(through=through)
    # More than are under way at once.
    chains = {f"s{n}": (3 * n, 3 * n + 1, 3 * n + 2) for n in range(3 * uploads.MOST_UPLOADS)}
    node.tier.fault = lambda what, name: error if what == "publish" else None
    for session_id, pages in chains.items():
        if through:
            node.stores.write(keys(*pages))
        else:
            node.publish(session_id, *pages)
    for _ in range(3):
        node.round(LATER_S)
    assert node.sharing.stats.failed and not rows(node.database)
    node.tier.fault = lambda what, name: None
    node.round(LATER_S)
    node.round()
    other.round()
    for session_id, pages in chains.items():
        assert other.restores(*pages)
        if not through:
            assert_all_shared(node, session_id, *pages)


@pytest.mark.parametrize("through", [True, False])
def test_one_upload_that_fails_among_others_is_made_again(make_node: MakeNode, other: Node, through: bool) -> None:
    node = make_node(through=through)
    chains = {f"s{n}": (3 * n, 3 * n + 1, 3 * n + 2) for n in range(8)}
    fails = 2

    def fault(what: str, name: str) -> Exception | None:
        nonlocal fails
        fails -= what == "publish"
        return TierUnavailable("once") if fails == 0 and what == "publish" else None

    for session_id, pages in chains.items():
        node.serve(session_id, *pages)
        if not through:
            node.sharing.publish(session_id, keys(*pages))
    node.tier.fault = fault
    for _ in range(3):
        node.round(LATER_S)
    assert node.sharing.stats.failed == 1
    other.round()
    assert [other.restores(*pages) for pages in chains.values()] == [True] * len(chains)


def test_after_a_failure_nothing_is_sent_for_a_while(node: Node) -> None:
    node.tier.fault = lambda what, name: TierUnavailable("down")
    for n in range(20):
        node.serve(f"s{n}", n)
        node.sharing.publish(f"s{n}", keys(n))
    node.round()
    sent = node.tier.sent["publish"]
    assert 1 <= sent <= uploads.MOST_UPLOADS
    node.round(access.PAUSE_S / 2)
    assert node.tier.sent["publish"] == sent
    node.round(access.PAUSE_S)
    assert node.tier.sent["publish"] > sent


@pytest.mark.parametrize("transactions", range(12))
def test_what_sql_does_not_take_is_listed_later(node: Node, other: Node, transactions: int) -> None:
    """SQL goes away after any of the transactions of a round."""
    node.round()
    node.serve("s", 1, 2, 3)
    node.sharing.publish("s", keys(1, 2, 3))
    node.database.left = transactions
    try:
        node.round()
    except DatabaseError:
        with pytest.raises(DatabaseError):
            node.round()
    node.database.left, node.database.down = None, False
    sent = node.tier.sent["publish"]
    node.round()
    node.round()
    assert_all_shared(node, "s", 1, 2, 3)
    if sent:
        assert node.tier.sent["publish"] == sent, "what is there is not published again"
    other.round()
    assert other.restores(1, 2, 3)


def test_an_object_that_vanishes_before_its_row_is_there_is_published_again(
    node: Node, other: Node, place: places.Place
) -> None:
    """Somebody deleted it who had begun before it was published."""
    left = 1

    def vanish(what: str, name: str) -> None:
        nonlocal left
        if what == "publish" and left:
            left -= 1
            place.remove(name)

    node.tier.after = vanish
    node.publish("s", 1, 2, 3)
    for _ in range(5):
        other.round()
        assert len(there(node)) == 2 or not node.shared_tokens("s")
        node.round(LATER_S)
    assert_all_shared(node, "s", 1, 2, 3)
    other.round()
    assert other.restores(1, 2, 3) and len(there(node)) == 2


def test_an_object_that_vanishes_while_nobody_can_look_is_not_promised(
    node: Node, other: Node, place: places.Place
) -> None:
    def vanish(what: str, name: str) -> None:
        if what == "publish":
            place.remove(name)
            node.tier.fault = lambda what, name: TierUnavailable("down")

    node.tier.after = vanish
    node.publish("s", 1)
    for _ in range(3):
        node.round(LATER_S)
        assert not node.shared_tokens("s")
    node.tier.fault, node.tier.after = lambda what, name: None, lambda what, name: None
    for _ in range(5):
        assert len(there(node)) == 2 or not node.shared_tokens("s")
        node.round(LATER_S)
    assert_all_shared(node, "s", 1)
    other.round()
    assert other.restores(1)


@pytest.mark.parametrize("damage", ["missing", "wrong"])
def test_what_a_second_publisher_does_not_find_is_promised_no_more_or_stays(
    node: Node, other: Node, damage: str
) -> None:
    """It publishes what it does not know to be there, and looks at it as at what is new."""
    node.publish("s", 1, 2)
    other.serve("t", 1, 2)
    other.sharing.publish("t", keys(1, 2))

    def fault(what: str, name: str) -> Exception | None:
        if what == "read":
            return TierMissing("404") if damage == "missing" else BadExtent("damaged")
        return None

    other.tier.fault = fault
    other.sharing._publisher.publish()
    other.tier.fault = lambda what, name: None
    assert not any(row.doomed_us for row in rows(node.database)) or not node.shared_tokens("s")
    for _ in range(3):
        other.round(LATER_S)
        node.round(LATER_S)
    for one, session_id in ((node, "s"), (other, "t")):
        assert_all_shared(one, session_id, 1, 2)
        assert one.restores(1, 2)


def test_what_is_being_deleted_is_published_once_it_is_gone(node: Node, other: Node, make_node: MakeNode) -> None:
    node.publish("s", 1, 2, 3)
    with node.database.write() as connection:
        catalogue.doom(connection, [row.id for row in rows(node.database)])
    with node.database.write() as connection:
        taken = catalogue.take(connection, node.store_id, 0, 100)
    node.round()
    assert node.finds(1) == 0
    node.sharing.publish("s", keys(1, 2, 3))
    node.round()
    with pytest.raises(TierDeleting), node.database.write() as connection:
        name = next(iter(taken.names.values()))
        catalogue.add(connection, node.store_id, name=name, nbytes=1, owner="", writer="a", keys=b"")
    node.round()
    assert node.finds(1) == 0
    for id, name in taken.names.items():
        node.guard.drop(name).result(WAIT_S)
        with node.database.write() as connection:
            catalogue.forget(connection, [id], taken.at_us)
    node.round(LATER_S)
    node.round(LATER_S)
    assert_all_shared(node, "s", 1, 2, 3)
    other.round()
    assert other.restores(1, 2, 3)


# What is read


def test_a_doomed_extent_leaves_the_index_of_all_within_a_round(node: Node, other: Node) -> None:
    node.publish("s", 1, 2)
    other.round()
    assert other.finds(1, 2) == 2
    with node.database.write() as connection:
        catalogue.doom(connection, [rows(node.database)[0].id])
    for one in (node, other):
        one.sharing._follow()
        assert one.finds(1, 2) == 0


def test_what_left_just_before_sql_failed_is_published_again(node: Node) -> None:
    node.publish("s", 1, 2)
    full = node.stores.stores[0].fingerprint.hex()
    with node.database.write() as connection:
        (first,) = (row.id for row in rows(node.database) if row.name.startswith(full))
        catalogue.doom(connection, [first])
        manifests.unshare_listing(connection, node.engine.fingerprint, 0, set(keys(1, 2)))
    node.database.left = 1
    with pytest.raises(DatabaseError):
        node.round()
    assert node.finds(1) == 0
    node.database.left, node.database.down = None, False
    for _ in range(2):
        node.round()
    assert_all_shared(node, "s", 1, 2)


def test_what_is_missing_is_doomed_for_all_and_published_again(node: Node, other: Node, place: places.Place) -> None:
    node.publish("s", 1, 2)
    other.round()
    for row in rows(node.database):
        place.remove(row.name)
    assert not other.restores(1, 2)
    other.round()
    assert all(row.doomed_us for row in rows(node.database))
    assert node.shared_tokens("s") == 0
    node.round()
    other.round()
    assert other.restores(1, 2)
    assert_all_shared(node, "s", 1, 2)


@pytest.mark.parametrize("how", ["at once", "when SQL answers again"])
def test_what_one_node_did_not_find_and_is_there_is_promised_on(node: Node, other: Node, how: str) -> None:
    """A file server may say so of a file that is new, for a while."""
    node.publish("s", 1, 2)
    other.round()
    other.tier.fault = lambda what, name: TierMissing("404") if what == "read" else None
    assert not other.restores(1, 2)
    other.tier.fault = lambda what, name: None
    if how != "at once":
        other.database.left = 2
        with pytest.raises(DatabaseError):
            other.round()
        other.database.left, other.database.down = None, False
    other.round()
    for _ in range(3):
        age(node.database, LATER_S)
        node.round(LATER_S)
        other.round(LATER_S)
    assert_all_shared(node, "s", 1, 2)
    assert other.restores(1, 2)
    assert not any(row.doomed_us for row in rows(node.database)) and len(there(node)) == 2


def test_an_extent_with_wrong_pages_is_not_used_and_not_published_in_every_round(
    node: Node, place: places.Place
) -> None:
    node.publish("s", 1, 2)
    shared, _ = node.stores.shared
    with shared.pin(keys(1, 2)) as pin:
        shared.drop(pin.copies([0]))
    assert node.finds(1, 2) == 0
    node.publish("s", 1, 2)
    sent = node.tier.sent["publish"]
    for _ in range(10):
        node.round(2 * access.PAUSE_S)
    assert node.tier.sent["publish"] == sent
    assert node.sharing.stats.waiting == 0
    # It may have been the way here: later it is used again.
    assert node.finds(1, 2) == 0
    node.round(feed.WHOLE_S)
    assert node.finds(1, 2) == 2 and node.restores(1, 2)


def test_other_weights_have_other_pages_and_the_first_ones_are_found_again(node: Node, other: Node) -> None:
    node.publish("s", 1, 2)
    age(node.database, 3600)
    node.publish("t", 3, 4)
    node.round()
    node.reload("other")
    node.round()
    assert node.finds(1, 2) == 0
    node.reload("")
    node.round()
    assert node.finds(1, 2) == 2 and node.finds(3, 4) == 2


def test_nothing_is_promised_of_weights_that_were_replaced(node: Node) -> None:
    """The pools have moved, and the engine is not registered anew yet: its keys are the same."""
    node.serve("s", 1, 2)
    node.reload("other")
    node.stores.write(keys(1, 2))
    node.sharing.publish("s", keys(1, 2))
    node.round()
    node.round()
    assert node.shared_tokens("s") == 0


# What is erased


def gone(node: Node, session_id: str, *pages: object) -> Chain:
    """A session is deleted: its manifests, and what its nodes are to erase."""
    with node.database.write() as connection:
        manifests.erase(connection, [session_id])
    return Chain.whole(b"".join(keys(*pages)))


def erased(node: Node, session_id: str, *pages: object) -> None:
    """As its `Eraser` does when the pages are off the drive."""
    chain = gone(node, session_id, *pages)
    with node.database.read() as connection:
        needed = erasures.needed_pages(connection, node.store, chain)
    for store in node.stores.stores:
        store.erase(keys(*pages)[needed:])
    node.sharing.erase([chain])
    with node.database.write() as connection:
        found = erasures.waiting(connection, node.store, 100)
        erasures.done(connection, [erasure.id for erasure in found])


def test_what_is_erased_is_gone_when_all_engines_have_been_told(node: Node, other: Node) -> None:
    node.publish("s", 1, 2, 3)
    node.publish("t", 7, 8)
    other.round()
    erased(node, "s", 1, 2, 3)
    other.round()
    assert node.finds(1, 2, 3) == other.finds(1, 2, 3) == 0
    assert len(there(node)) == 4
    age(node.database, ERASED_S)
    node.round(ERASED_S)
    assert len(there(node)) == len(rows(node.database)) == 2
    assert other.restores(7, 8)
    assert_all_shared(node, "t", 7, 8)


def test_what_a_session_on_another_node_needs_is_not_erased(node: Node, other: Node) -> None:
    """Where an extent has both, it is published again."""
    node.publish("s", 1, 2)
    node.publish("s", 1, 2, 3, 4)
    other.publish("t", 1, 2)
    erased(node, "s", 1, 2, 3, 4)
    for _ in range(3):
        age(node.database, ERASED_S)
        node.round(ERASED_S)
        other.round(ERASED_S)
    assert_all_shared(other, "t", 1, 2)
    assert other.restores(1, 2) and node.finds(1, 2, 3) == 2


def test_nothing_of_what_is_promised_is_deleted_with_what_is_erased(node: Node, other: Node) -> None:
    """An extent has pages of both."""
    node.publish("s", 1, 2, 3, 4)
    other.publish("t", 1, 2)
    erased(node, "s", 1, 2, 3, 4)
    for _ in range(3):
        age(node.database, ERASED_S)
        node.round(LATER_S)
        other.round(LATER_S)
        assert other.restores(1, 2) or not other.shared_tokens("t")
    assert_all_shared(other, "t", 1, 2)
    assert other.restores(1, 2)


def test_what_a_node_that_is_gone_was_to_erase_others_do(node: Node, other: Node) -> None:
    node.publish("s", 1, 2, 3)
    other.round()
    gone(node, "s", 1, 2, 3)
    other.round()
    assert other.finds(1, 2, 3) == 0 and all(row.doomed_us for row in rows(other.database))
    age(other.database, ERASED_S)
    other.round(ERASED_S)
    assert there(other) == set() and rows(other.database) == []


def test_what_is_to_be_erased_is_seen_in_whatever_order_it_is_committed(
    node: Node, other: Node, make_node: MakeNode
) -> None:
    if node.database.is_sqlite:
        pytest.skip("SQLite has one writer at a time")
    node.publish("s", 1, 2)
    node.publish("t", 3, 4)
    other.round()
    with make_node("c").database.write() as late:
        manifests.erase(late, ["s"])
        gone(node, "t", 3, 4)
        other.round()
        assert (other.finds(1, 2), other.finds(3, 4)) == (2, 0)
    other.round()
    assert (other.finds(1, 2), other.finds(3, 4)) == (0, 0)


def test_what_was_erased_for_another_node_is_not_erased_again_and_again(
    node: Node, other: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(4):
        node.publish(f"s{n}", n)
    erased_now: list[int] = []
    deleting = other.sharing._deletions
    erase = deleting.erase
    monkeypatch.setattr(
        deleting, "erase", lambda chains: (erased_now.append(len(chains)), erase(chains)) if chains else None
    )
    for n in range(4):
        gone(node, f"s{n}", n)
        with node.database.write() as connection:
            columns = models.erasures.c
            connection.execute(sa.update(models.erasures).values(created_us=columns.created_us - OVERLAP_US // 2))
        for _ in range(3):
            other.round()
    assert erased_now == [1, 1, 1, 1]
    assert len(other.sharing._deletions._erased_lately) < 4


@pytest.mark.parametrize("through", [True, False])
def test_what_is_erased_while_it_is_being_published_goes_too(make_node: MakeNode, through: bool) -> None:
    """Its upload has begun, and its row is written after all others were doomed."""
    node = make_node(through=through)
    node.serve("s", 1, 2, 3)
    node.sharing.publish("s", keys(1, 2, 3))
    left = 1

    def erase(what: str, name: str) -> None:
        nonlocal left
        if what == "publish" and left:
            left -= 1
            erased(node, "s", 1, 2, 3)

    node.tier.after = erase
    node.round()
    for _ in range(3):
        age(node.database, ERASED_S)
        node.round(ERASED_S)
    assert left == 0 and rows(node.database) == [] and there(node) == set()


def test_what_is_erased_before_another_nodes_extent_is_known_goes_too(node: Node, other: Node) -> None:
    node.serve("s", 1, 2, 3)
    other.publish("s", 1, 2, 3)
    with node.database.write() as connection:
        manifests.erase(connection, ["s"])
    for one in (other, node):
        chain = Chain.whole(b"".join(keys(1, 2, 3)))
        for store in one.stores.stores:
            store.erase(keys(1, 2, 3))
    # The node that published it has died.
    node.sharing.erase([chain])
    node.round()
    age(node.database, ERASED_S)
    node.round(ERASED_S)
    assert rows(node.database) == []


def test_a_promise_and_an_erasure_at_once_agree(node: Node, other: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second session's manifest comes while the first one's pages are being erased."""
    node.publish("s", 1, 2)
    other.round()
    chain = gone(node, "s", 1, 2)

    def promise() -> None:
        other.publish("t", 1, 2)

    promising = threading.Thread(target=promise)
    needed_anywhere = erasures.needed_anywhere

    def asked(*arguments: object) -> int:
        found = needed_anywhere(*arguments)  # type: ignore[arg-type]
        if not promising.ident:
            promising.start()
            # It waits until this has ended, or has ended itself.
            promising.join(1)
        return found

    monkeypatch.setattr(erasures, "needed_anywhere", asked)
    node.sharing.erase([chain])
    promising.join(WAIT_S)
    assert all(not row.doomed_us for row in rows(node.database)) or not other.shared_tokens("t")


def test_erasures_that_follow_one_another_do_not_keep_each_other(node: Node) -> None:
    for n in range(5):
        node.publish(f"s{n}", n)
    for n in range(5):
        erased(node, f"s{n}", n)
        age(node.database, ERASED_S / 2)
        node.round(ERASED_S / 2)
    assert len(there(node)) <= 4
    for _ in range(2):
        age(node.database, ERASED_S)
        node.round(ERASED_S)
    assert there(node) == set()


# What is collected


def forget(node: Node, session_id: str) -> None:
    """No manifest says anything of a session any more, and nothing is to be erased: its stores are gone."""
    with node.database.write() as connection:
        connection.execute(sa.delete(models.manifests).where(models.manifests.c.session_id == session_id))


def collects(node: Node) -> None:
    age(node.database, LATER_S)
    node.round(LATER_S)


def test_what_nobody_needs_is_deleted_and_what_a_manifest_lists_is_not(node: Node, other: Node) -> None:
    node.publish("s", 1, 2, 3)
    other.publish("t", 1, 2)
    node.publish("u", 7, 8)
    forget(node, "u")
    collects(node)
    node.round()
    assert node.finds(7, 8) == 0 and len(there(node)) == 5
    collects(node)
    assert len(there(node)) == len(rows(node.database)) == 3
    forget(node, "s")
    for _ in range(2):
        collects(node)
    other.round()
    assert other.restores(1, 2)
    assert_all_shared(other, "t", 1, 2)


def test_what_was_read_is_kept(node: Node, other: Node) -> None:
    node.publish("s", 1, 2)
    other.round()
    forget(node, "s")
    age(node.database, LATER_S)
    assert other.restores(1, 2)
    other.round()
    node.round(LATER_S)
    assert len(rows(node.database)) == 2 and not any(row.doomed_us for row in rows(node.database))


def test_objects_without_a_row_are_deleted_after_a_grace(
    node: Node, make_node: MakeNode, place: places.Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their writer died before it wrote the row. Others' objects are left alone."""
    node.serve("s", 1, 2)
    node.sharing.publish("s", keys(1, 2))
    node.database.left = 2
    with pytest.raises(DatabaseError):
        node.round()
    assert there(node) and not rows(make_node("c").database)
    other = make_node("b")
    place.put("of somebody else", b"anything")
    other.round(LATER_S)
    assert there(other) and rows(other.database) == [], "they are young"
    monkeypatch.setattr(deletions, "GRACE_S", -1.0)
    other.round(LATER_S)
    assert all(row.doomed_us is not None for row in rows(other.database))
    other.round(LATER_S)
    assert there(other) == set() and rows(other.database) == []
    if isinstance(place, places.Directory):
        assert (place.root / "of somebody else").exists()


def test_an_object_that_is_listed_as_another_stores_is_left_alone(
    node: Node, other: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an engine of before, which spells the URL in another way."""
    node.publish("s", 1, 2)
    with node.database.write() as connection:
        connection.execute(sa.update(models.shared_extents).values(store="file:///mounted/elsewhere"))
    monkeypatch.setattr(deletions, "GRACE_S", -1.0)
    for _ in range(2):
        other.round(LATER_S)
    assert len(there(node)) == 2 and not any(row.doomed_us for row in rows(other.database))


def test_an_orphan_that_is_published_again_stays(node: Node, other: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletions, "GRACE_S", -1.0)
    node.serve("s", 1, 2)
    node.sharing.publish("s", keys(1, 2))
    node.database.left = 3
    with pytest.raises(DatabaseError):
        node.round()
    monkeypatch.setattr(other.sharing._deletions, "_delete", lambda after_s: True)
    other.round(LATER_S)
    assert all(row.doomed_us is not None for row in rows(other.database)) and rows(other.database)
    node.database.left, node.database.down = None, False
    node.round()
    node.round()
    assert_all_shared(node, "s", 1, 2)
    assert not any(row.doomed_us for row in rows(other.database))


@pytest.mark.parametrize("what", ["list", "drop", "sweep"])
def test_a_store_that_fails_in_a_collection_is_asked_again(
    node: Node, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    node.publish("s", 1, 2)
    forget(node, "s")
    collects(node)
    node.tier.fault = lambda kind, name: TierUnavailable("down") if kind == what else None
    with caplog.at_level(logging.WARNING):
        collects(node)
    assert not caplog.records
    node.tier.fault = lambda kind, name: None
    collects(node)
    assert there(node) == set() and rows(node.database) == []


def test_a_collection_that_dies_is_gone_on_with(node: Node, other: Node) -> None:
    node.publish("s", 1, 2)
    forget(node, "s")
    collects(node)
    # The objects are deleted, and the rows are not.
    node.tier.after = lambda what, name: setattr(node.database, "down", what == "drop")
    age(node.database, LATER_S)
    with pytest.raises(DatabaseError):
        node.round(LATER_S)
    assert len(rows(other.database)) == 2
    collects(other)
    collects(other)
    assert rows(other.database) == [] and there(other) == set()


def test_a_deletion_that_comes_late_deletes_nothing_that_was_published_again(
    node: Node, other: Node, make_node: MakeNode
) -> None:
    """The first collector hangs in it while a second one collects."""
    node.publish("s", 1, 2)
    forget(node, "s")
    collects(node)
    third = make_node("c")
    late = 0

    def meanwhile(what: str, name: str) -> None:
        nonlocal late
        if what == "drop":
            late += 1
            if late == 1:
                other.round(LATER_S)
                third.publish("t", 1, 2)
                third.round(LATER_S)

    node.tier.fault = meanwhile  # type: ignore[assignment]
    age(node.database, LATER_S)
    node.round(LATER_S)
    assert late == 2
    assert len(there(third)) == 2 or not third.shared_tokens("t")
    for _ in range(3):
        third.round(LATER_S)
    assert_all_shared(third, "t", 1, 2)
    other.round()
    assert other.restores(1, 2)


def test_what_a_collector_cannot_delete_is_deleted_once_its_requests_have_ended(node: Node) -> None:
    node.publish("s", 1, 2)
    node.tier.fault = lambda what, name: TierUnavailable("down") if what == "drop" else None
    erased(node, "s", 1, 2)
    age(node.database, ERASED_S)
    node.round(ERASED_S)
    sent = node.tier.sent["drop"]
    node.tier.fault = lambda what, name: None
    for _ in range(3):
        node.round(ERASED_S)
    assert node.tier.sent["drop"] == sent == len(there(node)) == 2
    age(node.database, catalogue.RETAKE_S)
    node.round(catalogue.RETAKE_S + deletions.MARGIN_S)
    assert there(node) == set() and rows(node.database) == []


def test_nothing_is_deleted_where_the_database_answers_too_late(node: Node) -> None:
    """Somebody else may have taken it by then."""
    node.publish("s", 1, 2)
    forget(node, "s")
    collects(node)
    age(node.database, LATER_S)
    times = iter((0.0, 1000.0))
    with pytest.raises(TierUnavailable):
        list(replace(node.sharing._access.rows, clock=lambda: next(times)).delete_doomed())
    assert len(there(node)) == len(rows(node.database)) == 2


# What an account may have


def held(node: Node, owner: str) -> int:
    with node.database.read() as connection:
        return catalogue.owned(connection, node.store_id).get(owner, 0)


def test_an_account_has_no_more_than_its_quota_and_others_are_not_touched(node: Node, other: Node) -> None:
    node.publish("s", 1, 2, owner="a")
    node.publish("u", 7, 8, owner="b")
    node.limits = {"a": held(node, "a")}
    before = held(node, "b")
    node.now_s += FOLLOW_S
    refused = node.publish("t", 3, 4, owner="a")
    reason = node.sharing.refused(refused)
    assert reason and "a has" in reason and node.sharing.stats.over_quota
    assert (node.shared_tokens("t"), node.shared_tokens("s")) == (0, 2 * PAGE_SIZE)
    collects(node)
    assert held(node, "a") == node.limits["a"] and held(node, "b") == before
    assert_all_shared(node, "s", 1, 2)
    # It gets more.
    node.limits = {"a": 1 << 30}
    node.publish("t", 3, 4, owner="a")
    assert_all_shared(node, "t", 3, 4)


def test_what_of_a_chain_is_within_the_quota_is_promised(node: Node) -> None:
    node.publish("s", 1, 2, 3, owner="a")
    node.limits = {"a": held(node, "a")}
    node.now_s += FOLLOW_S
    refused = node.publish("s", 1, 2, 3, 4, 5, owner="a")
    assert node.sharing.refused(refused) and refused.promised == 3
    assert node.sharing.stats.waiting == 0


def test_what_nobody_needs_makes_room_the_least_recently_used_first(node: Node, other: Node) -> None:
    for number, session in enumerate(("old", "newer")):
        node.publish(session, 10 * number, owner="a")
        age(node.database, 1000.0)
    node.publish("of another", 77, owner="b")
    age(node.database, 1000.0)
    for session in ("old", "newer", "of another"):
        forget(node, session)
    node.limits = {"a": held(node, "a")}
    node.now_s += FOLLOW_S
    node.publish("s", 50, owner="a")
    assert_all_shared(node, "s", 50)
    node.round()
    assert (node.finds(0), node.finds(10), node.finds(77)) == (0, 1, 1)
    assert held(node, "a") <= node.limits["a"]


@pytest.mark.parametrize("through", [True, False])
def test_what_was_over_the_quota_is_published_once_there_is_room(make_node: MakeNode, through: bool) -> None:
    node = make_node(through=through)
    node.limits = {"a": 0}
    node.publish("s", 1, 2, owner="a")
    assert node.shared_tokens("s") == 0 and node.finds(1, 2) == 0
    node.limits = {}
    node.round(LATER_S)
    node.round()
    assert_all_shared(node, "s", 1, 2)


# Whose the store is


def test_nodes_that_write_its_url_differently_find_each_others_pages(node: Node, make_node: MakeNode) -> None:
    other = make_node("b", share="file:///the//share/")
    node.publish("s", 1, 2)
    other.round()
    assert other.restores(1, 2)
    other.publish("t", 3)
    node.round()
    assert node.restores(3)


@pytest.fixture
def stranger(migrated_file: Path, place: places.Place, tmp_path: Path) -> Iterator[Node]:
    """A node of another installation, on the same store."""
    shutil.copy(migrated_file, tmp_path / "strangers.db")
    node = Node("x", tmp_path / "x", f"sqlite:///{tmp_path / 'strangers.db'}", place, through=True)
    yield node
    node.close()


def test_nothing_of_another_installation_is_deleted(
    node: Node, stranger: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    node.publish("s", 1, 2)
    monkeypatch.setattr(deletions, "GRACE_S", -1.0)
    stranger.serve("t", 3, 4)
    with caplog.at_level(logging.ERROR):
        for _ in range(4):
            collects(stranger)
    refusal = stranger.sharing.refused(stranger.sharing.publish("t", keys(3, 4)))
    assert refusal and "agentstate pages claim" in refusal
    assert stranger.tier.sent.keys() <= {"mark"} and len(there(node)) == 2
    node.round()
    assert node.restores(1, 2)
    stores.claim(stranger.database, stranger.guard, URL)
    stranger.round(LATER_S)
    assert stranger.sharing._access.refusal is None
    stranger.round()
    assert stranger.restores(3, 4)


def test_a_share_that_is_not_mounted_is_not_used(node: Node, make_node: MakeNode, place: places.Place) -> None:
    """The next process finds it empty."""
    node.publish("s", 1, 2)
    marked = node.store_id
    place.remove(MARK)
    for row in rows(node.database):
        place.remove(row.name)
    node = restarted(node, make_node)
    for _ in range(2):
        node.round(LATER_S)
        assert node.finds(1, 2) == 0 and node.sharing._access.refusal and not node.tier.sent["publish"]
    assert node.shared_tokens("s") == 2 * PAGE_SIZE and not any(row.doomed_us for row in rows(node.database))
    place.put(MARK, marked.encode())
    node.round(LATER_S)
    assert node.sharing._access.refusal is None and node.finds(1, 2) == 2


def test_what_is_erased_while_the_store_does_not_answer_at_a_start_goes_later(
    node: Node, other: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQL says which store it was."""
    node.publish("s", 1, 2)
    down = TierUnavailable("down")
    monkeypatch.setattr(Fragile, "mark", lambda *_: _failed(down))
    again = node.restarted()
    try:
        again.round()
        assert again.finds(1, 2) == 2
        erased(again, "s", 1, 2)
    finally:
        again.close()
    assert all(row.doomed_us for row in rows(other.database)) and again.tier.sent["drop"] == 0
    collects(other)
    assert there(other) == set()


def _failed(error: Exception) -> Future[str | None]:
    failed = Future[str | None]()
    failed.set_exception(error)
    return failed


# The thread


@pytest.mark.parametrize("what", ["publish", "read", "list", "drop", "sweep"])
def test_close_does_not_wait_for_a_store_that_hangs(node: Node, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hung = threading.Event()
    node.publish("gone", 7)
    forget(node, "gone")
    collects(node)
    age(node.database, LATER_S)

    def hangs(kind: str, name: str) -> bool:
        if kind == what:
            hung.set()
        return kind == what

    node.tier.hangs = hangs
    if what in ("publish", "read"):
        node.serve("s", 1, 2)
        node.sharing.publish("s", keys(1, 2))
    else:
        node.now_s += LATER_S
    node.sharing.start()
    assert hung.wait(WAIT_S)
    closing = threading.Thread(target=node.sharing.close, daemon=True)
    closing.start()
    closing.join(WAIT_S)
    assert not closing.is_alive()


def test_the_thread_outlasts_what_fails(node: Node, other: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread, "FOLLOW_S", 0.01)
    node.database.down = True
    node.sharing.start()
    node.stores.write(keys(1, 2))
    node.sharing.publish("s", keys(1, 2))
    until(lambda: node.sharing._failing)
    node.database.down = False
    node.serve("s", 1, 2)
    until(lambda: node.shared_tokens("s") == 2 * PAGE_SIZE)
    other.round()
    assert other.restores(1, 2)


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)
