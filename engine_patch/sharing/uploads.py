"""Extents on their way to the shared store, and from there into the catalogue."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from agentstate.errors import BadExtent, TierError
from agentstate.pages import PageKeys
from agentstate.pages.files import read_header
from agentstate.pages.pins import StoredExtent
from agentstate.tiers.extents import Published
from agentstate.tiers.pages import Listed, SharedPages
from engine_patch.sharing.access import Access
from engine_patch.sharing.allowance import Allowance
from engine_patch.sharing.context import Context
from engine_patch.sharing.evictions import Evictions
from engine_patch.sharing.feed import Feed

MOST_UPLOADS = 4


class _Upload(NamedTuple):
    """What is published: the extent's place in its store, and what its header says."""

    pages: SharedPages
    path: Path
    number: int
    keys: PageKeys
    owner: str


class Uploads:
    """At most `MOST_UPLOADS` at a time. What does not arrive is to be sent again."""

    def __init__(self, context: Context, access: Access, evictions: Evictions, feed: Feed, allowance: Allowance):
        self._context, self._access, self._evictions, self._feed = context, access, evictions, feed
        self._allowance = allowance
        self._under_way: dict[Future[Published], _Upload] = {}
        # In the store, and not in SQL yet.
        self._unlisted: list[tuple[Published, _Upload]] = []
        # What is published and not used here, because it was wrong once.
        self._vain: set[Path] = set()
        # What is not published, and why: its account has its quota. Of each pool, the first of that.
        self._over: dict[Path, str] = {}
        self._over_from: dict[bytes, int] = {}
        # Of each pool, the first that has to be sent again.
        self._again: dict[bytes, int] = {}

    @property
    def full(self) -> bool:
        return len(self._under_way) >= MOST_UPLOADS

    @property
    def over(self) -> bool:
        """Whether all that was sent is in SQL, or is to be sent again."""
        return not self._under_way and not self._unlisted

    def send(self, pages: SharedPages, extent: StoredExtent) -> None:
        """Begin to send an extent, unless it is there, or cannot or may not be published. Raises DatabaseError."""
        if extent.path in self._vain:
            return
        try:
            header = read_header(extent.path)
            if all(pages.stored(header.keys)):
                return
            upload = _Upload(pages, extent.path, extent.number, header.keys, header.owner)
            if self._may_have(upload, extent.path.stat().st_size):
                self._under_way[self._access.extents.publish(extent.path, self._context.shard)] = upload
        except (FileNotFoundError, BadExtent):
            pass  # evicted just now, or damaged: who restores it finds out
        except OSError as error:
            self._access.failed(error)

    def _may_have(self, upload: _Upload, n_bytes: int) -> bool:
        self._over.pop(upload.path, None)
        reason = self._allowance.take(upload.owner, n_bytes)
        if reason is not None:
            mark = upload.pages.fingerprint
            self._over[upload.path] = reason
            self._over_from[mark] = min(upload.number, self._over_from.get(mark, upload.number))
            self._context.stats.over_quota += 1
        return reason is None

    def wait(self) -> None:
        """Wait until some of what is on its way has arrived, or has not. Raises `Closing`."""
        for future in self._access.first_of(self._under_way):
            upload = self._under_way.pop(future)
            try:
                published = future.result()
            except (TierError, OSError) as error:
                self._access.failed(error)
                self._send_again(upload)
                continue
            stats = self._context.stats
            stats.published += 1
            stats.new += published.new
            stats.bytes += published.n_bytes if published.new else 0
            self._unlisted.append((published, upload))

    def finish(self) -> None:
        """Wait for all that is on its way, and have it in SQL. Raises `Closing` and DatabaseError."""
        while self._under_way:
            self.wait()
        self.enlist()

    def enlist(self) -> None:
        """Have SQL say of what has arrived that it is there. Raises DatabaseError: the next time goes on."""
        while self._unlisted:
            published, upload = self._unlisted[0]
            writer = self._context.engine().node
            try:
                number = self._access.rows.enlist(published, upload.keys, upload.owner, writer, self._feed.miss)
            except BadExtent as error:
                self._access.failed(error)
                number = None
            except TierError as error:
                self._access.failed(error)
                return
            if number is not None:
                of = Listed(number, published.name, published.n_bytes, upload.owner, upload.keys)
                upload.pages.enter([of])
                if not all(upload.pages.stored(upload.keys)):
                    self._vain.add(upload.path)
            else:
                self._send_again(upload)
            del self._unlisted[0]

    def _send_again(self, upload: _Upload) -> None:
        """Later. What is wanted of a session is, until it is there."""
        mark = upload.pages.fingerprint
        self._again[mark] = min(upload.number, self._again.get(mark, upload.number))
        self._evictions.forget(mark, upload.number)
        self._evictions.again(upload.keys)

    def take_again(self, mark: bytes) -> int | None:
        """The number of the first extent of a pool's store that has to be sent again, if there is one."""
        return self._again.pop(mark, None)

    def start_over(self) -> None:
        """Try once more what was wrong, and what there was no room for."""
        self._vain.clear()
        self._over.clear()
        for mark, number in self._over_from.items():
            self._again[mark] = min(number, self._again.get(mark, number))
        self._over_from.clear()

    def in_vain(self, path: Path) -> bool:
        """Whether an extent is published, and not used here."""
        return path in self._vain

    def over_quota(self, path: Path) -> str | None:
        """Why an extent is not published, if its account has no room for it."""
        return self._over.get(path)
