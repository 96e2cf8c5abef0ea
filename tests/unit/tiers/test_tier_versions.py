"""Extents of every version side by side, as stores of other settings have written them: whatever is done with one, its
pages stay what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from contents import MARK, content, expected, key, keys, read, reader_for, write
from shares import PATIENCE_S, Share

from agentstate.pages import Geometry, LayerwiseReader, PageStore, PosixBackend, RowMemory, RowReader, inventory
from agentstate.pages.codec import Codec
from agentstate.pages.files import read_header
from agentstate.pages.handles import FileHandle
from agentstate.pages.rows import ARRIVED
from agentstate.tiers import SharedExtents, StoreKeys
from agentstate.tiers.pages import Listed, SharedPages

GEOMETRIES = {
    "latent": Geometry(layers=3, page_size=16, component_bytes=(16 * 656,)),
    "keys and values": Geometry(layers=2, page_size=8, component_bytes=(8192, 4096)),
}
EACH = 5
PAGES = 3 * EACH


@pytest.fixture(params=GEOMETRIES)
def geometry(request: pytest.FixtureRequest) -> Geometry:
    return GEOMETRIES[request.param]


@pytest.fixture
def store(geometry: Geometry, tmp_path: Path) -> PageStore:
    """Closed again: versions 2, 4 and 5."""
    codecs: list[tuple[Codec, bool]] = [("raw", False), ("lossless", False), ("lossless", True)]
    for number, (codec, rows) in enumerate(codecs):
        store = PageStore(tmp_path / "store", MARK, geometry, codec=codec, rows=rows)
        write(store, keys(*range(number * EACH, (number + 1) * EACH)), owner="somebody")
        store.close()
    assert versions(store) == [2, 4, 5]
    return store


def paths(store: PageStore) -> list[Path]:
    return sorted((store.directory / "extents").iterdir())


def versions(store: PageStore) -> list[int]:
    return [path.read_bytes()[8] for path in paths(store)]


def assert_right(store: PageStore, *pages: int) -> None:
    reader = reader_for(store.geometry)
    with store.pin(keys(*pages)) as pin:
        assert read(reader, [pin]) == expected(store.geometry, [pin])
    reader.close()


def assert_rows_right(geometry: Geometry, reader: RowReader, pin: object) -> None:
    size = geometry.page_size
    to = RowMemory([np.zeros((PAGES * size, n_bytes // size), np.uint8) for n_bytes in geometry.component_bytes])
    to = to._replace(first=np.arange(PAGES, dtype=np.int64)[::-1] * size)
    assert to.first is not None
    with reader.open(pin) as stream:  # type: ignore[arg-type]
        chosen = stream.read(1, np.arange(0, PAGES * size, 7), to).result(PATIENCE_S)
        rest = stream.rest(1, to).result(PATIENCE_S)
    assert len(chosen.rows) + len(rest.rows) == PAGES * size and np.all(rest.states == ARRIVED)
    for array, component in zip(to.arrays, range(len(geometry.component_bytes)), strict=True):
        for page, first in enumerate(to.first.tolist()):
            assert array[first : first + size].tobytes() == content(geometry, key(page), 1, component)
    reader.close()


@pytest.mark.parametrize("rows", [False, True])
def test_they_are_opened_read_adopted_erased_from_and_repaired(
    geometry: Geometry, store: PageStore, rows: bool, tmp_path: Path
) -> None:
    store = PageStore(store.directory, MARK, geometry, rows=rows)
    assert store.stats.bytes == sum(path.stat().st_size for path in paths(store))
    assert_right(store, *range(PAGES))
    assert_rows_right(geometry, RowReader(geometry), store.pin(keys(*range(PAGES))))
    held = RowReader(geometry, open_extent=lambda *of: FileHandle(PosixBackend(), *of, held=True))
    assert_rows_right(geometry, held, store.pin(keys(*range(PAGES))))
    other = PageStore(tmp_path / "other", MARK, geometry, codec="lossless", rows=rows)
    assert all(other.adopt(path, read_header(path).keys) for path in paths(store))
    assert other.stats.bytes == store.stats.bytes
    store.close()
    erased = [EACH * number + 1 for number in range(3)]
    assert other.erase(keys(*erased))
    left = [page for page in range(PAGES) if page not in erased]
    assert_right(other, *left)
    other.close()
    assert versions(other) == [5 if rows else 4] * 3
    for path in paths(other):
        at, _ = read_header(path).component_range(1, 0, 0, 1)
        with path.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 1]))
    assert inventory.repair(other.directory, list(inventory.check(other.directory))) == 3
    assert all(report.good for report in inventory.check(other.directory))
    other = PageStore(other.directory, MARK, geometry)
    assert_right(other, *[page for page in left if page % EACH])
    other.close()


@pytest.mark.parametrize("codec, published", [("raw", [2, 4, 5]), ("lossless", [4, 4, 4])])
@pytest.mark.parametrize("signed", [False, True])
def test_they_are_published_and_read_from_there(
    geometry: Geometry, store: PageStore, codec: Codec, published: list[int], signed: bool, tmp_path: Path
) -> None:
    share = Share(tmp_path / "share")
    extents = SharedExtents(share.guard, StoreKeys("k" * 32) if signed else None, codec)
    pages = SharedPages(tmp_path / "index", extents, MARK, geometry)
    listed = []
    for number, path in enumerate(paths(store), 1):
        of = extents.publish(path, "rank0").result(PATIENCE_S)
        header = extents.header(of.name, of.n_bytes).result(PATIENCE_S)
        listed.append(Listed(number, of.name, of.n_bytes, header.owner, header.keys))
    assert [share.path(of).read_bytes()[8] for of in listed] == published
    pages.enter(listed)
    reader = LayerwiseReader(geometry, staging_bytes=1 << 20, threads=2, open_extent=pages.open)
    with pages.pin(keys(*range(PAGES))) as pin:
        assert read(reader, [pin]) == expected(geometry, [pin])
    assert_rows_right(geometry, RowReader(geometry, open_extent=pages.open), pages.pin(keys(*range(PAGES))))
    reader.close()
    pages.close()
    share.close()
