"""Nodes that share a store and a database: their page stores and the tier are real, and a test can break what lies
between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import sqlalchemy as sa
from contents import MARK, MHA, MLA, expected, keys, read, write
from sqlalchemy.engine import Connection

from agentstate.errors import DatabaseUnreachable
from agentstate.fleet import manifests
from agentstate.fleet.engines import Engine
from agentstate.fleet.erasures import StoreName
from agentstate.fleet.manifests import Manifest
from agentstate.pages import LayerwiseReader, PageKeys, PageStore, Pin, fingerprint
from agentstate.sql.database import Database
from agentstate.sql.models import shared_extents
from agentstate.tiers import Guard, Page, Policy, Range, Reading, SharedExtents, StoreKeys, Tier
from agentstate.tiers.interface import settle
from agentstate.tiers.pages import SharedPages
from agentstate.tiers.testing.conformance import Place
from engine_patch.sharing import Publication, Sharing

URL = "file:///the/share"
PAGE_SIZE, WINDOW = 4, 2
# What is in the shared store is looked at with the key of all nodes.
KEYS = StoreKeys("k" * 32)
# A test says when a store fails, and for how long; no time does.
PATIENT = Policy(
    timeout_s=3600,
    attempts=1,
    least_hedge_s=3600,
    failures_in_row=1 << 30,
    failure_share=2.0,
    refusals_in_row=1 << 30,
)


class Fragile(Tier):
    """``tier`` until a test breaks it. ``fault`` gives the error of a call, by its kind and name, or None; ``after`` is
    called with both once a call has ended well. What `hangs` never ends. ``sent`` counts calls by kind."""

    def __init__(self, tier: Tier):
        self._tier = tier
        self.fault: Callable[[str, str], Exception | None] = lambda what, name: None
        self.after: Callable[[str, str], None] = lambda what, name: None
        self.hangs: Callable[[str, str], bool] = lambda what, name: False
        self.sent: Counter[str] = Counter()

    def _call(self, what: str, name: str, send: Callable[[], Future[Any]], made: type[Future[Any]] = Future) -> Any:
        self.sent[what] += 1
        error = self.fault(what, name)
        if error is not None or self.hangs(what, name):
            failed = made()
            if error is not None:
                settle(failed, None, error)
            return failed
        future = send()
        future.add_done_callback(lambda done: done.cancelled() or done.exception() or self.after(what, name))
        return future

    def mark(self, proposed: str | None = None) -> Future[str | None]:
        return self._call("mark", "", lambda: self._tier.mark(proposed))  # type: ignore[no-any-return]

    def publish(self, name: str, file: BinaryIO, trailer: bytes = b"") -> Future[bool]:
        return self._call("publish", name, lambda: self._tier.publish(name, file, trailer))  # type: ignore[no-any-return]

    def read(self, name: str, ranges: Sequence[Range]) -> Reading:
        return self._call("read", name, lambda: self._tier.read(name, ranges), Reading)  # type: ignore[no-any-return]

    def drop(self, name: str) -> Future[None]:
        return self._call("drop", name, lambda: self._tier.drop(name))  # type: ignore[no-any-return]

    def list(self, prefix: str = "", after: str | None = None, limit: int = 1000) -> Future[Page]:
        return self._call("list", prefix, lambda: self._tier.list(prefix, after, limit))  # type: ignore[no-any-return]

    def sweep(self, older_than_s: float) -> Future[int]:
        return self._call("sweep", "", lambda: self._tier.sweep(older_than_s))  # type: ignore[no-any-return]

    def close(self) -> None:
        self._tier.close()


class Switched(Database):
    """A database that can be taken down for one node: for everything, or after so many more transactions."""

    down = False
    left: int | None = None

    def _admit(self) -> None:
        if self.left is not None:
            self.left -= 1
            self.down = self.left < 0
        if self.down:
            raise DatabaseUnreachable("of this test")

    @contextmanager
    def read(self) -> Iterator[Connection]:
        self._admit()
        with super().read() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        self._admit()
        with super().write() as connection:
            yield connection


class Stores:
    """The stores of a rank with full attention and a window of `WINDOW` pages, as `StoredPools` has them, and what is
    known of the shared store. ``weights`` are of the fingerprints."""

    page_size = PAGE_SIZE

    def __init__(self, directory: Path, extents: SharedExtents, weights: str = ""):
        marks = (fingerprint(model="of the tests", weights=weights) if weights else MARK, fingerprint(window=weights))
        parts = zip(marks, (MHA, MLA), ("full", "window"), strict=True)
        self.stores = [PageStore(directory / (weights + name), mark, geometry) for mark, geometry, name in parts]
        self.shared = [
            SharedPages(store.directory / "shared", extents, store.fingerprint, store.geometry) for store in self.stores
        ]

    def shared_pages(self) -> list[tuple[PageStore, SharedPages]]:
        return list(zip(self.stores, self.shared, strict=True))

    def chains(self, keys: Sequence[bytes]) -> Iterator[tuple[PageStore, SharedPages, PageKeys]]:
        for (store, pages), needed in zip(self.shared_pages(), (keys, keys[-WINDOW:]), strict=True):
            yield store, pages, PageKeys.of(needed)

    def durable(self, keys: Sequence[bytes]) -> int:
        length = self.stores[0].prefix_length(keys, use=False)
        while length and not all(self.stores[1].stored(keys[max(0, length - WINDOW) : length])):
            length -= 1
        return length

    def published(self, keys: Sequence[bytes]) -> int:
        length = self.shared[0].prefix_length(keys)
        return length if all(self.shared[1].stored(keys[max(0, length - WINDOW) : length])) else 0

    def write(self, pages: Sequence[bytes], owner: str = "") -> None:
        """Store those that are not stored: one extent a pool."""
        for store, some in zip(self.stores, (pages, pages[-WINDOW:]), strict=True):
            new = [page for page in some if page not in store]
            if new:
                write(store, new, owner=owner)

    def close(self) -> None:
        for one in (*self.shared, *self.stores):
            one.close()


class Node:
    """A rank on a node of its own, in one process; `restarted` is the next one on the same drive. Nothing runs but in
    `round`."""

    def __init__(
        self,
        name: str,
        directory: Path,
        url: str,
        place: Place,
        *,
        through: bool = False,
        evict: bool = False,
        keep_s: float = 3600.0,
        share: str = URL,
        rank: int = 0,
    ):
        self.name = name
        self._made = (name, directory, url, place)
        self._how: dict[str, Any] = {"through": through, "evict": evict, "keep_s": keep_s, "share": share, "rank": rank}
        self.now_s = 0.0
        # What accounts may have in the shared store, in bytes.
        self.limits: dict[str, int] = {}
        self.database = Switched(url)
        self.tier = Fragile(place.open())
        self.guard = Guard(self.tier, "the share", PATIENT)
        self.extents = SharedExtents(self.guard, KEYS)
        self.stores = Stores(directory, self.extents)
        self.engine = Engine(f"eng_{name}", name, rank, "", "", "m", MARK.hex(), str(directory), shared_store=URL)
        self.sharing = Sharing(
            self.extents,
            share,
            self.database,
            self.stores,
            lambda: self.engine,
            through=through,
            evict=evict,
            keep_s=keep_s,
            limits=lambda: self.limits,
            clock=lambda: self.now_s,
            writer=0,
        )
        self.sharing._access.identify()

    def round(self, after_s: float = 0.0) -> None:
        self.now_s += after_s
        self.sharing.round()

    def serve(self, session_id: str, *pages: object, owner: str = "") -> None:
        """Store what is new of a session's pages, and its manifest."""
        self.stores.write(keys(*pages), owner)
        with self.database.write() as connection:
            manifests.save(connection, self.manifest(session_id, *pages))

    def manifest(self, session_id: str, *pages: object) -> Manifest:
        packed, tokens = b"".join(keys(*pages)), PAGE_SIZE * len(pages)
        return Manifest(session_id, self.engine.fingerprint, 0, self.name, self.engine.id, PAGE_SIZE, tokens, packed, 1)

    def publish(self, session_id: str, *pages: object, owner: str = "") -> Publication:
        self.serve(session_id, *pages, owner=owner)
        publication = self.sharing.publish(session_id, keys(*pages))
        self.round()
        return publication

    def shared_tokens(self, session_id: str) -> int:
        """What SQL says of a session's manifest of this node."""
        with self.database.read() as connection:
            found = manifests.load(connection, session_id, self.engine.fingerprint, 0, self.name)
        assert found is not None
        return found.shared_tokens

    def finds(self, *pages: object) -> int:
        """How many of a chain's pages it knows of in the shared store, with the window before their end."""
        return self.stores.published(keys(*pages))

    def restores(self, *pages: object) -> bool:
        """Whether all pages come back from the shared store. None comes back wrong."""
        right = True
        for shared, needed in zip(self.stores.shared, (keys(*pages), keys(*pages)[-WINDOW:]), strict=True):
            try:
                pin = shared.pin(needed)
            except KeyError:
                return False
            right &= restored(shared, pin)
        return right

    @property
    def store_id(self) -> str:
        """Of the shared store."""
        assert self.sharing._access.rows is not None
        return self.sharing._access.rows.store

    @property
    def store(self) -> StoreName:
        return StoreName(self.engine.fingerprint, 0, self.name)

    def reload(self, weights: str) -> None:
        """Go on with other weights."""
        _, directory, *_ = self._made
        self.stores.close()
        other = Stores(directory, self.extents, weights)
        self.stores.stores, self.stores.shared = other.stores, other.shared

    def close(self) -> None:
        self.sharing.close()
        self.stores.close()
        self.guard.close()
        self.database.close()

    def restarted(self) -> Node:
        self.close()
        return Node(*self._made, **self._how)


def restored(shared: SharedPages, pin: Pin) -> bool:
    """Whether the pages of a pin can all be used. None that can be is wrong; those that are not are dropped."""
    reader = LayerwiseReader(
        shared.geometry, staging_bytes=1 << 20, threads=2, chunk_bytes=1 << 16, open_extent=shared.open
    )
    try:
        got, right = read(reader, [pin]), expected(shared.geometry, [pin])
    finally:
        reader.close()
    bad = {place[2] for place, components in got.items() if components is None}
    assert all(components is None or components == right[place] for place, components in got.items()), "a wrong page"
    return not bad


def rows(database: Database) -> list[Any]:
    """What the catalogue says, without the keys."""
    named = [shared_extents.c[name] for name in ("id", "name", "nbytes", "owner", "writer", "doomed_us")]
    with database.read() as connection:
        return list(connection.execute(sa.select(*named).order_by(shared_extents.c.id)))


def age(database: Database, seconds: float) -> None:
    """Let everything that the catalogue says be older, but for when it changed."""
    by_us = round(seconds * 1_000_000)
    columns = shared_extents.c
    older = {column: column - by_us for column in (columns.created_us, columns.used_us, columns.changed_us)}
    # A negative one is when it was taken.
    older[columns.doomed_us] = columns.doomed_us + sa.case((columns.doomed_us < 0, by_us), else_=-by_us)
    with database.write() as connection:
        connection.execute(sa.update(shared_extents).values(older))
