"""Pages of a shared store: looked up in memory, and read like those of a drive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import places
import pytest

from agentstate.pages import Changes, LayerwiseReader, PageKeys, PageStore, Pin
from agentstate.pages.testing.pages import MARK, MHA, expected, key, keys, read, write
from agentstate.tiers import Guard, SharedExtents, StoreKeys
from agentstate.tiers.pages import Listed, SharedPages
from agentstate.tiers.testing.conformance import PATIENCE_S
from agentstate.tiers.testing.conformance import read as read_bytes

Publish = Callable[..., Listed]


@pytest.fixture(params=["directory", "objects"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> places.Place:
    if request.param == "objects":
        return places.in_memory()
    (tmp_path / "share").mkdir()
    return places.Directory(tmp_path / "share")


@pytest.fixture(params=["raw", "lossless"])
def extents(place: places.Place, request: pytest.FixtureRequest) -> Iterator[SharedExtents]:
    with Guard(place.open(), "the share") as tier:
        yield SharedExtents(tier, StoreKeys("k" * 32), request.param)


@pytest.fixture
def pages(extents: SharedExtents, tmp_path: Path) -> Iterator[SharedPages]:
    pages = SharedPages(tmp_path / "shared", extents, MARK, MHA)
    yield pages
    pages.close()


@pytest.fixture
def reader(pages: SharedPages) -> Iterator[LayerwiseReader]:
    reader = LayerwiseReader(MHA, staging_bytes=1 << 20, threads=2, chunk_bytes=1 << 16, open_extent=pages.open)
    yield reader
    reader.close()


@pytest.fixture
def publish(extents: SharedExtents, tmp_path: Path) -> Iterator[Publish]:
    """Publishes an extent of some pages, as another node does, and tells what the catalogue says of it."""
    store = PageStore(tmp_path / "another node", MARK, MHA)
    published: list[Listed] = []

    def publish(*contents: int, owner: str = "") -> Listed:
        before = set((store.directory / "extents").iterdir())
        write(store, keys(*contents), owner=owner)
        (path,) = set((store.directory / "extents").iterdir()) - before
        of = extents.publish(path, "rank0").result(PATIENCE_S)
        listed = Listed(len(published) + 1, of.name, of.n_bytes, owner, PageKeys.of(keys(*contents)))
        published.append(listed)
        return listed

    yield publish
    store.close()


def assert_right(reader: LayerwiseReader, pin: Pin) -> None:
    assert read(reader, [pin]) == expected(MHA, [pin])


def unusable(reader: LayerwiseReader, pages: SharedPages, chain: Sequence[bytes]) -> set[int]:
    with reader.open(pages.pin(chain)) as stream:
        return set().union(*(chunk.unusable() for chunk in stream))


def test_what_was_entered_is_found_and_comes_back_byte_by_byte(
    pages: SharedPages, reader: LayerwiseReader, publish: Publish
) -> None:
    chain = keys(1, 2, 3, 4, 5)
    assert pages.prefix_length(chain) == 0 and pages.stored(chain) == [False] * 5
    pages.enter([publish(1, 2, 3), publish(4, owner="somebody")])
    assert pages.prefix_length(chain) == 4 and pages.stored(chain) == [True] * 4 + [False]
    assert pages.prefix_length(keys(9, 1)) == 0 and pages.stored(keys(9, 1)) == [False, True]
    assert_right(reader, pages.pin(chain[:4]))
    # From the middle of one extent to the next.
    assert_right(reader, pages.pin(chain[1:4]))
    with pytest.raises(KeyError) as missing:
        pages.pin(chain)
    assert missing.value.args == (key(5),)


def test_what_has_left_is_not_found_and_a_second_copy_of_it_is(
    pages: SharedPages, reader: LayerwiseReader, publish: Publish
) -> None:
    first, second = publish(1, 2, 3), publish(2, 3, 4)
    pages.enter([first, second])
    pages.enter([first])
    assert pages.extents == 2 and pages.ids() == {first.id, second.id}
    pages.leave([first.id])
    assert pages.stored(keys(1, 2, 3, 4)) == [False, True, True, True]
    assert_right(reader, pages.pin(keys(2, 3, 4)))
    pages.leave([second.id, second.id + 1])
    assert not any(pages.stored(keys(1, 2, 3, 4))) and pages.extents == 0


def test_what_a_page_takes_is_told(pages: SharedPages, publish: Publish) -> None:
    assert pages.page_bytes == 0
    some, others = publish(1, 2), publish(3, 4, 5)
    pages.enter([some, others])
    assert pages.pages == 5 and pages.page_bytes == (some.n_bytes + others.n_bytes) / 5
    pages.enter([some])
    pages.leave([others.id])
    assert pages.pages == 2 and pages.page_bytes == some.n_bytes / 2
    pages.leave([some.id, others.id])
    assert pages.pages == pages.page_bytes == 0


def test_an_extent_that_is_not_there_is_reported_once_and_not_asked_for_again(
    pages: SharedPages, reader: LayerwiseReader, publish: Publish, place: places.Place
) -> None:
    there, gone = publish(1), publish(2)
    pages.enter([there, gone])
    place.remove(gone.name)
    assert unusable(reader, pages, keys(1, 2)) == {1}
    assert pages.take_missing() == [gone.id] and pages.take_missing() == []
    assert pages.stored(keys(1, 2)) == [True, False]
    pages.enter([gone])
    assert pages.stored(keys(1, 2)) == [True, False]


def test_wrong_bytes_are_not_used_and_their_extent_is_not_asked_for_again(
    pages: SharedPages, reader: LayerwiseReader, publish: Publish, place: places.Place, extents: SharedExtents
) -> None:
    good, bad = publish(1, 2), publish(3, 4, 5)
    pages.enter([good, bad])
    header = extents.header(bad.name, bad.n_bytes).result(PATIENCE_S)
    right = _object(extents, bad)
    data = bytearray(right)
    data[header.component_range(1, 0, 1, 1)[0]] ^= 1
    place.put(bad.name, bytes(data))
    pin = pages.pin(keys(1, 2, 3, 4, 5))
    with reader.open(pin) as stream:
        wrong = {page for chunk in stream for page in chunk.wrong}
    assert wrong == {3}
    assert pages.drop(pin.copies(wrong)) == 1
    assert pages.stored(keys(1, 2, 3, 4, 5)) == [True, True, False, False, False]
    assert pages.ids() == {good.id, bad.id}
    pages.enter([bad])
    assert pages.stored(keys(3)) == [False]
    # Later, it may have been the way here.
    place.put(bad.name, bytes(right))
    pages.again()
    assert pages.ids() == {good.id}
    pages.enter([bad])
    pin = pages.pin(keys(1, 2, 3, 4))
    with reader.open(pin) as stream:
        assert not any(chunk.wrong for chunk in stream)


@pytest.mark.parametrize("damage", ["header", "another", "cut", "unsigned"])
def test_an_object_that_is_not_the_extent_gives_no_page(
    pages: SharedPages,
    reader: LayerwiseReader,
    publish: Publish,
    place: places.Place,
    extents: SharedExtents,
    damage: str,
) -> None:
    listed, other = publish(1, 2), publish(3, 4)
    pages.enter([listed])
    data = _object(extents, listed)
    place.put(
        listed.name,
        {
            "header": bytes([data[0] ^ 1]) + data[1:],
            "another": _object(extents, other),
            "cut": data[: len(data) // 2],
            "unsigned": data[:-1] + bytes([data[-1] ^ 1]),
        }[damage],
    )
    assert unusable(reader, pages, keys(1, 2)) == {0, 1}
    # It is there, and may be right for others: nobody is told to delete it.
    assert pages.take_missing() == []


def test_a_catalogue_that_lies_gives_no_page(pages: SharedPages, reader: LayerwiseReader, publish: Publish) -> None:
    listed = publish(1, 2)
    pages.enter([listed._replace(keys=PageKeys.of(keys(2, 1)))])
    assert unusable(reader, pages, keys(2, 1)) == {0, 1}


def test_nothing_is_known_of_pages_while_the_store_does_not_answer(
    pages: SharedPages, reader: LayerwiseReader, publish: Publish, extents: SharedExtents
) -> None:
    pages.enter([publish(1)])
    extents.tier.close()
    with reader.open(pages.pin(keys(1))) as stream:
        chunks = list(stream)
    assert not any(chunk.wrong for chunk in chunks) and all(chunk.unread for chunk in chunks)
    assert pages.take_missing() == [] and pages.stored(keys(1)) == [True]


def _object(extents: SharedExtents, listed: Listed) -> bytes:
    return read_bytes(extents.tier, listed.name, 0, listed.n_bytes)


def test_it_says_which_pages_come_and_go(pages: SharedPages, publish: Publish) -> None:
    pages.changes = changes = Changes()
    first, second = publish(1, 2, 3), publish(3, 4)
    pages.enter([first, second])
    assert set(changes.take() or ()) == set(keys(1, 2, 3, 4))
    pages.enter([first])
    assert changes.take() == []
    pages.leave([first.id])
    # Where to look: one of them has another place.
    assert set(changes.take() or ()) == set(keys(1, 2, 3))
    assert pages.stored(keys(1, 2, 3, 4)) == [False, False, True, True]
    with pages.pin(keys(4)) as pin:
        pages.drop(pin.copies([0]))
    assert set(changes.take() or ()) == set(keys(3, 4))
