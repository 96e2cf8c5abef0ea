"""What a rank and a shared store tell each other: what is stored here is published there, what others have published is
found here, and what nobody needs is deleted.

The catalogue in SQL says what there is (`agentstate.fleet.extents`); `agentstate.fleet.shared_rows` keeps it and the
store together.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sqlalchemy.engine import Connection

from agentstate.errors import BadExtent, DatabaseError, TierError, TierForeign
from agentstate.fleet import erasures, manifests, stores
from agentstate.fleet import extents as catalogue
from agentstate.fleet.engines import Engine
from agentstate.fleet.erasures import Chain, StoreName
from agentstate.fleet.manifests import split_keys
from agentstate.fleet.quotas import shown
from agentstate.fleet.shared_rows import GRACE_S as _GRACE_S
from agentstate.fleet.shared_rows import SharedRows
from agentstate.pages import PageKeys, PageStore
from agentstate.pages.eviction import Extent
from agentstate.pages.files import read_header
from agentstate.pages.pins import StoredExtent
from agentstate.sql.database import Database
from agentstate.tiers import SharedExtents
from agentstate.tiers.extents import Published
from agentstate.tiers.pages import Listed, SharedPages

logger = logging.getLogger(__name__)

_FOLLOW_S = 1.0
# Rows that change appear in SQL later than their time says, by as long as a transaction takes.
_OVERLAP_US = 60_000_000
_WHOLE_S = 600.0
_COLLECT_S = 600.0
# What is erased goes as soon as all engines have been told, whoever reads it.
_ERASE_S, _MARGIN_S = 5.0, 1.0
_MOST_UPLOADS = 4
_PAUSE_S = 5.0
# How often a store is asked again that is not this installation's.
_REFUSED_S = 60.0
# How many sessions wait to be published, at most. Of others, SQL tells.
_MOST_WAITING = 10_000
# What was stored before, and is not published: of so many sessions at once, an extent at a time, for as long as this,
# and then nothing for as long as that took.
_MOST_BEHIND = 16
_BEHIND_S = 1.0
# How far ahead what is about to be evicted is published: as much as comes in in so many minutes like the busiest of the
# last ones, or this. In a simulation of bursts that the store takes at 0.6 of their rate, one minute ahead lost 5 % of
# the pages, five 0.4 %.
_AHEAD_MINUTES, _LEAST_AHEAD_BYTES = 5, 256 << 20
_MINUTE_S, _MINUTES = 60.0, 10
# How often SQL is told of one that it may not know yet.
_TELLINGS = 60
_BATCH = 256


class Pools(Protocol):
    """What is asked of the stores of a rank (`StoredPools`)."""

    @property
    def page_size(self) -> int: ...

    def shared_pages(self) -> list[tuple[PageStore, SharedPages]]: ...

    def chains(self, keys: Sequence[bytes]) -> Iterator[tuple[PageStore, SharedPages, PageKeys]]: ...

    def durable(self, keys: Sequence[bytes]) -> int: ...

    def published(self, keys: Sequence[bytes]) -> int: ...


@dataclass
class SharingStats:
    """Counters since the engine started: extents that were ``published``, of them ``new`` ones, and their ``bytes``;
    those that ``failed``, and those that were ``over_quota``; those that were ``deleted``. ``waiting`` are sessions
    whose KV is being published now. ``evicted`` are pages that somebody might have come back for, and that were evicted
    before they were published, where that is what they are published for."""

    published: int = 0
    new: int = 0
    bytes: int = 0
    failed: int = 0
    waiting: int = 0
    deleted: int = 0
    evicted: int = 0
    over_quota: int = 0


@dataclass(eq=False)
class Publication:
    """A session's chain that is to be published. SQL says of its first ``promised`` pages that they are in the shared
    store, and nobody deletes them; it was told ``tellings`` times. ``refused`` says why no more of it is published."""

    keys: PageKeys
    promised: int = 0
    tellings: int = 0
    refused: str | None = None


class _Upload(NamedTuple):
    """What is published: the extent's place in its store, and what its header says."""

    pages: SharedPages
    path: Path
    number: int
    keys: PageKeys
    owner: str


class _Inflow:
    """How many bytes may come in before what is published now is there."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._written = 0
        self._minutes = Counter[int]()

    def expected(self, written: int) -> int:
        """``written`` have been in all, as of now."""
        now = int(self._clock() / _MINUTE_S)
        self._minutes[now] += max(0, written - self._written)
        self._written = written
        self._minutes = Counter({at: n_bytes for at, n_bytes in self._minutes.items() if at > now - _MINUTES})
        return max(_LEAST_AHEAD_BYTES, _AHEAD_MINUTES * max(self._minutes.values()))


class _Closing(Exception):
    """Nobody waits for the store any more."""


class Sharing:
    """One thread a rank, from `start` to `close`. It publishes what it is asked for, and of what is stored everything
    (``through``), or what is about to be evicted (``evict``), or what SQL does not list of the sessions' KV. ``limits``
    gives the accounts that may have only so many bytes in the store. ``writer`` is the rank whose pages these are, if
    it is another than the engine's: that one publishes and deletes, and this one only follows what is published of that
    one's pages.
    """

    def __init__(
        self,
        extents: SharedExtents,
        url: str,
        database: Database,
        pools: Pools,
        engine: Callable[[], Engine],
        *,
        through: bool,
        keep_s: float,
        evict: bool = False,
        limits: Callable[[], Mapping[str, int]] = dict,
        clock: Callable[[], float] = time.monotonic,
        writer: int | None = None,
    ):
        self.stats = SharingStats()
        self._writer = writer
        self._extents = extents
        self._url = url
        # None where nobody knows the store. ``_identified``: it was asked who it is; before, it may not be there.
        self._rows: SharedRows | None = None
        self._identified = False
        self._identify_s = -math.inf
        self._refusal: str | None = None
        self._database = database
        self._pools = pools
        self._engine = engine
        self._through = through
        self._evict = evict
        self._keep_s = keep_s
        self._limits = limits
        self._clock = clock
        self._changed = threading.Condition()
        self._wanted: dict[str, Publication] = {}
        # The same of what was stored before, which does not keep others waiting; and from where on SQL is asked for
        # more of it, the newest first: None where there is none.
        self._behind: dict[str, Publication] = {}
        self._behind_from: manifests.Place | None = None
        self._rest_until_s = -math.inf
        # By pool: what has been seen of its store, what was there before and is to be seen still, the first that has to
        # be published again, and what has been seen of the catalogue.
        self._seen: dict[bytes, int] = {}
        self._before: dict[bytes, list[StoredExtent]] = {}
        self._again: dict[bytes, int] = {}
        self._since_us = weakref.WeakKeyDictionary[SharedPages, int]()
        self._whole_s, self._collected_s = -math.inf, clock()
        self._followed_s = -math.inf
        self._paused_until_s = 0.0
        # Published, and not in SQL yet.
        self._unlisted: list[tuple[Published, _Upload]] = []
        # The ids of what was asked for and is not there, of which SQL has not been told.
        self._missing: set[int] = set()
        # What is published and not used here, because it was wrong once.
        self._vain: set[Path] = set()
        # Of what is published because it is about to be evicted: by pool, the extents that are; pages that went from
        # the shared store and may be here; and the sessions that need what was published.
        self._saved: dict[bytes, set[int]] = {}
        self._gone: set[bytes] = set()
        self._grown: set[str] = set()
        self._inflow = _Inflow(clock)
        self._evicted_s = -math.inf
        # By account: the bytes it has, with what was sent since they were counted; when that was; and when there was
        # no more room.
        self._held: dict[str, tuple[int, float, float]] = {}
        # What is not published, and why: its account has its quota. Of each pool, the first of that.
        self._over: dict[Path, str] = {}
        self._over_from: dict[bytes, int] = {}
        # What has been erased while more of it may have been on its way to the store; when the latest was, and when
        # something of that is to be deleted.
        self._erased: list[Chain] = []
        self._erased_s, self._erase_s = -math.inf, math.inf
        # When what could not be deleted may be taken again.
        self._retake_s = math.inf
        # Of what others are to erase: up to which id all was, and what was of those after it.
        self._erased_to = 0
        self._erased_lately: set[int] = set()
        self._failing = self._closing = self._news = False
        self._closed: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="agentstate-share", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End, whether or not the store answers. What is not published yet the next engine publishes that is asked for
        it."""
        with self._changed:
            if not self._closing:
                self._closing = True
                self._closed.set_result(None)
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def publish(self, session_id: str, keys: Sequence[bytes]) -> Publication:
        """Publish a session's stored chain, unless it is, and have SQL say so: what tells how far that is."""
        keys = PageKeys.of(keys)
        with self._changed:
            publication = self._wanted.get(session_id)
            behind = self._behind.pop(session_id, None)
            if publication is None or publication.keys != keys:
                publication = behind if behind is not None and behind.keys == keys else Publication(keys)
                publication.tellings = 0
                self._wanted[session_id] = publication
                if len(self._wanted) > _MOST_WAITING:
                    del self._wanted[next(iter(self._wanted))]
                self._news = True
                self._changed.notify()
            return publication

    def note(self, session_id: str, keys: Sequence[bytes]) -> None:
        """Have SQL say of a session's stored chain that it is published, which it seems to be."""
        with self._changed:
            wanted = session_id in self._wanted or session_id in self._behind
        if keys and not wanted:
            self.publish(session_id, keys)

    def erase(self, chains: Sequence[Chain]) -> None:
        """Delete the extents that have pages of these chains which no session's KV needs, on whatever node. Of sessions
        that need other pages in them, SQL says no more that they are here: they are published again from where they are
        stored."""
        if self._refusal is not None:
            return  # nothing of theirs is there
        with self._changed:
            self._erased += chains
        self._erase(chains)

    def _erase(self, chains: Sequence[Chain]) -> None:
        keys = {key for chain in chains for key in split_keys(chain.keys)}
        for _, pages in self._pools.shared_pages():
            if held := pages.holding(keys):
                with self._database.write() as connection:
                    # Whoever promises meanwhile that one of them stays has done so before, or waits and is refused.
                    there = catalogue.used(connection, held)
                    doomed = set[int]()
                    for chain in chains:
                        doomed |= self._erased_with(connection, chain, {id: held[id] for id in there})
                    catalogue.doom(connection, doomed)
                pages.leave(doomed | (held.keys() - there))
                self._publish_anew(key for id in doomed for key in held[id])
                if doomed:
                    with self._changed:
                        self._erased_s = self._clock()
                        self._erase_s = min(self._erase_s, self._erased_s + _ERASE_S)

    def _erased_with(self, connection: Connection, chain: Chain, held: Mapping[int, PageKeys]) -> set[int]:
        """Which extents go with a chain."""
        own = split_keys(chain.keys)
        needed = erasures.needed_anywhere(connection, self._store, chain)
        page_of = {key: chain.first + page for page, key in enumerate(own)}
        erased = set(own[needed:])
        going = set[int]()
        first: int | None = None
        for id, keys in held.items():
            if erased.isdisjoint(keys):
                continue
            going.add(id)
            # Its pages are of one chain, in order. Those that are needed come before those that are not.
            slot, page = next((slot, page_of[key]) for slot, key in enumerate(keys) if key in page_of)
            if slot or page < chain.first + needed:
                first = min(page - slot, page if first is None else first)
        if first is not None:
            manifests.unshare(connection, self._store.fingerprint, self._store.rank, chain, max(0, first))
        return going

    def refused(self, publication: Publication) -> str | None:
        """Why a chain is not published for now, if that is not for the store to end."""
        return self._refusal or publication.refused

    def round(self) -> None:
        """What the thread does again and again. Raises DatabaseError; the next one goes on."""
        with self._changed:
            self._news = False
            erased = list(self._erased)
        self._identify()
        if self._rows is None:
            return
        self._follow()
        if not self._speaks:
            return
        if not self._identified:
            # What is erased SQL is told, though the store does not answer.
            self._erase_of_others()
            return
        self._publish_all()
        self._publish_behind()
        self._erase_again(erased)
        self._tell_manifests()
        self._erase_of_others()
        self._delete_erased()
        self._collect()

    def _identify(self) -> None:
        """Ask the store who it is, until it has said so. It may not be this installation's."""
        if self._identified or self._clock() < self._identify_s:
            return
        try:
            store = stores.identify(self._database, self._extents.tier, self._url, self._result)
        except TierForeign as error:
            if self._refusal is None:
                logger.error("agentstate: the shared store is not used: %s", error)
            self._refusal = str(error)
            self._rows, self._identify_s = None, self._clock() + _REFUSED_S
            for _, pages in self._pools.shared_pages():
                pages.leave(pages.ids())
            return
        except TierError as error:
            self._failed(error)
            self._identify_s = self._paused_until_s
            if self._refusal is not None:
                return
            with self._database.read() as connection:
                known = stores.known(connection, self._url)
            if known is None:
                return
            store = known
        else:
            if self._refusal is not None:
                logger.info("agentstate: the shared store is this installation's now")
            self._identified, self._refusal = True, None
        if self._rows is None or self._rows.store != store:
            self._rows = SharedRows(self._extents, store, self._database, self._result)
            self._whole_s = -math.inf

    def _run(self) -> None:
        while not self._closing:
            try:
                self.round()
                if self._failing:
                    logger.info("agentstate: the database answers again; the shared store is followed")
                self._failing = False
            except _Closing:
                return
            except Exception as error:
                if not isinstance(error, DatabaseError):
                    logger.exception("agentstate: the shared store could not be followed")
                elif not self._failing:
                    logger.warning("agentstate: what is in the shared store is not followed for now: %s", error)
                self._failing = True
            with self._changed:
                if not self._news and not self._closing:
                    self._changed.wait(_FOLLOW_S)

    def _result(self, future: Future[Any]) -> Any:
        """What the store answers, unless this ends before it does."""
        futures.wait([future, self._closed], return_when=futures.FIRST_COMPLETED)
        if self._closing:
            future.cancel()
            raise _Closing
        return future.result()

    # What others have published

    def _follow(self) -> None:
        """Learn what has changed in the catalogue."""
        self._followed_s = self._clock()
        whole = self._clock() - self._whole_s > _WHOLE_S
        left = False
        for store, pages in self._pools.shared_pages():
            if whole:
                pages.again()
            if self._evict:
                store.evicted = partial(self._evicted, pages)
            mark, known = store.fingerprint, pages.ids()
            since_us = 0 if whole else self._since_us.get(pages, 0)
            with self._database.read() as connection:
                changes = catalogue.changed(connection, self._rows.store, mark.hex(), self._shard, since_us)
                new = [change.id for change in changes if not change.doomed and change.id not in known]
                for first in range(0, len(new), _BATCH):
                    pages.enter(map(_listed, catalogue.load(connection, new[first : first + _BATCH])))
                if used := pages.take_used():
                    self._used(used)
            gone = known & {change.id for change in changes if change.doomed}
            if whole:
                gone |= known - {change.id for change in changes}
            if gone and self._evict:
                self._publish_anew(pages.keys_in(gone))
            pages.leave(gone)
            pages.followed = True
            left |= bool(gone)
            newest = max((change.changed_us for change in changes), default=since_us)
            self._since_us[pages] = max(0, newest - _OVERLAP_US)
            # A mount that is not there is empty.
            if (missing := pages.take_missing()) and self._identified:
                logger.warning("agentstate: %d extent(s) are missing in the shared store", len(missing))
                self._missing.update(missing)
        if self._missing:
            left = True
            self._doom_missing()
        if whole:
            self._vain.clear()
            self._over.clear()
            for mark, number in self._over_from.items():
                self._again[mark] = min(number, self._again.get(mark, number))
            self._over_from.clear()
        if (whole or left) and self._speaks:
            self._saved.clear()
            if not self._evict:
                # Otherwise it is published in its own time.
                self._behind_from = manifests.NEWEST
        if whole:
            self._whole_s = self._clock()

    def _doom_missing(self) -> None:
        """Nobody looks for what is missing any more, and who has it publishes it again."""
        engine = self._engine()
        with self._database.write() as connection:
            catalogue.doom(connection, self._missing)
            keys = {key for lost in catalogue.load(connection, self._missing) for key in split_keys(lost.keys)}
            manifests.unshare_listing(connection, engine.fingerprint, self._rank, keys)
        for _, pages in self._pools.shared_pages():
            # One that is published again is found again.
            pages.leave(self._missing)
        self._missing.clear()
        self._publish_anew(keys)

    def _used(self, ids: Sequence[int]) -> None:
        with self._database.write() as connection:
            catalogue.used(connection, ids)

    @property
    def _rank(self) -> int:
        return self._engine().rank if self._writer is None else self._writer

    @property
    def _speaks(self) -> bool:
        return self._rank == self._engine().rank

    @property
    def _shard(self) -> str:
        return f"rank{self._rank}"

    # What is published

    def _publish_all(self) -> None:
        self._list_published()
        if self._clock() < self._paused_until_s:
            return
        under_way: dict[Future[Published], _Upload] = {}
        try:
            for pages, extent in self._candidates():
                if (upload := self._upload(pages, extent)) is not None:
                    under_way[upload[0]] = upload[1]
                while len(under_way) >= _MOST_UPLOADS:
                    self._await(under_way)
                    self._keep_up()
                if self._closing or self._clock() < self._paused_until_s:
                    return
        finally:
            while under_way:
                self._await(under_way)
            self._list_published()
        self._note_grown()

    def _publish_behind(self) -> None:
        """Publish of what was stored before: what a process before this one has not published, or has had no reason to,
        what found no room among those that wait, and what went with something that was erased. It may be all that a big
        drive has: nothing new waits for more than one extent of it, and it takes half of the time of one upload at the
        most."""
        began_s = self._clock()
        if began_s < max(self._rest_until_s, self._paused_until_s):
            return
        for pages, extent in self._stored_before():
            if (upload := self._upload(pages, extent)) is not None:
                under_way = dict([upload])
                while under_way:
                    self._await(under_way)
                self._list_published()
            now_s = self._clock()
            if self._news or self._closing or now_s < self._paused_until_s or now_s - began_s >= _BEHIND_S:
                break
        self._rest_until_s = 2 * self._clock() - began_s

    def _stored_before(self) -> Iterator[tuple[SharedPages, StoredExtent]]:
        """The newest first."""
        seen = set[str]()
        while True:
            with self._changed:
                chains = [(session_id, one) for session_id, one in self._behind.items() if session_id not in seen]
            for session_id, one in chains:
                yield from self._of_chain(one.keys)
                seen.add(session_id)
                # Of some a page cannot be published, whatever is tried: they do not keep others waiting for good.
                one.tellings += 1
                if one.tellings >= _TELLINGS:
                    self._give_up(session_id, one)
            if chains:
                self._tell_manifests()
            if not self._look_behind():
                break
        for store, pages in self._pools.shared_pages():
            before = self._before.get(store.fingerprint, [])
            while before:
                yield pages, before[-1]
                if self._clock() < self._paused_until_s:
                    return
                before.pop()

    def _look_behind(self) -> bool:
        """Ask SQL for more sessions of which not all is published, if there is room for them: whether some were
        found."""
        room = _MOST_BEHIND - len(self._behind)
        if self._behind_from is None or not room:
            return False
        engine = self._engine()
        with self._database.read() as connection:
            found = manifests.unshared(
                connection, engine.fingerprint, engine.rank, engine.node, room, self._behind_from
            )
        self._behind_from = found[-1].place if len(found) == room else None
        with self._changed:
            for one in found:
                if one.session_id not in self._wanted and one.session_id not in self._behind:
                    self._behind[one.session_id] = Publication(PageKeys.of(one.keys))
        return bool(found)

    def _keep_up(self) -> None:
        """Much may have to be published. Meanwhile others' pages are found, and what is there is promised."""
        if self._clock() - self._followed_s >= _FOLLOW_S:
            self._list_published()
            self._follow()
            self._tell_manifests()

    def _candidates(self) -> Iterator[tuple[SharedPages, StoredExtent]]:
        """What is to be published, a session's chain from its head on."""
        with self._changed:
            chains = [wanted.keys for wanted in self._wanted.values()]
            self.stats.waiting = len(chains) + len(self._behind)
        for keys in chains:
            yield from self._of_chain(keys)
        if self._evict:
            yield from self._next_evicted()
        if not self._through:
            return
        for store, pages in self._pools.shared_pages():
            mark = store.fingerprint
            if mark not in self._seen:
                self._before[mark] = store.extents()
                self._seen[mark] = max((extent.number for extent in self._before[mark]), default=0)
            seen = self._seen[mark]
            self._seen[mark] = seen = min(seen, self._again.pop(mark, seen + 1) - 1)
            for extent in store.extents(seen):
                yield pages, extent
                if self._clock() < self._paused_until_s:
                    return
                self._seen[mark] = extent.number

    def _next_evicted(self) -> Iterator[tuple[SharedPages, StoredExtent]]:
        """What somebody may come back for of what is about to be evicted, and of what went from the shared store."""
        stores = self._pools.shared_pages()
        ahead = self._inflow.expected(sum(store.stats.bytes_written + store.stats.bytes_linked for store, _ in stores))
        with self._changed:
            gone, self._gone = self._gone, set()
        complete = False
        try:
            for store, pages in stores:
                next_ = store.next_evicted(ahead)
                saved = self._saved.setdefault(store.fingerprint, set())
                saved &= {extent.number for extent, _ in next_}
                new = (one for one in next_ if one.extent.number not in saved)
                for extent, sessions in (*store.needed(gone), *new):
                    self._grown |= sessions
                    yield pages, extent
                    if self._clock() < self._paused_until_s:
                        return
                    saved.add(extent.number)
            complete = True
        finally:
            if not complete:
                self._publish_anew(gone)

    def _evicted(self, pages: SharedPages, extent: Extent, keys: Sequence[bytes]) -> None:
        """An extent has been evicted, whether or not it was published: nothing waits for that."""
        lost = pages.stored(keys).count(False) if extent.worth_keeping else 0
        if not lost:
            return
        self.stats.evicted += lost
        now_s, before_s = self._clock(), self._evicted_s
        self._evicted_s = now_s
        if now_s - before_s > _WHOLE_S:
            logger.warning(
                "agentstate: pages are evicted before they are published (AGENTSTATE_SHARE=evict): they come in faster "
                "than the shared store takes them, or it does not answer"
            )

    def _publish_anew(self, keys: Iterable[bytes]) -> None:
        """These are not in the shared store any more. What of them is here is published again, where nobody else would
        see to that."""
        if self._evict:
            with self._changed:
                self._gone.update(keys)

    def _note_grown(self) -> None:
        """Have SQL say how much is published of the sessions whose KV has been."""
        engine = self._engine()
        while self._grown:
            session_id = self._grown.pop()
            with self._database.read() as connection:
                found = manifests.load(connection, session_id, engine.fingerprint, engine.rank, engine.node)
            if found is not None:
                keys = found.page_keys()
                published = self._pools.published(keys)
                if published * self._pools.page_size > found.shared_tokens:
                    self.note(session_id, keys[:published])

    def _of_chain(self, keys: PageKeys) -> Iterator[tuple[SharedPages, StoredExtent]]:
        for store, pages, needed in self._pools.chains(keys):
            where = zip(needed, store.stored(needed), pages.stored(needed), strict=True)
            unpublished = [key for key, here, there in where if here and not there]
            if not unpublished:
                continue
            try:
                pin = store.pin(unpublished)
            except KeyError:
                continue  # evicted just now
            with pin:
                for extent in dict.fromkeys(segment.extent for segment in pin.segments):
                    yield pages, extent

    def _upload(self, pages: SharedPages, extent: StoredExtent) -> tuple[Future[Published], _Upload] | None:
        if extent.path in self._vain:
            return None
        try:
            header = read_header(extent.path)
            if all(pages.stored(header.keys)):
                return None
            upload = _Upload(pages, extent.path, extent.number, header.keys, header.owner)
            if not self._within_quota(upload, extent.path.stat().st_size):
                return None
            return self._extents.publish(extent.path, self._shard), upload
        except (FileNotFoundError, BadExtent):
            return None  # evicted just now, or damaged: who restores it finds out
        except OSError as error:
            self._failed(error)
            return None

    def _within_quota(self, upload: _Upload, n_bytes: int) -> bool:
        """Whether the account may have so many bytes more. If not, others may be had back first that nobody needs."""
        self._over.pop(upload.path, None)
        owner = upload.owner
        if (limit := self._limits().get(owner)) is None:
            return True
        held, counted_s, full_s = self._held.get(owner, (0, -math.inf, -math.inf))
        now_s = self._clock()
        if now_s - counted_s >= _FOLLOW_S or (held + n_bytes > limit and now_s - full_s >= _FOLLOW_S):
            held, counted_s = self._rows.make_room(owner, n_bytes, limit), now_s
        within = held + n_bytes <= limit
        self._held[owner] = (held + n_bytes, counted_s, full_s) if within else (held, counted_s, now_s)
        if not within:
            mark = upload.pages.fingerprint
            self._over[upload.path] = (
                f"{shown(owner)} has {held:,} bytes in the shared store, and may have {limit:,}: an extent of "
                f"{n_bytes:,} bytes is not published"
            )
            self._over_from[mark] = min(upload.number, self._over_from.get(mark, upload.number))
            self.stats.over_quota += 1
        return within

    def _await(self, under_way: dict[Future[Published], _Upload]) -> None:
        done, _ = futures.wait([*under_way, self._closed], return_when=futures.FIRST_COMPLETED)
        if self._closing:
            for future in under_way:
                future.cancel()
            raise _Closing
        for future in done:
            upload = under_way.pop(future)
            try:
                published = future.result()
            except (TierError, OSError) as error:
                self._failed(error)
                self._publish_again(upload)
                continue
            self.stats.published += 1
            self.stats.new += published.new
            self.stats.bytes += published.n_bytes if published.new else 0
            self._unlisted.append((published, upload))

    def _publish_again(self, upload: _Upload) -> None:
        """Later. What is wanted of a session is, until it is there."""
        mark = upload.pages.fingerprint
        self._again[mark] = min(upload.number, self._again.get(mark, upload.number))
        self._saved.get(mark, set()).discard(upload.number)
        self._publish_anew(upload.keys)

    def _failed(self, error: Exception) -> None:
        """The guard has said what is wrong with the store, once."""
        self.stats.failed += 1
        self._paused_until_s = self._clock() + _PAUSE_S
        logger.debug("agentstate: an extent could not be published: %s", error)

    def _list_published(self) -> None:
        while self._unlisted:
            published, upload = self._unlisted[0]
            writer = self._engine().node
            try:
                number = self._rows.enlist(published, upload.keys, upload.owner, writer, self._miss)
            except BadExtent as error:
                self._failed(error)
                number = None
            except TierError as error:
                self._failed(error)
                return
            if number is not None:
                of = Listed(number, published.name, published.n_bytes, upload.owner, upload.keys)
                upload.pages.enter([of])
                if not all(upload.pages.stored(upload.keys)):
                    self._vain.add(upload.path)
            else:
                self._publish_again(upload)
            del self._unlisted[0]

    def _miss(self, number: int) -> None:
        """The row may be of before, and some session's KV promised in it."""
        self._missing.add(number)
        self._doom_missing()

    def _tell_manifests(self) -> None:
        """Say in SQL how much of the sessions' chains is published."""
        with self._changed:
            wanted = [*self._wanted.items(), *self._behind.items()]
        engine = self._engine()
        for session_id, one in wanted:
            keys, published = one.keys, self._pools.published(one.keys)
            if published < self._pools.durable(keys):
                paths = {extent.path for _, extent in self._of_chain(keys)}
                if not paths.isdisjoint(self._vain):
                    self._give_up(session_id, one)
                    continue
                one.refused = next((self._over[path] for path in paths if path in self._over), None)
                if one.refused is None:
                    continue
            told = not published
            if published:
                found = [
                    (pages.fingerprint, pages.ids_of(needed))
                    for _, pages, needed in self._pools.chains(keys[:published])
                ]
                if found[0][0].hex() != engine.fingerprint:
                    return  # other weights are being loaded
                ids = set().union(*(of_pool for _, of_pool in found))
                if self._pools.published(keys) < published:
                    continue  # one of them has left just now
                with self._database.write() as connection:
                    # Or somebody has begun to delete one of them.
                    told = catalogue.used(connection, ids) == ids and manifests.share(
                        connection,
                        session_id,
                        engine.fingerprint,
                        engine.rank,
                        engine.node,
                        tokens=published * self._pools.page_size,
                        last_key=keys[published - 1],
                    )
            one.promised = published if told else 0
            one.tellings += 1
            # Its newest manifest may not be there yet, and of a session that is deleted will never be.
            if told or one.tellings >= _TELLINGS:
                self._give_up(session_id, one)

    def _give_up(self, session_id: str, wanted: Publication) -> None:
        with self._changed:
            for waiting in (self._wanted, self._behind):
                if waiting.get(session_id) is wanted:
                    del waiting[session_id]
            self.stats.waiting = len(self._wanted) + len(self._behind)

    # What is deleted

    @property
    def _store(self) -> StoreName:
        engine = self._engine()
        return StoreName(engine.fingerprint, engine.rank, engine.node)

    def _erase_of_others(self) -> None:
        """Erase what other nodes are to erase. They do so themselves, but for one that is gone for good."""
        with self._database.read() as connection:
            told = erasures.elsewhere(connection, self._store, self._erased_to)
        new = [one.id for one in told if one.id not in self._erased_lately]
        for first in range(0, len(new), _BATCH):
            if self._closing:
                return
            some = new[first : first + _BATCH]
            with self._database.read() as connection:
                found = erasures.load(connection, some)
            self.erase([erasure.chain for erasure in found])
            self._erased_lately.update(some)
        since_us = max((one.created_us for one in told), default=0) - _OVERLAP_US
        self._erased_to = max((one.id for one in told if one.created_us < since_us), default=self._erased_to)
        self._erased_lately = {id for id in self._erased_lately if id > self._erased_to}

    def _erase_again(self, chains: Sequence[Chain]) -> None:
        """Erase what was on its way to the store when these were erased."""
        if chains and not self._unlisted:
            self._erase(chains)
            with self._changed:
                del self._erased[: len(chains)]

    def _delete_erased(self) -> None:
        """All that is doomed goes: of what was not erased, whoever reads it recomputes it."""
        now_s = self._clock()
        # By the database's clock, it may have been doomed a moment later.
        if now_s < min(self._erase_s, self._retake_s) + _MARGIN_S or not self._extents.tier.available:
            return
        retake_s, self._retake_s = self._retake_s, math.inf
        if not self._delete(_ERASE_S):
            self._retake_s = now_s + catalogue.RETAKE_S
        elif now_s < retake_s + _MARGIN_S:
            self._retake_s = retake_s
        with self._changed:
            next_s = self._erased_s + _ERASE_S
            self._erase_s = next_s if next_s + _MARGIN_S > now_s else math.inf

    def _collect(self) -> None:
        """Delete what nobody needs. Several ranks may do so at once."""
        if self._clock() - self._collected_s < _COLLECT_S or not self._extents.tier.available:
            return
        self._collected_s = self._clock()
        self._rows.doom_unneeded(self._keep_s)
        for owner, limit in self._limits().items():
            self._rows.make_room(owner, 0, limit)
        try:
            self._delete(_GRACE_S)
            for store, _ in self._pools.shared_pages():
                for _ in self._rows.doom_unlisted(f"{store.fingerprint.hex()}/{self._shard}", _GRACE_S):
                    pass
            self._rows.sweep(_GRACE_S)
        except TierError as error:
            self._failed(error)

    def _delete(self, after_s: float) -> bool:
        """Delete what has been doomed for so long: whether all of it is deleted."""
        try:
            for _ in self._rows.delete_doomed(after_s):
                self.stats.deleted += 1
        except TierError as error:
            self._failed(error)
            return False
        return True


def _listed(extent: catalogue.SharedExtent) -> Listed:
    return Listed(extent.id, extent.name, extent.nbytes, extent.owner, PageKeys(extent.keys))
