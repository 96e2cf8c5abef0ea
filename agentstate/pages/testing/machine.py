"""Random histories of a page store against a model in plain Python.

`PageStoreMachine` writes, pins, reads, merges, evicts, drops, crashes and opens again. `LinkedStoreMachine` adds a
store beside it, with which it has files in common. `DamagedStoreMachine` adds what a disk and its administrator do:
flipped bits, lost extents, an index older or newer than the extents.
A store of another kind is tested by deriving from the first and overriding `open`.

The model knows which pages must be found (``stored``), what must be read from them (``versions``), and of which nothing
can be said but that they are right or refused (``suspect``).
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agentstate.errors import PageStoreFull
from agentstate.pages import Geometry, PageStore, Pin, Quota, Segment, inventory, merge
from agentstate.pages.extent import ExtentHeader
from agentstate.pages.files import read_header
from agentstate.pages.inventory import ExtentReport
from agentstate.pages.space import UNLIMITED
from agentstate.pages.testing.pages import MARK, content, drop, keys, read, reader_for, traces, write

GEOMETRY = Geometry(layers=2, page_size=4, component_bytes=(300, 200))
POOL = keys(*range(20))
HOUR_S = 3600.0
OWNERS = ("", "tenant a", "tenant b")

_SOME = st.lists(st.sampled_from(POOL), min_size=1, max_size=7, unique=True)
_ONE = st.sampled_from(POOL)


@dataclass
class _Pinned:
    """A pin, and the version of each of its pages at that time: None where it could not be said."""

    pin: Pin
    versions: list[int | None]


class PageStoreMachine(RuleBasedStateMachine):
    """What holds for a store whose disk is sound."""

    parent: Path | None = None
    """Where the stores are made: a directory that is fast to sync."""

    def open(self, directory: Path, quota: Quota) -> PageStore:
        return PageStore(directory, MARK, GEOMETRY, quota)

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=self.parent))
        self.places = (self.root / str(number) for number in count())
        self.numbers = count(1)
        self.quota = UNLIMITED
        self.store = self.open(next(self.places), self.quota)
        self.reader = reader_for(GEOMETRY)
        self.pins: list[_Pinned] = []
        self.stored: set[bytes] = set()
        self.written: dict[bytes, list[int]] = {page: [] for page in POOL}
        self.suspect: set[bytes] = set()
        # Whose the extent is that each page lies in.
        self.owners: dict[bytes, str] = {}
        self.retained: set[bytes] = set()
        self.needed: set[bytes] = set()
        # An extent stays pinned when its pinned pages were written anew.
        self.timed_pins_linger = False
        # False once the disk was changed behind the store's back, until it is opened again.
        self.disk_is_known = True

    def teardown(self) -> None:
        self.let_go()
        self.store.close()
        self.reader.close()
        left = [target for target in self.descriptors() if target.startswith(str(self.root))]
        assert not left, left
        shutil.rmtree(self.root)

    def found(self) -> set[bytes]:
        return {page for page in POOL if page in self.store}

    def descriptors(self) -> list[str]:
        targets = []
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(FileNotFoundError):
                targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return targets

    def versions(self, pages: Iterable[bytes]) -> list[int | None]:
        return [None if page in self.suspect else self.written[page][-1] for page in pages]

    def verified(self, pin: Pin, versions: list[int | None]) -> set[bytes]:
        """Read all of a pin, and say which of its pages may not be used; those that may are as they were written."""
        wrong: set[int] = set()
        got: dict[int, list[list[bytes]]] = {page: [] for page in range(len(pin.keys))}
        for (_, layer, page), components in read(self.reader, [pin]).items():
            if components is None:
                wrong.add(page)
            else:
                got[page].append([bytes([layer]), *components])
        for page, (key, version) in enumerate(zip(pin.keys, versions, strict=True)):
            if page in wrong:
                assert version is None, f"page {key.hex()} was refused, and nothing was done to it"
                continue
            allowed = self.written[key] if version is None else [version]
            assert got[page] in [_layers(key, one) for one in allowed], f"page {key.hex()} is not as it was written"
        return {pin.keys[page] for page in wrong}

    def losing(self, act: Callable[[], object], *, again: Iterable[bytes] = ()) -> PageStoreFull | KeyError | None:
        """Do what may evict pages, or drop suspect ones: as many are lost as the store says, and none that is
        pinned. Those that are written ``again`` may be among the evicted and are found all the same."""
        stats, kept = self.store.stats, self.kept() - set(again)
        evicted, dropped = stats.pages_evicted, stats.pages_dropped
        failure = None
        try:
            act()
        except (PageStoreFull, KeyError) as error:
            failure = error
        lost = self.stored - self.found()
        evicted, dropped = stats.pages_evicted - evicted, stats.pages_dropped - dropped
        assert len(lost) <= evicted + dropped <= len(lost) + len(self.stored & set(again))
        assert dropped <= len(lost & self.suspect)
        assert not (lost & kept) - self.suspect, "pinned, and evicted all the same"
        self.forget(lost)
        return failure

    def forget(self, pages: set[bytes]) -> None:
        for of_pages in (self.stored, self.retained, self.needed, self.suspect):
            of_pages -= pages

    def kept(self) -> set[bytes]:
        """The pages that may not be evicted: by a pin of theirs, or by one of what lies beside them."""
        pinned = {segment.extent.path for one in self.pins for segment in one.pin.segments}
        return self.retained | {page for page in self.stored if self.path(page) in pinned}

    def path(self, page: bytes) -> Path:
        with self.store.pin([page]) as pin:
            return pin.segments[0].extent.path

    def reopened(self, directory: Path) -> None:
        self.store = self.open(directory, self.quota)
        self.retained, self.needed = set(), set()
        self.timed_pins_linger, self.disk_is_known = False, True

    @initialize(pages=st.lists(_SOME, max_size=3))
    def start_with(self, pages: list[list[bytes]]) -> None:
        for some in pages:
            self.write(some)

    @rule(pages=_SOME, owner=st.sampled_from(OWNERS))
    def write(self, pages: list[bytes], owner: str = "") -> None:
        version = next(self.numbers)
        before, stored = self.store.stats.pages_written, set(self.stored)
        failure = self.losing(lambda: write(self.store, pages, version, owner), again=pages)
        if failure is not None:
            assert self.quota.max_bytes is not None and isinstance(failure, PageStoreFull)
            assert self.store.stats.pages_written == before
            assert self.stored == stored, "evicted pages and wrote none for it"
            return
        for page in pages:
            self.written[page].append(version)
        self.suspect -= set(pages)
        self.stored |= set(pages)
        self.owners |= dict.fromkeys(pages, owner)
        assert self.quota.max_bytes is None or self.store.stats.bytes <= self.quota.max_bytes
        assert self.store.stats.pages_written == before + len(pages)

    @rule(pages=_SOME)
    def look_up(self, pages: list[bytes]) -> None:
        assert self.store.prefix_length(pages) == len(list(takewhile(self.stored.__contains__, pages)))
        assert self.store.stored(pages) == [page in self.stored for page in pages]

    @rule(pages=_SOME)
    def read_and_drop_what_is_wrong(self, pages: list[bytes]) -> None:
        pages = [page for page in pages if page in self.stored]
        with self.store.pin(pages) as pin:
            wrong = self.verified(pin, self.versions(pages))
            copies = pin.copies(page for page, key in enumerate(pages) if key in wrong)
        assert self.store.drop(copies) == len(wrong)
        self.forget(wrong)

    @rule(page=_ONE)
    def drop(self, page: bytes) -> None:
        before = self.store.stats.pages_dropped
        drop(self.store, page)
        assert self.store.stats.pages_dropped == before + (page in self.stored)
        self.forget({page})

    @rule(pages=_SOME)
    def pin(self, pages: list[bytes]) -> None:
        missing = [page for page in pages if page not in self.stored]
        try:
            pinned = self.store.pin(pages)
        except KeyError as error:
            assert error.args == (missing[0],)
        else:
            assert not missing
            self.pins.append(_Pinned(pinned, self.versions(pages)))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def read_what_is_pinned(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.pins))
        self.verified(one.pin, one.versions)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def close_a_pin(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.pins))
        self.pins.remove(one)
        one.pin.close()

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def drop_what_is_pinned(self, data: st.DataObject) -> None:
        """A copy that has been written anew or merged since stays."""
        pin = data.draw(st.sampled_from(self.pins)).pin
        pinned = {(pin.keys[page], segment.extent.path) for segment in pin.segments for page in _pages(segment)}
        dropped = {page for page, path in pinned if page in self.stored and self.path(page) == path}
        assert self.store.drop(pin.copies(range(len(pin.keys)))) == len(dropped)
        self.forget(dropped)

    @rule(pages=_SOME)
    def erase(self, pages: list[bytes]) -> None:
        pinned = {page for one in self.pins for page in one.pin.keys}
        beside = {segment.extent.path for one in self.pins for segment in one.pin.segments}
        erased: list[bool] = []
        self.erasing(pages, lambda: erased.append(self.store.erase(pages)))
        if not pinned and not beside:
            assert erased == [True]
        if erased == [True]:
            versions = [version for page in pages for version in self.written[page]]
            assert traces(self.store.directory, GEOMETRY, pages, versions) == set()

    def erasing(self, pages: list[bytes], act: Callable[[], object]) -> None:
        before, stored = self.store.stats.pages_erased, self.stored & set(pages)
        self.stored -= stored
        assert self.losing(act) is None
        assert self.store.stats.pages_erased == before + len(stored)
        self.forget(stored)

    def let_go(self) -> None:
        for one in self.pins:
            one.pin.close()
        self.pins = []

    @rule(pages=st.lists(_ONE, min_size=2, max_size=12, unique=True), range_bytes=st.sampled_from([600, 2000, 1 << 20]))
    def merge(self, pages: list[bytes], range_bytes: int) -> None:
        chain = [page for page in pages if page in self.stored]
        buffer = mmap.mmap(-1, 1 << 16)
        # KeyError: writing what was merged of a chain's beginning may evict its end.
        failure = self.losing(lambda: merge(self.store, self.reader, chain, buffer, range_bytes))
        assert failure is None or self.quota.max_bytes is not None

    @rule(max_bytes=st.none() | st.integers(0, 12).map(lambda extents: 12288 * extents), n_bytes=st.integers(0, 60_000))
    def make_room(self, max_bytes: int | None, n_bytes: int) -> None:
        self.quota = self.store.quota = Quota(max_bytes)
        stored, stats = set(self.stored), self.store.stats
        failure = self.losing(lambda: self.store.make_room(n_bytes))
        if failure is not None:
            assert self.stored == stored, "evicted pages and made no room"
            if self.disk_is_known and not self.timed_pins_linger:
                pinned = {segment.extent.path for one in self.pins for segment in one.pin.segments}
                fixed = sum(size for path, size in self.sizes().items() if path in pinned)
                assert max_bytes is not None and fixed + n_bytes > max_bytes
        else:
            assert max_bytes is None or stats.bytes + n_bytes <= max_bytes or not stats.extents

    @rule(pages=_SOME)
    def retain(self, pages: list[bytes]) -> None:
        retained = self.store.retain(pages, time.monotonic() + HOUR_S)
        self.retained |= self.stored & set(pages[:retained])
        self.timed_pins_linger = True

    @rule(pages=_SOME)
    def release(self, pages: list[bytes]) -> None:
        self.store.release(pages)

    @rule()
    def end_retaining(self) -> None:
        assert self.store.retain(POOL, 0) == len(POOL)
        self.retained, self.timed_pins_linger = set(), False

    @rule(pages=_SOME, only=st.booleans())
    def need(self, pages: list[bytes], only: bool) -> None:
        with self.store.needing_only() if only else nullcontext():
            self.store.need(pages)
        self.needed = self.stored & (set(pages) | (set() if only else self.needed))

    @rule()
    def collect(self) -> None:
        needed, before = set(self.needed), self.store.stats.bytes
        freed: list[int] = []
        self.losing(lambda: freed.append(self.store.collect()))
        assert needed <= self.stored | self.suspect
        assert [before - self.store.stats.bytes] == freed

    @rule()
    def reopen(self) -> None:
        self.let_go()
        self.store.close()
        self.reopened(self.store.directory)

    @rule()
    def crash(self) -> None:
        """What is on the disk now is what the next process finds; nothing is closed."""
        before, directory = self.store, next(self.places)
        shutil.copytree(before.directory, directory)
        self.reopened(directory)
        for one in self.pins:
            one.pin.close()
        self.pins = []
        before.close()
        shutil.rmtree(before.directory)

    def headers(self) -> dict[Path, ExtentReport]:
        """The extents that the store can read, by their paths."""
        extents = list(inventory.extents(self.store.directory))
        return {report.path: report for report in extents if report.header is not None}

    def sizes(self) -> dict[Path, int]:
        return {path: report.n_bytes for path, report in self.headers().items()}

    def paths(self, pages: Iterable[bytes]) -> set[Path]:
        return {self.path(page) for page in pages}

    @invariant()
    def exactly_what_is_stored_is_found(self) -> None:
        assert self.found() == self.stored
        assert self.store.stats.pages == len(self.stored)

    @invariant()
    def the_disk_holds_what_the_store_says(self) -> None:
        if not self.disk_is_known:
            return
        sizes, stats = self.sizes(), self.store.stats
        assert (stats.extents, stats.bytes) == (len(sizes), sum(sizes.values()))
        pinned = {segment.extent.path for one in self.pins for segment in one.pin.segments}
        assert set(sizes) == self.paths(self.stored) | pinned, "an extent that serves nothing is left"
        assert not list((self.store.directory / "partial").iterdir())

    @invariant()
    def every_page_is_its_writers(self) -> None:
        headers = self.headers()
        for page in self.stored - self.suspect:
            with self.store.pin([page]) as pin:
                extent = pin.segments[0].extent
            header = headers[extent.path].header
            assert header is not None and header.owner == extent.owner == self.owners[page]

    @invariant()
    def no_extent_is_left_open(self) -> None:
        assert not [target for target in self.descriptors() if target.endswith((".ext", ".spare"))]


class LinkedStoreMachine(PageStoreMachine):
    """What holds while a store ``beside`` this one, with room for one extent, has some of its files in common with
    it."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = self.open_beside()
        # The version of each page that the store beside may have.
        self.theirs: dict[bytes, int] = {}

    def open_beside(self) -> PageStore:
        return self.open(self.root / "beside", Quota(12288))

    def teardown(self) -> None:
        self.beside.close()
        super().teardown()

    @rule(pages=_SOME, owner=st.sampled_from(OWNERS))
    def write_beside(self, pages: list[bytes], owner: str) -> None:
        version = next(self.numbers)
        write(self.beside, pages, version, owner)
        self.theirs |= dict.fromkeys(pages, version)

    @rule(pages=_SOME)
    def adopt(self, pages: list[bytes]) -> None:
        for page in pages:
            if (header := _serving(self.beside, page)) is not None:
                self.adopt_one(_path(self.beside, page), header)

    def adopt_one(self, path: Path, header: ExtentHeader) -> None:
        adopted: list[bool] = []
        failure = self.losing(lambda: adopted.append(self.store.adopt(path, header.keys)), again=header.keys)
        assert adopted == ([] if isinstance(failure, PageStoreFull) else [True])
        for key in header.keys if adopted else ():
            self.written[key].append(self.theirs[key])
            self.suspect.discard(key)
            self.stored.add(key)
            self.owners[key] = header.owner

    @rule(pages=_SOME)
    def adopt_beside(self, pages: list[bytes]) -> None:
        for page in pages:
            if (header := _serving(self.store, page)) is not None:
                versions = self.versions(header.keys)
                assert self.beside.adopt(self.path(page), header.keys)
                self.theirs |= {key: version for key, version in zip(header.keys, versions, strict=True) if version}

    @rule(pages=_SOME)
    def erase_beside(self, pages: list[bytes]) -> None:
        assert self.beside.erase(pages)
        versions = {version for page in pages for version in [*self.written[page], self.theirs.get(page, 0)]}
        assert traces(self.beside.directory, GEOMETRY, pages, sorted(versions)) == set()

    @rule()
    def reopen_beside(self) -> None:
        self.beside.close()
        self.beside = self.open_beside()

    @invariant()
    def what_is_beside_is_as_it_was_written(self) -> None:
        there = [page for page in POOL if page in self.beside]
        with self.beside.pin(there) as pin:
            found = read(self.reader, [pin])
        for at, page in enumerate(there):
            layers = [[bytes([layer]), *(found[0, layer, at] or [])] for layer in range(GEOMETRY.layers)]
            assert layers == _layers(page, self.theirs[page])


def _path(store: PageStore, page: bytes) -> Path:
    with store.pin([page]) as pin:
        return pin.segments[0].extent.path


def _serving(store: PageStore, page: bytes) -> ExtentHeader | None:
    """The header of the extent that a page lies in, if that serves all of its pages."""
    if page not in store:
        return None
    header = read_header(path := _path(store, page))
    return header if all(key in store and _path(store, key) == path for key in header.keys) else None


class DamagedStoreMachine(PageStoreMachine):
    """What holds for `PageStore` on a disk that is not sound: what was touched is right or refused, and the rest is as
    if nothing had happened."""

    def __init__(self) -> None:
        super().__init__()
        # From the next opening, which looks at times and sizes alone.
        self.damage_is_hidden = False
        self.saved_index: Path | None = None
        self.saved_extents: Path | None = None

    def damage(self, path: Path) -> None:
        """Of the pages of an extent nothing can be said any more."""
        self.suspect |= {page for page in self.stored if self.path(page) == path}
        for one in self.pins:
            for segment in one.pin.segments:
                if segment.extent.path == path:
                    one.versions[segment.first : segment.first + segment.pages] = [None] * segment.pages

    @precondition(lambda self: self.stored)
    @rule(data=st.data(), keep_time=st.booleans(), header=st.booleans())
    def flip_a_bit(self, data: st.DataObject, keep_time: bool, header: bool) -> None:
        path = self.path(data.draw(st.sampled_from(sorted(self.stored))))
        if not path.exists() or not path.stat().st_size:
            return
        status = path.stat()
        self.damage(path)
        with path.open("r+b") as file:
            at = data.draw(st.integers(0, min(4095, status.st_size - 1) if header else status.st_size - 1))
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << data.draw(st.integers(0, 7))]))
        if keep_time:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            self.damage_is_hidden = True
        self.disk_is_known = False

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        path = self.path(data.draw(st.sampled_from(sorted(self.stored))))
        if path.exists():
            self.damage(path)
            os.truncate(path, data.draw(st.integers(0, path.stat().st_size)))
            self.disk_is_known = False

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def lose_an_extent(self, data: st.DataObject) -> None:
        path = self.path(data.draw(st.sampled_from(sorted(self.stored))))
        self.damage(path)
        path.unlink(missing_ok=True)
        self.disk_is_known = False

    def reopened(self, directory: Path) -> None:
        super().reopened(directory)
        self.disk_is_known = not self.damage_is_hidden
        found = self.found()
        assert self.stored - found <= self.suspect, "lost, and nothing was done to it"
        # What was dropped, evicted or superseded may be found again where the index forgot about that.
        self.suspect = (self.suspect & found) | (found - self.stored)
        self.stored = found

    def changed_while_closed(self, change: Callable[[], None]) -> None:
        self.let_go()
        self.store.close()
        change()
        self.reopened(self.store.directory)

    @property
    def index(self) -> Path:
        return self.store.directory / "index"

    @rule()
    def save_the_index(self) -> None:
        def save() -> None:
            self.saved_index = self.root / "index"
            shutil.rmtree(self.saved_index, ignore_errors=True)
            shutil.copytree(self.index, self.saved_index)

        self.changed_while_closed(save)

    @rule()
    def save_the_extents(self) -> None:
        def save() -> None:
            self.saved_extents = self.root / "extents"
            shutil.rmtree(self.saved_extents, ignore_errors=True)
            shutil.copytree(self.store.directory / "extents", self.saved_extents)

        self.changed_while_closed(save)

    @precondition(lambda self: self.saved_index)
    @rule()
    def bring_an_older_index_back(self) -> None:
        def bring() -> None:
            assert self.saved_index is not None
            shutil.rmtree(self.index)
            shutil.copytree(self.saved_index, self.index)

        self.changed_while_closed(bring)

    @precondition(lambda self: self.saved_extents)
    @rule()
    def bring_older_extents_back(self) -> None:
        """The index is newer than the extents then."""
        assert self.saved_extents is not None
        saved = {(path.name, path.stat().st_mtime_ns) for path in self.saved_extents.iterdir()}
        for page in self.stored:
            path = self.path(page)
            if not path.exists() or (path.name, path.stat().st_mtime_ns) not in saved:
                self.suspect.add(page)

        def bring() -> None:
            assert self.saved_extents is not None
            shutil.rmtree(self.store.directory / "extents")
            shutil.copytree(self.saved_extents, self.store.directory / "extents")

        self.changed_while_closed(bring)

    @rule()
    def lose_the_index(self) -> None:
        self.changed_while_closed(lambda: shutil.rmtree(self.index))

    @rule(end=st.integers(0, 1 << 16))
    def truncate_the_index(self, end: int) -> None:
        def truncate() -> None:
            data = self.index / "data.mdb"
            os.truncate(data, min(end, data.stat().st_size))

        self.changed_while_closed(truncate)


def _pages(segment: Segment) -> range:
    return range(segment.first, segment.first + segment.pages)


def _layers(page: bytes, version: int) -> list[list[bytes]]:
    return [
        [bytes([layer]), *(content(GEOMETRY, page, layer, c, version) for c in range(len(GEOMETRY.component_bytes)))]
        for layer in range(GEOMETRY.layers)
    ]
