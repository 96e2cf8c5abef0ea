"""Random histories of two stores that share their room, beside stores that other engines left, against a model in plain
Python that predicts every eviction.

Every extent holds one page: what is evicted next is then a list of pages. What extents of several pages do is told by
`agentstate.pages.testing.machine`.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentstate.errors import PageStoreFull
from agentstate.pages import Geometry, PageStore, Pin, Quota, Space, fingerprint
from agentstate.pages.testing.pages import drop, expected, keys, read, reader_for, write

GEOMETRIES = (Geometry(layers=2, page_size=4, component_bytes=(300, 200)), Geometry(1, 4, (9000,)))
MARKS = [fingerprint(pool=str(pool)) for pool in range(len(GEOMETRIES))]
POOL = keys(*range(8))

OWNERS = ("", "a", "b")

_OWNER = st.sampled_from(OWNERS)
_STORE = st.integers(0, len(GEOMETRIES) - 1)
_ONE = st.sampled_from(POOL)
_SOME = st.lists(_ONE, min_size=1, max_size=5, unique=True)


@dataclass(eq=False)
class _Page:
    """A stored page: whose it is, when it was used last, and who needs it."""

    owner: str
    used: float
    needed: bool = False
    released: bool = False
    retained: bool = False

    @property
    def turn(self) -> tuple[int, float]:
        return 0 if self.released else 2 if self.needed else 1, self.used


class SharedSpaceMachine(RuleBasedStateMachine):
    """Two stores within one quota, and any number of siblings."""

    parent: Path | None = None
    """Where the stores are made: a directory that is fast to sync."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(dir=self.parent))
        self.roots = (self.root / str(number) for number in count())
        self.readers = [reader_for(geometry) for geometry in GEOMETRIES]
        self.quota = Quota()
        self.limits: dict[str, int] = {}
        self.clock = count(1)
        self.others = count()
        self.pages: dict[tuple[int, bytes], _Page] = {}
        self.pins: list[tuple[int, Pin]] = []
        self.open(next(self.roots))

    def open(self, root: Path) -> None:
        self.place = root
        directories = [root / mark.hex()[:32] / "rank0" for mark in MARKS]
        # Room enough, or what is to be evicted would be evicted now.
        self.space = Space(Quota(), root, kin=directories)
        self.stores = [
            PageStore(directory, mark, geometry, space=self.space)
            for directory, mark, geometry in zip(directories, MARKS, GEOMETRIES, strict=True)
        ]
        self.space.quota = self.quota
        self.limit()
        self.sizes = [store.draft_bytes(1) for store in self.stores]

    def teardown(self) -> None:
        self.close()
        for reader in self.readers:
            reader.close()
        shutil.rmtree(self.root)

    def close(self) -> None:
        for _, pin in self.pins:
            pin.close()
        self.pins = []
        for store in self.stores:
            store.close()

    def own_bytes(self) -> int:
        return sum(self.sizes[store] for store, _ in self.pages)

    def sibling_bytes(self) -> int:
        own = {store.directory for store in self.stores}
        return sum(path.stat().st_size for path in self.place.glob("*/*/extents/*.ext") if path.parents[1] not in own)

    def limit(self) -> None:
        limits = dict(self.limits)
        self.space.limits = limits.get if limits else None

    def held(self) -> Counter[str]:
        held = Counter[str]()
        for (store, _), page in self.pages.items():
            held[page.owner] += self.sizes[store]
        return held

    def making_room(self, n_bytes: int, owner: str | None) -> tuple[list[tuple[int, bytes]], ...] | None:
        """What is to be evicted for so many bytes, because of their owner's limit and because of the quota, in order;
        None where there can be no room. What others left goes first, then what owners have beyond their limits."""
        pinned = {(store, page) for store, pin in self.pins for page in pin.keys}
        order = [
            name
            for name, page in sorted(self.pages.items(), key=lambda item: item[1].turn)
            if name not in pinned and not page.retained
        ]

        def taken(lacking: int, of: str | None = None) -> list[tuple[int, bytes]]:
            victims = []
            for name in [name for name in order if of is None or self.pages[name].owner == of]:
                if lacking <= 0:
                    break
                order.remove(name)
                victims.append(name)
                lacking -= self.sizes[name[0]]
            return victims

        def n_bytes_of(victims: list[tuple[int, bytes]]) -> int:
            return sum(self.sizes[store] for store, _ in victims)

        own: list[tuple[int, bytes]] = []
        if owner in self.limits:
            over = self.held()[owner] + n_bytes - self.limits[owner]
            own = taken(over, owner)
            if n_bytes_of(own) < over:
                return None
        victims: list[tuple[int, bytes]] = []
        if self.quota.max_bytes is not None:
            lacking = self.own_bytes() - n_bytes_of(own) + n_bytes - self.quota.max_bytes
            held = self.held()
            above = {one: held[one] - n_bytes_of(own) * (one == owner) - self.limits[one] for one in self.limits}
            for one in sorted(above, key=lambda one: (-above[one], one)):
                if held[one] > self.limits[one]:
                    victims += taken(min(above[one], lacking - n_bytes_of(victims)), one)
            victims += taken(lacking - n_bytes_of(victims))
            if n_bytes_of(victims) < lacking:
                return None
        return own, victims

    def checked(self, act: object, n_bytes: int, owner: str | None = None) -> bool:
        """Do what makes room, and see that it does as it should: whether there was room."""
        room, others, own_bytes = self.making_room(n_bytes, owner), self.sibling_bytes(), self.own_bytes()
        try:
            act()  # type: ignore[operator]
        except PageStoreFull:
            assert room is None, f"there was room without {room}"
            return False
        assert room is not None, "there was no room"
        own, victims = room
        for name in (*own, *victims):
            own_bytes -= self.sizes[name[0]] * (name in own)
            del self.pages[name]
        left = self.sibling_bytes()
        # What came to be left while there was room is seen when there is none.
        if self.quota.max_bytes is not None and own_bytes + n_bytes > self.quota.max_bytes:
            assert self.own_bytes() + n_bytes + left <= self.quota.max_bytes
        assert not (victims and left), "what others left goes first"
        assert left <= others
        return True

    @rule(store=_STORE, page=_ONE, owner=_OWNER)
    def write(self, store: int, page: bytes, owner: str) -> None:
        if (store, page) in self.pages:
            return
        if self.checked(lambda: write(self.stores[store], [page], owner=owner), self.sizes[store], owner):
            self.pages[store, page] = _Page(owner, next(self.clock))

    @rule(owner=_OWNER, extents=st.none() | st.integers(0, 5))
    def set_a_limit(self, owner: str, extents: int | None) -> None:
        self.limits.pop(owner, None)
        if extents is not None:
            self.limits[owner] = 12_288 * extents
        self.limit()

    @rule(extents=st.none() | st.integers(0, 12), n_bytes=st.integers(0, 60_000), store=_STORE)
    def make_room(self, extents: int | None, n_bytes: int, store: int) -> None:
        self.quota = self.space.quota = Quota(None if extents is None else 12_288 * extents)
        self.checked(lambda: self.stores[store].make_room(n_bytes), n_bytes)

    @rule(store=_STORE, pages=_SOME)
    def look_up(self, store: int, pages: list[bytes]) -> None:
        found = self.stores[store].prefix_length(pages)
        now = next(self.clock)
        for depth, page in enumerate(pages[:found]):
            self.pages[store, page].used = now - depth / 100
            self.pages[store, page].released = False
        assert found == len(pages) or (store, pages[found]) not in self.pages

    @rule(store=_STORE, pages=_SOME, only=st.booleans())
    def need(self, store: int, pages: list[bytes], only: bool) -> None:
        if only:
            with self.stores[store].needing_only():
                self.stores[store].need(pages)
        else:
            self.stores[store].need(pages)
        for (of, name), page in self.pages.items():
            if of == store:
                page.needed = name in pages or (page.needed and not only)
                page.released = page.released and name not in pages

    @rule(store=_STORE, pages=_SOME)
    def let_go(self, store: int, pages: list[bytes]) -> None:
        self.stores[store].release(pages)
        next(self.clock)
        for name in pages:
            if (page := self.pages.get((store, name))) is not None:
                page.released = not page.needed

    @rule(store=_STORE, pages=_SOME, ends=st.booleans())
    def retain(self, store: int, pages: list[bytes], ends: bool) -> None:
        until_s = 0.0 if ends else time.monotonic() + 3600
        before = [page for page in self.pages.values() if page.retained]
        found = self.stores[store].retain(pages, until_s)
        for name in pages[:found]:
            if (page := self.pages.get((store, name))) is not None:
                page.retained = not ends
        held = Counter[str]()
        for (of, _), page in self.pages.items():
            held[page.owner] += self.sizes[of] * page.retained
        # What was retained when there was more room stays so.
        if any(page.retained and page not in before for page in self.pages.values()):
            assert self.quota.max_bytes is None or held.total() <= self.quota.max_bytes / 2
            # Of owners whose pages have been retained just now.
            new = {page.owner for page in self.pages.values() if page.retained and page not in before}
            assert all(held[one] <= self.limits[one] / 2 for one in new & self.limits.keys())
        if found < len(pages):
            first = self.pages[store, pages[found]]
            assert not first.retained and not ends
            more, limit = self.sizes[store], self.limits.get(first.owner)
            assert (self.quota.max_bytes is not None and held.total() + more > self.quota.max_bytes / 2) or (
                limit is not None and held[first.owner] + more > limit / 2
            )

    @rule(store=_STORE, page=_ONE)
    def drop(self, store: int, page: bytes) -> None:
        if not any(of == store and page in pin.keys for of, pin in self.pins):
            assert drop(self.stores[store], page) == ((store, page) in self.pages)
            self.pages.pop((store, page), None)

    @rule(store=_STORE, pages=_SOME)
    def pin(self, store: int, pages: list[bytes]) -> None:
        there = [page for page in pages if (store, page) in self.pages]
        self.pins.append((store, self.stores[store].pin(there)))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        store, pin = self.pins.pop(data.draw(st.integers(0, len(self.pins) - 1)))
        assert read(self.readers[store], [pin]) == expected(GEOMETRIES[store], [pin])
        pin.close()

    @rule(pages=st.integers(1, 4))
    def leave(self, pages: int) -> None:
        """Another engine comes, and ends."""
        mark = fingerprint(other=next(self.others))
        other = PageStore(self.place / mark.hex()[:32] / "rank0", mark, GEOMETRIES[0])
        for page in POOL[:pages]:
            write(other, [page])
        other.close()

    @rule()
    def reopen(self) -> None:
        self.close()
        self.open(self.place)
        for page in self.pages.values():
            page.needed = page.released = page.retained = False

    @rule()
    def crash(self) -> None:
        """What was used and not noted yet is forgotten; no page is."""
        before, root = self.stores, next(self.roots)
        shutil.copytree(self.place, root)
        self.close()
        shutil.rmtree(self.place)
        self.open(root)
        assert len(before) == len(self.stores)
        for (store, name), page in self.pages.items():
            with self.stores[store].pin([name]) as pin:
                page.needed, page.used = (
                    False,
                    self.stores[store]._extents[pin.segments[0].extent.number].used / (1 << 20),
                )
        self.clock = count(1 + max((int(page.used) + 1 for page in self.pages.values()), default=0))

    @invariant()
    def exactly_what_is_stored_is_found(self) -> None:
        for number, store in enumerate(self.stores):
            assert store.stored(POOL) == [(number, page) in self.pages for page in POOL]
            assert store.stats.bytes == sum(self.sizes[of] for of, _ in self.pages if of == number)
        assert self.space.owners() == self.held()
