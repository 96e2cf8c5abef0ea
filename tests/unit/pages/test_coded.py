"""Extents whose pages are coded: what is promised of others, of them too."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import xxhash
from contents import MARK, WIDE, content, expected, key, keys, read, reader_for, write

from agentstate.errors import BadExtent, UnknownFormat
from agentstate.pages import (
    Destination,
    Geometry,
    LayerwiseReader,
    PageKeys,
    PageStore,
    PosixBackend,
    Quota,
    handles,
    inventory,
    merge,
    staging_memory,
)
from agentstate.pages.extent import ALIGNMENT, PREFIX, ExtentHeader
from agentstate.pages.files import opened, read_header
from agentstate.pages.handles import FileHandle
from agentstate.pages.recoding import coded_copy
from agentstate.pages.rewriting import read_pages
from agentstate.pages.space import UNLIMITED
from agentstate.pages.testing.conformance import PageStoreTests

pytestmark = pytest.mark.usefixtures("read_by")

# Of these, one page alone is smaller in a file if it is coded.
SMALL = Geometry(layers=2, page_size=1, component_bytes=(4000, 1202))


class TestCodedPageStore(PageStoreTests):
    def open(self, directory: Path, geometry: Geometry, quota: Quota = UNLIMITED) -> PageStore:
        return PageStore(directory, MARK, geometry, quota, codec="lossless")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PageStore]:
    store = PageStore(tmp_path / "store", MARK, SMALL, codec="lossless")
    yield store
    store.close()


def path_of(store: PageStore, page: object) -> Path:
    with store.pin(keys(page)) as pin:
        return pin.segments[0].extent.path


def assert_right(store: PageStore, *pages: object) -> None:
    reader = reader_for(store.geometry)
    with store.pin(keys(*pages)) as pin:
        assert read(reader, [pin]) == expected(store.geometry, [pin])
    reader.close()


def wrong_pages(store: PageStore, *pages: object) -> set[int]:
    """Those that may not be used; the others are right."""
    reader = reader_for(store.geometry)
    with store.pin(keys(*pages)) as pin:
        got, right = read(reader, [pin]), expected(store.geometry, [pin])
    reader.close()
    assert all(got[place] in (None, right[place]) for place in right)
    return {page for (_, _, page), components in got.items() if components is None}


def test_a_header_says_how_its_pages_are_coded(store: PageStore) -> None:
    write(store, keys(1, 2, 3), owner="somebody")
    path = path_of(store, 1)
    header = read_header(path)
    raw = path.read_bytes()
    assert (header.owner, header.keys, header.geometry) == ("somebody", PageKeys.of(keys(1, 2, 3)), SMALL)
    assert header.coding is not None and raw[8] == 4
    assert header.encode() == raw[: len(header.encode())]
    assert header.file_bytes == len(raw) < header.layout.file_bytes
    # Every page lies where the header says, and each of its bytes is known.
    ends = [header.data_offset]
    for layer in range(SMALL.layers):
        for component in range(2):
            for slot in range(3):
                start, length = header.component_range(layer, component, slot, 1)
                assert start == ends[-1]
                ends.append(start + length)
            assert header.component_range(layer, component, 0, 3) == (ends[-4], ends[-1] - ends[-4])
    assert raw[len(header.encode()) : header.data_offset].strip(b"\0") == raw[ends[-1] :].strip(b"\0") == b""
    assert len(raw) - ends[-1] < ALIGNMENT
    with opened(path) as file:
        for layer in range(SMALL.layers):
            for slot in range(3):
                parts = [np.zeros((1, size), dtype=np.uint8) for size in SMALL.component_bytes]
                read_pages(file, header, layer, slot, parts)
                assert [part.tobytes() for part in parts] == [content(SMALL, key(slot + 1), layer, c) for c in (0, 1)]


def test_what_would_be_no_smaller_is_written_as_before(tmp_path: Path) -> None:
    """Byte by byte."""
    noise = np.random.default_rng(0).integers(0, 256, (SMALL.layers, 2, 1, 4000), dtype=np.uint8)
    written = []
    for codec in ("raw", "lossless"):
        store = PageStore(tmp_path / codec, MARK, SMALL, codec=codec)  # type: ignore[arg-type]
        draft = store.draft(keys(1), staging_memory(store.draft_bytes(1)))
        for layer in range(SMALL.layers):
            for component, size in enumerate(SMALL.component_bytes):
                draft.component(layer, component)[:] = noise[layer, component, :, :size]
        store.publish(draft)
        written.append(path_of(store, 1).read_bytes())
        store.close()
    assert written[0] == written[1] and written[0][8] == 2


def test_a_copy_is_what_the_store_would_have_written(tmp_path: Path, store: PageStore) -> None:
    raw = PageStore(tmp_path / "raw", MARK, SMALL)
    for each in (raw, store):
        write(each, keys(1, 2, 3))
    with opened(path_of(raw, 1)) as file:
        copy = coded_copy(file, read_header(path_of(raw, 1)))
        assert copy is not None
        assert copy.read() == path_of(store, 1).read_bytes()
        copy.close()
    with opened(path_of(store, 1)) as file:
        assert coded_copy(file, read_header(path_of(store, 1))) is None, "it is coded already"
    raw.close()


def test_both_kinds_are_read_whatever_a_store_writes(tmp_path: Path) -> None:
    for number, codec in enumerate(["raw", "lossless", "raw"]):
        store = PageStore(tmp_path, MARK, SMALL, codec=codec)  # type: ignore[arg-type]
        write(store, keys(number))
        assert_right(store, *range(number + 1))
        assert store.stats.pages == number + 1
        store.close()
    assert [path.read_bytes()[8] for path in sorted((tmp_path / "extents").iterdir())] == [2, 4, 2]


def test_a_store_is_opened_again_with_its_coded_extents_as_the_index_knows_them(store: PageStore) -> None:
    write(store, keys(1, 2, 3))
    write(store, keys(2), version=1)
    used = {extent.number: extent for extent in store._extents.values()}
    store.close()
    again = PageStore(store.directory, MARK, SMALL)
    assert {number: (extent.live, extent.pages) for number, extent in again._extents.items()} == {1: (2, 3), 2: (1, 1)}
    assert again.stats.bytes == sum(extent.file_bytes for extent in used.values())
    assert_right(again, 1, 3)
    again.close()


def test_no_flipped_byte_yields_a_wrong_page(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    write(store, keys(1, 2))
    path = path_of(store, 1)
    original, header = path.read_bytes(), read_header(path)
    # The damage lies in the page cache, from where it is read: no disk has to be waited for.
    monkeypatch.setattr(handles, "open_direct", lambda path, flags: os.open(path, flags))
    reader = reader_for(SMALL, 32 << 10)
    assert header.coding is not None
    end = header.data_offset + header.coding.n_bytes
    encoded = len(header.encode())
    places = [*range(0, encoded, 3), *range(header.data_offset, end, 17), *range(end - 20, len(original), 301)]
    with path.open("r+b", buffering=0) as file, store.pin(keys(1, 2)) as pin:
        right = expected(SMALL, [pin])
        for at in places:
            os.pwrite(file.fileno(), bytes([original[at] ^ 1 << at % 8]), at)
            found = read(reader, [pin])
            wrong = {place for place in right if found[place] != right[place]}
            assert all(found[place] is None for place in wrong), at
            if at < encoded:
                assert len(wrong) == len(right), at
            elif at >= end:
                assert not wrong, at
            else:
                assert len(wrong) <= 1, at
            os.pwrite(file.fileno(), original[at : at + 1], at)
        assert read(reader, [pin]) == right
    reader.close()


def test_pages_that_are_cut_off_or_damaged_are_wrong_and_the_others_right(store: PageStore) -> None:
    write(store, keys(1, 2, 3))
    path = path_of(store, 1)
    offset, length = read_header(path).component_range(1, 0, 1, 1)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * length)
    assert wrong_pages(store, 1, 2, 3) == {1}
    assert [report.broken for report in inventory.check(store.directory)] == [(1,)]
    os.truncate(path, offset)
    assert wrong_pages(store, 1, 2, 3) == {0, 1, 2}
    (report,) = inventory.check(store.directory)
    assert report.damage is not None and "truncated" in report.damage


def test_what_is_damaged_is_repaired_and_the_rest_written_anew(store: PageStore) -> None:
    write(store, keys(1, 2, 3))
    path = path_of(store, 1)
    with path.open("r+b") as file:
        file.seek(read_header(path).component_range(0, 1, 2, 1)[0])
        file.write(b"other")
    store.close()
    assert inventory.repair(store.directory, list(inventory.check(store.directory))) == 1
    assert all(report.good for report in inventory.check(store.directory))
    again = PageStore(store.directory, MARK, SMALL, codec="lossless")
    assert again.stored(keys(1, 2, 3)) == [True, True, False]
    assert_right(again, 1, 2)
    again.close()


def test_the_usage_of_a_store_adds_up(store: PageStore) -> None:
    write(store, keys(1, 2, 3))
    write(store, keys(3), version=1)
    usage = inventory.usage(store.directory)
    extents = [path.stat().st_size for path in (store.directory / "extents").iterdir()]
    assert usage.live + usage.superseded + usage.overhead == sum(extents)
    assert usage.live < 3 * SMALL.page_bytes and usage.overhead > 0


def test_another_store_has_a_coded_extent_too(tmp_path: Path, store: PageStore) -> None:
    write(store, keys(1, 2))
    other = PageStore(tmp_path / "other", MARK, SMALL)
    assert other.adopt(path_of(store, 1), PageKeys.of(keys(1, 2)))
    assert other.stats.bytes == store.stats.bytes == path_of(other, 1).stat().st_size
    assert_right(other, 2, 1)
    other.close()


@pytest.mark.parametrize("pages", [range(12), range(3, 9)], ids=str)
def test_pages_are_decoded_straight_to_their_places(tmp_path: Path, pages: range) -> None:
    store = PageStore(tmp_path, MARK, WIDE, codec="lossless")
    write(store, keys(*range(5, 12)))
    write(store, keys(*range(5)))
    memory = staging_memory(2 * 2 * 24 * 8192).reshape(2, 2, 24, 8192)

    def rows(layer: int, some: range) -> list[list[np.ndarray]]:
        # Each row by itself, and in another order.
        return [[memory[layer, c, 23 - page][None] for page in some] for c in range(2)]

    reader = LayerwiseReader(WIDE, staging_bytes=1, threads=2)
    with reader.open(store.pin(keys(*range(12)))) as stream:
        stream.hurry([Destination(pages, rows)], wanted=[])
        chunks = list(stream)
    assert not any(chunk.unusable() for chunk in chunks)
    straight = [chunk for chunk in chunks if chunk.straight]
    assert 0 < sum(chunk.n_bytes for chunk in straight) < len(pages) * WIDE.page_bytes
    layer = straight[-1].layer
    for page in pages:
        for component in range(2):
            assert memory[layer, component, 23 - page].tobytes() == content(WIDE, key(page), layer, component)
    others = [row for row in range(24) if 23 - row not in pages]
    assert not memory[:, :, others].any()
    reader.close()
    store.close()


def test_a_slot_that_the_extent_does_not_have_is_wrong(store: PageStore) -> None:
    write(store, keys(1, 2))
    with store.pin(keys(1, 2)) as pin:
        extent = pin.segments[0].extent
        handle = FileHandle(PosixBackend(), extent)
        with pytest.raises(BadExtent):
            handle.read(pin.segments[0]._replace(slot=1), 0, staging_memory(1 << 16), 0)
        handle.close()


def test_coded_pages_are_not_read_to_device_memory(store: PageStore) -> None:
    """They are not lost either: another backend reads them."""

    class OnDevice(PosixBackend):
        def allocate(self, n_bytes: int) -> Any:
            memory = super().allocate(n_bytes)
            return memoryview(memory.data)

    write(store, keys(1))
    reader = LayerwiseReader(SMALL, staging_bytes=1 << 20, threads=1, backend=OnDevice())
    with reader.open(store.pin(keys(1))) as stream:
        chunks = list(stream)
    assert not any(chunk.wrong for chunk in chunks)
    assert {error.errno for chunk in chunks for _, error in chunk.unread} == {errno.EOPNOTSUPP}
    reader.close()


def with_plane(path: Path, **changes: object) -> bytes:
    """An extent's header, with another plane."""
    raw = path.read_bytes()
    fields = msgpack.unpackb(read_header(path).packed(), raw=False)
    fields["planes"][0] |= changes
    fields["planes"][0] = {name: value for name, value in fields["planes"][0].items() if value is not None}
    packed = msgpack.packb(fields, use_bin_type=True)
    return PREFIX.pack(raw[:8], 4, len(packed), xxhash.xxh3_64_intdigest(packed)) + packed


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"codec": "raw"}, UnknownFormat),
        ({"codec": "int8"}, UnknownFormat),
        ({"tables": (b"\3" + bytes(15)) * 4}, UnknownFormat),
        ({"tables": None}, BadExtent),
        ({"tables": bytes(63)}, BadExtent),
        ({"tables": bytes(64)}, BadExtent),
        ({"tables": 7}, BadExtent),
        ({"lengths": None}, BadExtent),
        ({"lengths": bytes(4 * 8)}, BadExtent),
        ({"lengths": b"\xff" * (4 * 8)}, BadExtent),
        ({"lengths": bytes(4 * 7)}, BadExtent),
        ({"lengths": "text"}, BadExtent),
        ({"components": [4000]}, BadExtent),
        ({"components": [4001, 1202]}, BadExtent),
    ],
)
def test_a_plane_that_cannot_be_is_refused(
    store: PageStore, changes: dict[str, object], error: type[BadExtent]
) -> None:
    write(store, keys(1, 2))
    path = path_of(store, 1)
    assert ExtentHeader.decode(with_plane(path), "x").file_bytes == path.stat().st_size
    with pytest.raises(BadExtent) as raised:
        ExtentHeader.decode(with_plane(path, **changes), "x")
    assert type(raised.value) is error


def test_a_header_that_says_more_is_refused(store: PageStore) -> None:
    """Pages begin behind it, and not where it would end without that."""
    write(store, keys(1, 2))
    path = path_of(store, 1)
    with pytest.raises(BadExtent, match="do not add up"):
        ExtentHeader.decode(with_plane(path, more=bytes(ALIGNMENT)), "x")


def test_memory_of_another_size_is_refused(store: PageStore) -> None:
    write(store, keys(1, 2, 3))
    with store.pin(keys(1, 2, 3)) as pin:
        handle = FileHandle(PosixBackend(), pin.segments[0].extent)
        arrays = [[np.zeros((3, size), dtype=np.uint8)] for size in SMALL.component_bytes]
        assert handle.read_to(arrays, pin.segments[0], 0).components == arrays
        for few in ([[arrays[0][0][:2]], [arrays[1][0][:2]]], [arrays[0], [arrays[1][0][:2]]], arrays[:1]):
            with pytest.raises(ValueError, match="no memory for 3 pages"):
                handle.read_to(few, pin.segments[0], 0)
        handle.close()


def test_small_extents_are_merged_and_erased_from(store: PageStore) -> None:
    for number in range(8):
        write(store, keys(number))
    reader = reader_for(SMALL)
    assert merge(store, reader, keys(*range(8)), staging_memory(store.draft_bytes(8)), SMALL.layer_bytes * 8) == 8
    reader.close()
    assert store.stats.extents == 1 and read_header(path_of(store, 0)).coding is not None
    assert store.erase(keys(3))
    assert_right(store, 0, 1, 2, 4, 5, 6, 7)
    assert read_header(path_of(store, 0)).coding is not None
