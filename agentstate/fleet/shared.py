"""Copying to and from a shared store, and verifying it."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from sqlalchemy.engine import Connection

from agentstate.errors import BadExtent, PageStoreFull, TierMissing
from agentstate.fleet import extents as catalogue
from agentstate.fleet import manifests
from agentstate.fleet.erasures import KEY_BYTES, Chain, StoreName
from agentstate.fleet.extents import SharedExtent
from agentstate.fleet.manifests import Manifest
from agentstate.fleet.shared_rows import SharedRows
from agentstate.pages import PageKeys, PageStore, inventory
from agentstate.pages.extent import ExtentHeader
from agentstate.pages.files import header_of, opened
from agentstate.pages.node import node_id
from agentstate.pages.rewriting import copy_pages
from agentstate.sql.database import Database
from agentstate.tiers import Published, Range, SharedExtents

_RANK = re.compile(r"rank\d{1,9}")

_RANGE_BYTES = 8 << 20
_MOST_UNDER_WAY = 4
_BATCH = 256


@dataclass(frozen=True)
class Checked:
    """What is wrong with an extent of the catalogue: its object is ``missing``, ``damage`` says why none of it can be
    used, or the pages with the ``broken`` keys are not those that were written."""

    extent: SharedExtent
    missing: bool = False
    damage: str | None = None
    broken: tuple[bytes, ...] = ()

    @property
    def good(self) -> bool:
        return not (self.missing or self.damage or self.broken)


@dataclass
class Copied:
    """How many extents were copied, of them ``new`` ones, with their bytes; and extents that could not be read."""

    extents: int = 0
    new: int = 0
    bytes: int = 0
    unreadable: int = 0


@dataclass(frozen=True)
class SharedStore:
    """A shared store: its objects and its ``rows``."""

    rows: SharedRows

    @property
    def extents(self) -> SharedExtents:
        return self.rows.extents

    @property
    def id(self) -> str:
        return self.rows.store

    @property
    def database(self) -> Database:
        return self.rows.database

    def listed(self) -> Iterator[SharedExtent]:
        """What the catalogue says is there, by id."""
        after = 0
        while True:
            with self.database.read() as connection:
                some = catalogue.listing(connection, self.id, after)
            if not some:
                return
            yield from some
            after = some[-1].id

    def check(self) -> Iterator[Checked]:
        """Every extent of the catalogue, every byte of it read and verified. Raises TierUnavailable and TierRefused if
        the store does not answer."""
        for extent in self.listed():
            try:
                with self.fetched(extent) as (file, header):
                    wrong = tuple(header.keys[slot] for slot in inventory.broken_pages(file, header))
                    yield Checked(extent, broken=wrong)
            except TierMissing:
                yield Checked(extent, missing=True)
            except BadExtent as error:
                yield Checked(extent, damage=str(error))

    @contextmanager
    def fetched(self, extent: SharedExtent) -> Iterator[tuple[BinaryIO, ExtentHeader]]:
        """A whole extent as a file in memory, with its header, which was checked; its pages were not. Raises BadExtent
        and what `Tier.read` does."""
        header = self.extents.header(extent.name, extent.nbytes).result()
        if PageKeys.of(header.keys) != PageKeys(extent.keys):
            raise BadExtent(f"{extent.name}: the catalogue lists other pages than its header")
        with os.fdopen(os.memfd_create(extent.name[-64:]), "r+b") as file:
            file.truncate(header.file_bytes)
            with mmap.mmap(file.fileno(), header.file_bytes) as memory, memoryview(memory) as whole:
                ranges = [Range(at, whole[at : at + _RANGE_BYTES]) for at in range(0, len(whole), _RANGE_BYTES)]
                try:
                    self.extents.tier.read(extent.name, ranges).result()
                finally:
                    for part in ranges:
                        part.into.release()
            yield file, header

    def push(
        self,
        store: Path,
        writer: str,
        wanted: set[bytes] | None = None,
        advance: Callable[[int], None] = lambda n_bytes: None,
    ) -> Copied:
        """Publish the extents of a page directory's store that have any of the ``wanted`` pages, or all. ``advance`` is
        told of each with its size, those that are left out too."""
        copied = Copied()
        under_way: dict[Future[Published], ExtentHeader] = {}

        def await_some(most: int) -> None:
            while len(under_way) > most:
                for future in wait(under_way, return_when="FIRST_COMPLETED").done:
                    header, published = under_way.pop(future), future.result()
                    if self.rows.enlist(published, PageKeys.of(header.keys), header.owner, writer) is not None:
                        copied.extents += 1
                        copied.new += published.new
                        copied.bytes += published.n_bytes if published.new else 0

        for path in sorted((store / "extents").glob("*.ext")):
            try:
                with opened(path) as file:
                    header = header_of(file, path.name)
                if wanted is None or not wanted.isdisjoint(header.keys):
                    under_way[self.extents.publish(path, store.name)] = header
                advance(path.stat().st_size)
            except FileNotFoundError:
                continue  # evicted just now
            except BadExtent:
                copied.unreadable += 1
            await_some(_MOST_UNDER_WAY - 1)
        await_some(0)
        return copied

    def tell_manifests(self, store: Path, node: str) -> int:
        """Say in SQL how much of the manifests of a page directory's store is in the shared one: how many manifests
        that changes. Those whose pages other stores of the rank have too are left to the engine: with several pools,
        only it knows what they need to go on."""
        identity = inventory.identity(store)
        if identity is None:
            return 0
        beside = {
            key
            for other in store.parent.parent.glob(f"*/{store.name}")
            if other != store
            for report in inventory.extents(other)
            if report.header is not None
            for key in report.header.keys
        }
        where: dict[bytes, int] = {}
        with self.database.read() as connection:
            changes = catalogue.changed(connection, self.id, identity[0], store.name, 0)
            ids = [change.id for change in changes if not change.doomed]
            for first in range(0, len(ids), _BATCH):
                for extent in catalogue.load(connection, ids[first : first + _BATCH]):
                    where.update(dict.fromkeys(PageKeys(extent.keys), extent.id))
            found = list(manifests.of_rank(connection, *identity, node))
        return sum(self._tell(manifest, where) for manifest in found if beside.isdisjoint(manifest.page_keys()))

    def _tell(self, manifest: Manifest, where: dict[bytes, int]) -> bool:
        keys = manifest.page_keys()
        there = next((at for at, key in enumerate(keys) if key not in where), len(keys))
        if there * manifest.page_size <= manifest.shared_tokens:
            return False
        ids = {where[key] for key in keys[:there]}
        with self.database.write() as connection:
            return catalogue.used(connection, ids) == ids and manifests.share(
                connection,
                manifest.session_id,
                manifest.fingerprint,
                manifest.rank,
                manifest.node,
                tokens=there * manifest.page_size,
                last_key=keys[there - 1],
            )

    def pull(
        self,
        root: Path,
        wanted: set[bytes] | None = None,
        free_fraction: float = 0.0,
        advance: Callable[[int], None] = lambda n_bytes: None,
    ) -> Copied:
        """Copy extents that have any of the ``wanted`` pages, or all, to the page directory ``root``: those of their
        pages that its stores do not have, each verified. One with a broken page counts as ``unreadable``.

        Raises PageStoreLocked while an engine has a store open, and PageStoreFull before less than ``free_fraction`` of
        the disk would be free: nothing that is there is evicted. ``advance`` is as of `push`.
        """
        copied = Copied()
        parts: dict[tuple[str, str], list[int]] = {}
        for extent in self.listed():
            if _RANK.fullmatch(extent.shard) and (wanted is None or not wanted.isdisjoint(PageKeys(extent.keys))):
                parts.setdefault((extent.fingerprint, extent.shard), []).append(extent.id)
            else:
                advance(extent.nbytes)
        node = node_id(root)
        for (fingerprint, shard), ids in parts.items():
            of = StoreName(fingerprint, int(shard.removeprefix("rank")), node)
            self._pull_store(root / fingerprint[:32] / shard, of, ids, free_fraction, copied, advance)
        return copied

    def _pull_store(
        self,
        directory: Path,
        of: StoreName,
        ids: list[int],
        free_fraction: float,
        copied: Copied,
        advance: Callable[[int], None],
    ) -> None:
        store: PageStore | None = None
        try:
            for number in ids:
                with self.database.read() as connection:
                    found = catalogue.load(connection, [number])
                for extent in found:
                    advance(extent.nbytes)
                    if store is not None and all(store.stored(PageKeys(extent.keys))):
                        copied.extents += 1
                        continue
                    try:
                        with self.fetched(extent) as (file, header):
                            if store is None:
                                store = PageStore(directory, header.fingerprint, header.geometry, rows=header.rows)
                            _enter(store, file, header, free_fraction, copied)
                    except (BadExtent, TierMissing):
                        copied.unreadable += 1
        finally:
            if store is not None:
                try:
                    self._list_pulled(store, of)
                finally:
                    store.close()

    def _list_pulled(self, store: PageStore, of: StoreName) -> None:
        """Say in SQL what this node has of sessions now, or it would not be erased with them."""
        with self.database.read() as connection:
            found = list(manifests.of_rank(connection, of.fingerprint, of.rank))
        for manifest in found:
            there = store.prefix_length(manifest.page_keys(), use=False)
            if manifest.node != of.node and there:
                with self.database.write() as connection:
                    _list_copy(connection, manifest, there, of)


def _enter(store: PageStore, file: BinaryIO, header: ExtentHeader, free_fraction: float, copied: Copied) -> None:
    """Store those pages of an extent that are not there yet and that are as they were written."""
    broken = inventory.broken_pages(file, header)
    there = store.stored(header.keys)
    slots = [slot for slot in range(len(header.keys)) if slot not in broken and not there[slot]]
    copied.extents += 1
    copied.unreadable += bool(broken)
    if not slots:
        return
    n_bytes = store.draft_bytes(len(slots), header.owner)
    _require_room(store.directory, n_bytes, free_fraction)
    draft = store.draft([header.keys[slot] for slot in slots], mmap.mmap(-1, n_bytes), header.owner)
    if copy_pages(file, header, slots, draft):
        raise BadExtent(f"{file.name}: a page was read as it was written, and then not")
    store.publish(draft)
    copied.new += 1
    copied.bytes += n_bytes


def _list_copy(connection: Connection, manifest: Manifest, pages: int, of: StoreName) -> None:
    """Note that a node has the first ``pages`` of another node's manifest too."""
    tokens = pages * manifest.page_size
    keys = manifest.keys[: pages * KEY_BYTES]
    own = manifests.load(connection, manifest.session_id, of.fingerprint, of.rank, of.node)
    if own is not None and not keys.startswith(own.keys):
        # The node's own history is another one, or goes on further.
        if not own.keys.startswith(keys):
            manifests.abandon(connection, manifest.session_id, of, Chain.whole(keys))
        return
    manifests.publish(
        connection,
        replace(
            manifest,
            node=of.node,
            tokens=tokens,
            keys=keys,
            nbytes=manifest.nbytes * tokens // manifest.tokens,
            lost_tokens=manifest.tokens - tokens + manifest.lost_tokens,
            shared_tokens=min(manifest.shared_tokens, tokens),
        ),
    )


def _require_room(directory: Path, n_bytes: int, free_fraction: float) -> None:
    disk = os.statvfs(directory)
    if disk.f_bavail * disk.f_frsize - n_bytes < free_fraction * disk.f_blocks * disk.f_frsize:
        raise PageStoreFull(f"no room for {n_bytes:,} more bytes in {directory}: nothing is evicted for them")
