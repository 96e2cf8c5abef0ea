"""A store that another process has open."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from contents import MARK, MHA, MLA, expected, keys, read
from owning import StoreOwner as Owner

from agentstate.pages import Geometry, LayerwiseReader, PosixBackend, StoreView, fingerprint
from agentstate.pages.directory import StoreDirectory, Told, told


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "rank0"


@pytest.fixture
def own(directory: Path) -> Iterator[Callable[[], Owner]]:
    owners: list[Owner] = []

    def start() -> Owner:
        owners.append(Owner(directory))
        return owners[-1]

    yield start
    for owner in owners:
        owner.kill()


@pytest.fixture
def view(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreView]:
    monkeypatch.setattr("agentstate.pages.view._RETRY_S", 0.0)
    view = StoreView(directory, MARK, MLA)
    yield view
    view.close()


@pytest.fixture
def reader(view: StoreView) -> Iterator[LayerwiseReader]:
    opening = view.opening(PosixBackend())
    reader = LayerwiseReader(MLA, staging_bytes=1 << 22, threads=2, chunk_bytes=1 << 20, open_extent=opening)
    yield reader
    reader.close()


def test_what_the_owner_stores_is_found_at_once_and_comes_back_as_it_was_written(
    own: Callable[[], Owner], view: StoreView, reader: LayerwiseReader
) -> None:
    assert view.prefix_length(keys(1)) == 0, "nobody has it open"
    owner = own()
    assert view.stored(keys(1, 2)) == [False, False]
    owner("write(store, keys(1, 2), owner='tenant a')")
    owner("write(store, keys(4))")
    assert view.prefix_length(keys(1, 2, 3, 4)) == 2
    assert view.stored(keys(1, 2, 3, 4)) == [True, True, False, True]
    assert keys(4)[0] in view and keys(3)[0] not in view
    with view.pin(keys(4, 1, 2)) as pin:
        assert read(reader, [pin]) == expected(MLA, [pin])
    with pytest.raises(KeyError):
        view.pin(keys(1, 3))


def test_long_chains_are_found_in_whole_extents_and_in_part_of_one(own: Callable[[], Owner], view: StoreView) -> None:
    owner = own()
    owner("write(store, keys(*range(500)))")
    assert view.prefix_length(keys(*range(500))) == 500
    owner("drop(store, *keys(200))")
    assert view.prefix_length(keys(*range(500))) == 200
    assert view.stored(keys(*range(500))).count(False) == 1
    owner("write(store, keys(200, 201))")
    assert view.prefix_length(keys(*range(500))) == 500


@pytest.mark.parametrize("how", ["evict", "delete"])
def test_pages_that_leave_after_they_were_found_are_wrong(
    own: Callable[[], Owner], view: StoreView, reader: LayerwiseReader, how: str, directory: Path
) -> None:
    owner = own()
    owner("write(store, keys(1, 2))")
    pin = view.pin(keys(1, 2))
    if how == "evict":
        owner("store.collect()")
    else:
        shutil.rmtree(directory / "extents")
    assert set(read(reader, [pin]).values()) == {None}


def test_the_space_of_an_extent_that_is_being_read_is_not_overwritten(
    own: Callable[[], Owner], view: StoreView
) -> None:
    owner = own()
    owner("write(store, keys(*range(8)))")
    # With room for little of it, so that most of the second layer is read later than the first.
    opening = view.opening(PosixBackend())
    reader = LayerwiseReader(MLA, staging_bytes=1, threads=1, chunk_bytes=1, open_extent=opening)
    stream = reader.open(view.pin(keys(*range(8))))
    stream.hurry()
    assert not any(chunk.unusable() for chunk in stream.layer(0))
    # A store that has room for one extent of them.
    owner("setattr(store, 'quota', Quota(store.draft_bytes(8)))")
    owner("write(store, keys(*range(10, 18)))")
    assert view.stored(keys(0, 10)) == [False, True]
    assert not any(chunk.unusable() for chunk in stream.layer(1))
    stream.close()
    reader.close()


def test_another_extent_of_the_same_number_is_never_taken_for_the_one_that_was_found(
    own: Callable[[], Owner], view: StoreView, reader: LayerwiseReader, directory: Path
) -> None:
    owner = own()
    owner("write(store, keys(1, 2))")
    pin = view.pin(keys(1, 2))
    owner.kill()
    shutil.rmtree(directory)
    own()("write(store, keys(3, 4))")
    assert set(read(reader, [pin]).values()) == {None}
    assert view.stored(keys(1, 2, 3, 4)) == [False, False, True, True], "and the new store is read"


def test_a_store_without_an_owner_is_not_opened_and_one_that_was_made_anew_is(
    own: Callable[[], Owner], view: StoreView, directory: Path
) -> None:
    owner = own()
    owner("write(store, keys(1))")
    owner("store.close()")
    assert view.stored(keys(1)) == [False]
    owner.kill()
    own()
    assert view.stored(keys(1)) == [True]
    shutil.rmtree(directory)
    assert view.stored(keys(1)) == [False]


@pytest.mark.parametrize(("mark", "geometry"), [(fingerprint(model="another"), MLA), (MARK, MHA)])
def test_pages_of_another_model_or_layout_are_not_found_and_that_is_said_once(
    own: Callable[[], Owner],
    view: StoreView,
    directory: Path,
    mark: bytes,
    geometry: Geometry,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own()("write(store, keys(1))")
    other = StoreView(directory, mark, geometry)
    for _ in range(3):
        assert other.stored(keys(1)) == [False]
    other.close()
    records = [record for record in caplog.records if "another version" in record.getMessage()]
    assert len(records) == 1


def test_a_copy_that_was_wrong_is_hidden_until_there_is_another_or_its_owner_was_asked_for_it(
    own: Callable[[], Owner], view: StoreView
) -> None:
    owner = own()
    owner("write(store, keys(1, 2, 3))")
    with view.pin(keys(1, 2, 3)) as pin:
        copies = pin.copies([1])
    assert view.drop(copies) == 1 and view.drop(copies) == 0
    assert view.prefix_length(keys(1, 2, 3)) == 1
    assert view.stored(keys(1, 2, 3)) == [True, False, True]
    assert view.stats.pages_dropped == 1
    view.look_again(keys(2))
    assert view.prefix_length(keys(1, 2, 3)) == 3
    view.drop(copies)
    owner("drop(store, *keys(2))")
    assert view.stored(keys(2)) == [False]
    owner("write(store, keys(2))")
    assert view.prefix_length(keys(1, 2, 3)) == 3


def test_an_owner_tells_what_is_over_and_what_was_erased_as_long_as_it_lives(
    own: Callable[[], Owner], view: StoreView, directory: Path
) -> None:
    assert view.told() == Told()
    owner = own()
    assert view.told() == Told(True)
    owner("write(store, keys(1))")
    owner("store.conclude(3)")
    owner("store.remove(keys(1))")
    assert view.told() == Told(True, 3, 1)
    shutil.rmtree(directory)
    owner("store.attend()")
    assert told(directory) == Told(True, 3, 1), "its directory was made anew"
    owner.kill()
    assert view.told() == Told()
    own()
    assert view.told() == Told(True)


def test_what_a_process_had_told_is_not_told_by_the_next_one_while_it_opens_the_store(directory: Path) -> None:
    first, second = StoreDirectory(directory), StoreDirectory(directory)
    first.acquire()
    first.opened()
    first.tell(Told(True, 5, 1))
    assert told(directory) == Told(True, 5, 1)
    first.release()
    second.acquire()
    assert told(directory) == Told()
    second.opened()
    assert told(directory) == Told(True)
    second.release()
