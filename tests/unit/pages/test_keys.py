"""Keys in one piece behave like a list of them, and a chain is found an extent at a time where a page at a time finds
it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import lmdb
import pytest
from contents import MARK, drop, key, keys, write
from hypothesis import given, settings
from hypothesis import strategies as st

from agentstate.pages import Geometry, PageKeys, PageStore
from agentstate.pages.index import PageIndex, Run

TINY = Geometry(layers=1, page_size=1, component_bytes=(8,))


@given(st.lists(st.binary(min_size=32, max_size=32), max_size=6), st.data())
def test_packed_keys_are_a_sequence_of_them(plain: list[bytes], data: st.DataObject) -> None:
    packed = PageKeys.of(plain)
    assert (list(packed), len(packed)) == (plain, len(plain))
    assert packed == plain and packed == tuple(plain) and packed == PageKeys(b"".join(plain))
    assert packed != [*plain, bytes(32)] and packed != PageKeys.of([*plain, bytes(32)])
    assert PageKeys.from_hex([one.hex() for one in plain]) == packed
    part = data.draw(st.slices(len(plain)))
    assert packed[part] == plain[part]
    for at in range(-len(plain), len(plain)):
        assert packed[at] == plain[at]
    with pytest.raises(IndexError):
        packed[len(plain)]
    with pytest.raises(IndexError):
        packed[-len(plain) - 1]


def test_keys_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="keys have 32 bytes"):
        PageKeys.of([bytes(31), bytes(33)])
    with pytest.raises(ValueError, match="33 bytes of keys are no whole keys"):
        PageKeys(bytes(33))
    for texts in (["00" * 31, "00" * 33], ["0" * 63], ["zz" * 32]):
        with pytest.raises(ValueError):
            PageKeys.from_hex(texts)


# Which pages are written together, an extent after the other: pages come again, also within one extent.
_EXTENTS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), max_size=5)
_PAGES = st.lists(st.integers(0, 10), max_size=14)


@settings(deadline=None, max_examples=150)
@given(_EXTENTS, st.sets(st.integers(0, 9), max_size=2), _PAGES)
def test_an_extent_at_a_time_is_found_what_is_found_a_page_at_a_time(
    extents: list[list[int]], dropped: set[int], pages: list[int]
) -> None:
    """Holes, pages that were dropped or written again, and several extents with the same pages."""
    with TemporaryDirectory() as directory:
        store = PageStore(Path(directory), MARK, TINY)
        for extent in extents:
            write(store, keys(*extent))
        for page in dropped:
            drop(store, key(page))
        chain = keys(*pages)
        places = store._index.places(chain)
        known = {page for extent in extents for page in extent} - dropped
        assert [place is not None for place in places] == [page in known for page in pages]
        assert store.stored(chain) == [page in known for page in pages]
        length = next((at for at, page in enumerate(pages) if page not in known), len(pages))
        assert store.prefix_length(chain) == length
        with store.pin(chain[:length]) as pin:
            found = [
                (segment.extent.number, segment.slot + page)
                for segment in pin.segments
                for page in range(segment.pages)
            ]
            assert found == places[:length]
            assert [segment.first for segment in pin.segments] == [
                sum(before.pages for before in pin.segments[:at]) for at in range(len(pin.segments))
            ]
        if length < len(pages):
            with pytest.raises(KeyError) as error:
                store.pin(chain)
            assert error.value.args == (chain[length],)
        store.close()


def test_what_is_dropped_and_cannot_be_written_to_the_index_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = PageStore(tmp_path, MARK, TINY)
    write(store, keys(1, 2, 3, 4))

    def full(self: PageIndex) -> None:
        raise lmdb.DiskError("no space")

    monkeypatch.setattr(PageIndex, "change", full)
    drop(store, key(3))
    assert store.prefix_length(keys(1, 2, 3, 4)) == 2
    assert store.stored(keys(1, 2, 3, 4)) == [True, True, False, True]
    monkeypatch.undo()
    store.close()


def test_lists_that_are_missing_or_of_other_keys_are_not_believed(tmp_path: Path) -> None:
    index = PageIndex(tmp_path / "index", MARK, TINY)
    with index.change() as change:
        for number, first in ((1, 0), (2, 4), (3, 8)):
            change.put(number, {key(first + slot): slot for slot in range(4)})
        change.list_keys(2, PageKeys.of(keys(4, 5, 99, 7)))
        change.list_keys(3, PageKeys.of(keys(10, 11)))
    looked_up = index.runs(PageKeys.of(keys(*range(12))))
    assert looked_up == [Run(1, 0, 4, 0), Run(2, 0, 4, 4), Run(3, 0, 4, 8)]
    assert index.runs(PageKeys.of(keys(*range(12))), whole=lambda number: True) == looked_up
    with index.change() as change:
        change.forget(2)
    index.close()


def test_an_extent_of_an_earlier_release_is_looked_up_by_page(tmp_path: Path) -> None:
    store = PageStore(tmp_path, MARK, TINY)
    write(store, keys(1, 2, 3))
    with store._index._env.begin(write=True) as txn:
        txn.drop(store._index._lists, delete=False)
    assert store.prefix_length(keys(1, 2, 3, 4)) == 3
    store.close()


def test_a_wrong_page_is_not_found_again_whatever_is_counted(tmp_path: Path) -> None:
    store = PageStore(tmp_path, MARK, TINY)
    write(store, keys(1, 2, 3))
    with store._index.change() as change:
        change.delete(key(2))
    assert store.prefix_length(keys(1, 2, 3)) == 3
    store.drop([(key(2), 1)])
    assert store.prefix_length(keys(1, 2, 3)) == 1
    store.close()


def test_whole_extents_are_one_look_up_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PageStore(tmp_path, MARK, TINY)
    for first in (0, 100):
        write(store, keys(*range(first, first + 100)))
    chain = keys(*range(200))
    asked: list[int] = []
    is_whole = store._is_whole
    monkeypatch.setattr(store, "_is_whole", lambda number: asked.append(number) or is_whole(number))
    assert store.prefix_length(chain) == 200
    assert asked == [1, 2]
    drop(store, key(150))
    asked.clear()
    assert store.prefix_length(chain) == 150
    assert asked == [1, *[2] * 50]
    store.close()
