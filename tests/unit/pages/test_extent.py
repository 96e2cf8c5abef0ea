from __future__ import annotations

import mmap
import os
from pathlib import Path

import msgpack
import numpy as np
import pytest
import xxhash
from contents import MARK, MHA, MLA, WIDE, expected, key, keys, read, reader_for, write
from hypothesis import given
from hypothesis import strategies as st

from agentstate.errors import BadExtent, UnknownFormat
from agentstate.pages import ExtentDraft, ExtentHeader, Geometry, PageStore, handles
from agentstate.pages.extent import ALIGNMENT, FORMAT_VERSION, PREFIX, ExtentLayout, block_seed, checksum, page_seed
from agentstate.pages.keys import PageKeys

TINY = Geometry(layers=2, page_size=1, component_bytes=(20, 12))


def sealed(
    geometry: Geometry, pages: list[bytes], owner: str = "", *, rows: bool = False
) -> tuple[ExtentHeader, bytes]:
    buffer = mmap.mmap(-1, 1 << 20)
    header, data = ExtentDraft(MARK, geometry, pages, buffer, owner, rows=rows).seal()
    return header, bytes(data)


def sealed_blocks(pages: int) -> tuple[ExtentHeader, list[list[np.ndarray]]]:
    """An extent whose blocks have four pages: its header, and the components of each layer."""
    geometry = Geometry(layers=2, page_size=1, component_bytes=(300_000, 262_144))
    assert geometry.block_pages == 4
    draft = ExtentDraft(MARK, geometry, keys(*range(pages)), mmap.mmap(-1, 16 << 20))
    layers = [[draft.component(layer, component) for component in range(2)] for layer in range(2)]
    draw = np.random.default_rng(0)
    for rows in layers:
        for component in rows:
            component[:] = draw.integers(0, 256, component.shape, dtype=np.uint8)
    return draft.seal()[0], layers


def with_header(**changes: object) -> bytes:
    """A header whose digest is right and whose fields are not."""
    raw = sealed(TINY, keys(1, 2))[1]
    packed = raw[PREFIX.size : PREFIX.size + PREFIX.unpack_from(raw)[2]]
    fields = {**msgpack.unpackb(packed), **changes}
    packed = msgpack.packb({name: value for name, value in fields.items() if value is not None})
    return PREFIX.pack(b"AGSEXTNT", FORMAT_VERSION, len(packed), xxhash.xxh3_64_intdigest(packed)) + packed


def test_layers_are_summed_up_as_they_are_filled_or_when_all_are() -> None:
    drafts = [ExtentDraft(MARK, MHA, keys(1, 2, 3), mmap.mmap(-1, 1 << 20)) for _ in range(2)]
    for layer in range(MHA.layers):
        for draft in drafts:
            for component in range(len(MHA.component_bytes)):
                draft.component(layer, component)[:] = layer + component + 1
        if layer != 1:
            drafts[0].sum_up(layer)
    assert bytes(drafts[0].seal()[1]) == bytes(drafts[1].seal()[1])


@pytest.mark.parametrize("geometry", [MHA, MLA, WIDE], ids=["MHA", "MLA", "WIDE"])
def test_a_header_says_what_was_sealed(geometry: Geometry) -> None:
    header, data = sealed(geometry, keys(1, 2, 3))
    found = ExtentHeader.decode(data, "x")
    assert (found.fingerprint, found.geometry, found.keys) == (MARK, geometry, tuple(keys(1, 2, 3)))
    assert found.layout == header.layout
    assert np.array_equal(found.checksums, header.checksums)
    assert found.layout.file_bytes == len(data)


@pytest.mark.parametrize("geometry", [MHA, MLA, WIDE], ids=["MHA", "MLA", "WIDE"])
def test_a_layer_is_one_aligned_range_component_by_component(geometry: Geometry) -> None:
    header, _ = sealed(geometry, keys(1, 2, 3))
    ends = []
    for layer in range(geometry.layers):
        at = header.layout.component_range(layer, 0, 0, 3)[0]
        assert at % ALIGNMENT == 0
        assert not ends or at - ends[-1] < ALIGNMENT
        for component in range(len(geometry.component_bytes)):
            start, length = header.layout.component_range(layer, component, 0, 3)
            assert (start, length) == (at, 3 * geometry.component_bytes[component])
            at += length
        ends.append(at)
    assert header.layout.file_bytes - ends[-1] < ALIGNMENT


@given(
    layers=st.integers(1, 70),
    sizes=st.lists(st.integers(1, 70_000), min_size=1, max_size=3),
    page_size=st.sampled_from([1, 64, 300]),
    pages=st.integers(1, 300),
)
def test_the_room_for_a_header_is_known_before_its_contents(
    layers: int, sizes: list[int], page_size: int, pages: int
) -> None:
    geometry = Geometry(layers, page_size, tuple(sizes))
    header = ExtentHeader.blank(b"\xff" * 32, geometry, PageKeys(b"\xff" * 32 * pages))
    header.checksums[:] = header.block_checksums[:] = 2**64 - 1
    room = ExtentLayout(geometry, pages).data_offset
    assert len(header.encode()) <= room
    assert room - len(header.encode()) < ALIGNMENT


@given(layers=st.integers(1, 70), pages=st.integers(1, 300), owner=st.text(max_size=200))
def test_a_name_in_the_header_moves_the_pages_only_where_it_does_not_fit_before_them(
    layers: int, pages: int, owner: str
) -> None:
    geometry = Geometry(layers, 64, (100,))
    bare = ExtentLayout(geometry, pages).data_offset
    header = ExtentHeader.blank(MARK, geometry, PageKeys(b"\xff" * 32 * pages), owner)
    encoded = header.encode()
    layout = header.layout
    assert layout.data_offset == bare + (ALIGNMENT if len(encoded) > bare else 0)
    # Releases that do not know of owners read the one and leave the other alone.
    assert PREFIX.unpack_from(encoded)[1] == (3 if len(encoded) > bare else 2)
    found = ExtentHeader.decode(encoded.ljust(layout.data_offset, b"\0"), "x")
    assert (found.owner, found.layout, found.keys) == (owner, layout, header.keys)


def test_a_name_is_bounded() -> None:
    buffer = mmap.mmap(-1, 1 << 20)
    assert ExtentDraft(MARK, TINY, keys(1), buffer, "ü" * 512).seal()[0].owner == "ü" * 512
    with pytest.raises(ValueError, match="1024 bytes at most"):
        ExtentDraft(MARK, TINY, keys(1), buffer, "ü" * 513)


@pytest.mark.parametrize("owner", [7, ["a"], b"a", "a" * 1025])
def test_an_owner_that_is_no_name_is_damage(owner: object) -> None:
    with pytest.raises(BadExtent):
        ExtentHeader.decode(with_header(owner=owner), "one.ext")


def test_what_the_memory_held_before_does_not_get_into_the_file() -> None:
    buffer = mmap.mmap(-1, 1 << 16)
    buffer.write(b"\xa5" * len(buffer))
    draft = ExtentDraft(MARK, TINY, keys(1), buffer)
    for layer in range(TINY.layers):
        for component in range(2):
            draft.component(layer, component)[:] = 0
    _, data = draft.seal()
    assert b"\xa5" * 4 not in bytes(data)


def test_a_draft_needs_a_buffer_that_is_large_enough() -> None:
    with pytest.raises(ValueError, match="does not fit a buffer of 4096"):
        ExtentDraft(MARK, TINY, keys(1), mmap.mmap(-1, 4096))


def test_a_checksum_covers_which_page_and_which_layer_it_is() -> None:
    parts = [[b"k" * 20], [b"v" * 12]]
    sums = {
        checksum(page_seed(mark, page), layer, parts)
        for mark in (MARK, bytes(32))
        for page in keys(1, 2)
        for layer in range(2)
    }
    assert len(sums) == 8
    assert checksum(page_seed(MARK, key(1)), 0, parts[::-1]) not in sums
    assert checksum(page_seed(MARK, key(1)), 0, [[b"k" * 7, b"k" * 13], [b"v" * 11, b"v"]]) in sums


def test_a_block_has_a_sum_of_its_own_that_covers_which_pages_it_has() -> None:
    seeds = {block_seed(MARK, keys(*pages)) for pages in ((1, 2), (2, 1), (1,), (1, 2, 3))}
    assert len(seeds) == 4
    header, _ = sealed_blocks(11)
    assert header.blocks() == [range(4), range(4, 8), range(8, 11)]
    assert len({int(value) for value in header.block_checksums.flatten()}) == 6


@pytest.mark.usefixtures("read_by")
@pytest.mark.parametrize("first, last", [(0, 11), (0, 4), (3, 9), (5, 6), (8, 11), (1, 12)])
@pytest.mark.parametrize("cut", [[], [1], [2, 3, 4]])
def test_the_pages_that_are_wrong_are_found_in_blocks_and_in_parts_of_them(
    first: int, last: int, cut: list[int]
) -> None:
    header, layers = sealed_blocks(11)
    missing = [11] if last > 11 else []

    def found(layer: int, rows: list[np.ndarray]) -> list[int]:
        return list(header.wrong_slots(layer, first, [np.split(component[first:last], cut) for component in rows]))

    for layer, rows in enumerate(layers):
        rows = [np.concatenate([component, component[:1]]) for component in rows]
        assert found(layer, rows) == missing
        assert found(1 - layer, rows) == list(range(first, min(last, 11))) + missing
        for slot in range(11):
            for component in range(2):
                rows[component][slot, 5] ^= 0x20
                assert found(layer, rows) == [slot] * (first <= slot < last) + missing
                rows[component][slot, 5] ^= 0x20


@pytest.mark.usefixtures("read_by")
@pytest.mark.parametrize("geometry", [MHA, MLA, TINY], ids=["MHA", "MLA", "TINY"])
def test_every_sector_has_a_sum_that_covers_where_it_is(geometry: Geometry) -> None:
    """As docs/extent-format.md says."""
    pages = keys(1, 2, 3, 4, 5)
    header, data = sealed(geometry, pages, owner="somebody", rows=True)
    layout = header.layout
    assert PREFIX.unpack_from(data)[1] == 5 and len(data) == layout.file_bytes
    found = ExtentHeader.decode(data, "x")
    assert (found.rows, found.layout, found.owner) == (True, layout, "somebody")
    seed = xxhash.xxh3_64_intdigest(MARK + b"".join(pages))
    sectors = layout.slab_bytes // 4096
    begin = layout.data_offset + geometry.layers * layout.slab_bytes
    sums = np.frombuffer(data, dtype="<u8", count=geometry.layers * sectors, offset=begin)
    for number, value in enumerate(sums.tolist()):
        at = layout.data_offset + 4096 * number
        assert value == xxhash.xxh3_64_intdigest(data[at : at + 4096], seed=(seed + number) % (1 << 64))
    assert not any(data[begin + 8 * len(sums) :]) and len(data) % 4096 == 0
    # But for the version and one field, what is before the sums is what it is without them.
    plain, without = sealed(geometry, pages, owner="somebody")
    slabs = geometry.layers * layout.slab_bytes
    assert without[plain.layout.data_offset :] == data[layout.data_offset :][:slabs]


def test_a_file_says_whether_its_rows_can_be_read_alone() -> None:
    for geometry, pages in ((TINY, 1), (MLA, 400), (WIDE, 3)):
        for rows in (False, True):
            layout = ExtentLayout(geometry, pages, "somebody", rows)
            for behind in (0, 1, 4095):
                assert ExtentLayout.of_file(geometry, pages, "somebody", layout.file_bytes + behind) == layout


def test_sectors_of_another_size_are_refused() -> None:
    header, data = sealed(TINY, keys(1), rows=True)
    packed = msgpack.unpackb(data[PREFIX.size : PREFIX.size + PREFIX.unpack_from(data)[2]])
    for value, error in ((512, UnknownFormat), (None, BadExtent)):
        packed["planes"][0]["sector_bytes"] = value
        if value is None:
            del packed["planes"][0]["sector_bytes"]
        raw = msgpack.packb(packed)
        prefix = PREFIX.pack(b"AGSEXTNT", 5, len(raw), xxhash.xxh3_64_intdigest(raw))
        with pytest.raises(error):
            ExtentHeader.decode(prefix + raw, "x")


def test_another_version_is_refused_and_named() -> None:
    raw = bytearray(sealed(TINY, keys(1))[1])
    raw[8] = 6
    with pytest.raises(UnknownFormat, match="one.ext: format version 6; this release reads 2 to 5"):
        ExtentHeader.decode(raw, "one.ext")


@pytest.mark.parametrize("length", [0, 1, PREFIX.size - 1, PREFIX.size, PREFIX.size + 10])
def test_a_header_that_ends_too_early_is_refused(length: int) -> None:
    with pytest.raises(BadExtent, match=r"^one\.ext: "):
        ExtentHeader.decode(sealed(TINY, keys(1))[1][:length], "one.ext")


@pytest.mark.parametrize(
    "name", ["fingerprint", "page_size", "layers", "planes", "keys", "checksum", "checksums", "block_checksums"]
)
def test_a_header_that_misses_a_field_is_refused(name: str) -> None:
    with pytest.raises(BadExtent, match="x: "):
        ExtentHeader.decode(with_header(**{name: None}), "x")


@pytest.mark.parametrize("name", ["layers", "planes", "keys", "checksum", "checksums", "block_checksums"])
@pytest.mark.parametrize("value", [7.5, "text"])
def test_a_header_with_a_field_of_another_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(BadExtent, match="x: "):
        ExtentHeader.decode(with_header(**{name: value}), "x")


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 3},
        {"fingerprint": MARK[:-1]},
        {"fingerprint": "f" * 32},
        {"keys": b"".join(keys(1, 2, 3))},
        {"checksums": bytes(31)},
        {"block_checksums": bytes(32)},
        {"checksum": "crc32"},
        {"planes": []},
        {"planes": [{"codec": "zstd", "components": [20, 12]}]},
        {"planes": [{"codec": "raw"}]},
        {"planes": [{"codec": "raw", "components": [0, 12]}]},
        pytest.param(
            {"keys": b"".join(keys(1, 2))[:-1]},
        ),
    ],
    ids=[
        "layers",
        "short fingerprint",
        "fingerprint",
        "keys",
        "checksums",
        "block_checksums",
        "checksum",
        "no plane",
        "codec",
        "no components",
        "an empty component",
        "cut keys",
    ],
)
def test_a_header_whose_fields_do_not_fit_each_other_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(BadExtent, match="x: "):
        ExtentHeader.decode(with_header(**changes), "x")


@given(st.binary(max_size=200))
def test_no_bytes_make_decoding_fail_otherwise(raw: bytes) -> None:
    prefix = PREFIX.pack(b"AGSEXTNT", FORMAT_VERSION, len(raw), xxhash.xxh3_64_intdigest(raw))
    for header in (raw, prefix + raw):
        with pytest.raises(BadExtent):
            ExtentHeader.decode(header, "x")


@pytest.mark.usefixtures("read_by")
def test_no_flipped_byte_yields_a_wrong_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of the file in turn: the extent is refused when it is opened, or the page is found to be wrong, or
    the byte was padding and the pages are right. What is served is never wrong."""
    pages = keys(1, 2)
    store = PageStore(tmp_path, MARK, TINY)
    write(store, pages)
    (path,) = (tmp_path / "extents").iterdir()
    original = path.read_bytes()
    # The damage lies in the page cache, from where it is read: no disk has to be waited for.
    monkeypatch.setattr(handles, "open_direct", lambda path, flags: os.open(path, flags))
    reader = reader_for(TINY, 32 << 10)
    outcomes = {"refused": 0, "found": 0, "harmless": 0}
    with path.open("r+b", buffering=0) as file, store.pin(pages) as pin:
        right = expected(TINY, [pin])
        for position, byte in enumerate(original):
            for mask in (1 << position % 8, 0xFF):
                os.pwrite(file.fileno(), bytes([byte ^ mask]), position)
                found = read(reader, [pin])
                assert found.keys() == right.keys()
                wrong = {place for place in right if found[place] != right[place]}
                assert all(found[place] is None for place in wrong), position
                refused = len(wrong) == len(right)
                outcomes["refused" if refused else "found" if wrong else "harmless"] += 1
            os.pwrite(file.fileno(), bytes([byte]), position)
    reader.close()
    store.close()
    header = ExtentHeader.decode(original, "x")
    assert outcomes["found"] == 2 * len(pages) * TINY.page_bytes
    assert outcomes["refused"] == 2 * len(header.encode())


def test_no_flipped_byte_of_a_header_gets_into_the_index(tmp_path: Path) -> None:
    store = PageStore(tmp_path, MARK, TINY)
    write(store, keys(1, 2))
    store.close()
    (path,) = (tmp_path / "extents").iterdir()
    original = path.read_bytes()
    for position in range(0, len(ExtentHeader.decode(original, "x").encode()), 7):
        path.write_bytes(original[:position] + bytes([original[position] ^ 0x40]) + original[position + 1 :])
        damaged = PageStore(tmp_path, MARK, TINY)
        assert (damaged.stats.bad_extents, damaged.stats.pages, damaged.prefix_length(keys(1))) == (1, 0, 0)
        damaged.close()


@pytest.mark.usefixtures("read_by")
def test_bytes_of_another_page_or_layer_are_found_to_be_wrong(tmp_path: Path) -> None:
    store = PageStore(tmp_path, MARK, WIDE)
    write(store, keys(1, 2))
    (path,) = (tmp_path / "extents").iterdir()
    raw = path.read_bytes()
    layout = store.pin(keys(1)).segments[0].extent.layout
    requests = [store.pin(keys(1, 2))]
    right = expected(WIDE, requests)
    here, length = layout.component_range(0, 1, 0, 1)
    for layer, page in [(0, 1), (1, 0)]:
        there = layout.component_range(layer, 1, page, 1)[0]
        swapped = bytearray(raw)
        swapped[here : here + length] = raw[there : there + length]
        swapped[there : there + length] = raw[here : here + length]
        path.write_bytes(swapped)
        reader = reader_for(WIDE, chunk_bytes=1)  # a page a chunk
        found = read(reader, requests)
        reader.close()
        assert {place for place in right if found[place] is None} == {(0, 0, 0), (0, layer, page)}
        assert all(found[place] == right[place] for place in right if found[place] is not None)
    store.close()
