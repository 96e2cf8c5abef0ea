"""What a store says of pages that leave it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from contents import MARK, MHA, drop, key, keys, write

from agentstate.pages import Changes, PageStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PageStore]:
    store = PageStore(tmp_path / "rank0", MARK, MHA)
    store.changes = Changes()
    yield store
    store.close()


def taken(store: PageStore) -> list[bytes] | None:
    assert store.changes is not None
    found = store.changes.take()
    return None if found is None else sorted(found)


def test_nothing_is_noted_of_pages_that_stay(store: PageStore) -> None:
    write(store, keys(1, 2, 3))
    write(store, keys(2), version=1)
    assert taken(store) == []
    assert all(store.stored(keys(1, 2, 3)))


def test_evicted_pages_are_noted_but_for_those_that_another_extent_has(store: PageStore) -> None:
    write(store, keys(1, 2, 3))
    write(store, keys(2, 4))
    store.need([key(4)])
    assert store.collect()
    assert taken(store) == sorted(keys(1, 3))
    assert store.stored(keys(1, 2, 3, 4)) == [False, True, False, True]
    assert taken(store) == []


def test_dropped_and_removed_pages_are_noted(store: PageStore) -> None:
    write(store, keys(1, 2, 3, 4))
    assert drop(store, key(2)) == 1
    assert taken(store) == [key(2)]
    assert store.remove(keys(3, 9)) == 1
    assert taken(store) == [key(3)]


def test_it_may_be_any_page_where_that_cannot_be_told(store: PageStore) -> None:
    write(store, keys(1, 2))
    (extent,) = (store.directory / "extents").iterdir()
    extent.write_bytes(b"\0" * extent.stat().st_size)
    assert store.collect()
    assert taken(store) is None
    write(store, keys(3))
    shutil.rmtree(store.directory)
    store.attend()
    assert taken(store) is None
    assert taken(store) == []


def test_too_many_are_any() -> None:
    changes = Changes(most_keys=3)
    changes.note(keys(1, 2))
    changes.note(keys(3))
    assert changes.take() == keys(1, 2, 3)
    changes.note(keys(1, 2))
    changes.note(keys(3, 4))
    changes.note(keys(5))
    assert changes.take() is None
    changes.note(keys(6))
    assert changes.take() == keys(6)
