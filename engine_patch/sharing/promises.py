"""The sessions whose chains are to be published, and what SQL says of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agentstate.fleet import extents as catalogue
from agentstate.fleet import manifests
from agentstate.fleet.erasures import StoreName
from agentstate.pages import PageKeys
from engine_patch.sharing.context import Context
from engine_patch.sharing.uploads import Uploads

# How often SQL is told of one that it may not know yet.
TELLINGS = 60
# How many sessions wait to be published, at most. Of others, SQL tells.
_MOST_WAITING = 10_000
# Of what was stored before, so many sessions at once.
MOST_BEHIND = 16


@dataclass(eq=False)
class Publication:
    """A session's chain that is to be published. SQL says of its first ``promised`` pages that they are in the shared
    store, and nobody deletes them; it was told ``tellings`` times. ``refused`` says why no more of it is published."""

    keys: PageKeys
    promised: int = 0
    tellings: int = 0
    refused: str | None = None


class Promises:
    """Some are wanted now. Others are behind: what was stored before, which does not keep those waiting. ``news`` is
    set when there is more of the first. `publish` and `note` may be called from any thread."""

    def __init__(self, context: Context, uploads: Uploads, news: threading.Event):
        self._context, self._uploads, self._news = context, uploads, news
        self._mutex = threading.Lock()
        self._wanted: dict[str, Publication] = {}
        self._behind: dict[str, Publication] = {}
        # From where on SQL is asked for more that is behind, the newest first: None where there is none.
        self._behind_from: manifests.Place | None = None

    def publish(self, session_id: str, keys: Sequence[bytes]) -> Publication:
        """Want a session's stored chain to be published."""
        keys = PageKeys.of(keys)
        with self._mutex:
            publication = self._wanted.get(session_id)
            behind = self._behind.pop(session_id, None)
            if publication is None or publication.keys != keys:
                publication = behind if behind is not None and behind.keys == keys else Publication(keys)
                publication.tellings = 0
                self._wanted[session_id] = publication
                if len(self._wanted) > _MOST_WAITING:
                    del self._wanted[next(iter(self._wanted))]
                self._news.set()
            return publication

    def note(self, session_id: str, keys: Sequence[bytes]) -> None:
        """Have SQL say of a session's stored chain that it is published, which it seems to be."""
        with self._mutex:
            wanted = session_id in self._wanted or session_id in self._behind
        if keys and not wanted:
            self.publish(session_id, keys)

    def note_grown(self, session_ids: set[str]) -> None:
        """Have SQL say how much is published of these sessions' KV, some of which has been. Takes out those that are
        done with. Raises DatabaseError."""
        store, pools = self._context.store, self._context.pools
        for session_id in list(session_ids):
            with self._context.database.read() as connection:
                found = manifests.load(connection, session_id, store.fingerprint, store.rank, store.node)
            if found is not None:
                keys = found.page_keys()
                published = pools.published(keys)
                if published * pools.page_size > found.shared_tokens:
                    self.note(session_id, keys[:published])
            session_ids.discard(session_id)

    def wanted(self) -> list[PageKeys]:
        """The chains that are wanted now."""
        with self._mutex:
            chains = [publication.keys for publication in self._wanted.values()]
            self._context.stats.waiting = len(chains) + len(self._behind)
            return chains

    def look_behind(self) -> None:
        """From now on, look for what was stored before and is not published."""
        self._behind_from = manifests.NEWEST

    def behind(self) -> Iterator[PageKeys]:
        """The chains of what was stored before, the newest first. SQL is told of those that were published. Raises
        DatabaseError."""
        seen = set[str]()
        while True:
            with self._mutex:
                some = [(session_id, one) for session_id, one in self._behind.items() if session_id not in seen]
            for session_id, publication in some:
                yield publication.keys
                seen.add(session_id)
                # Of some a page cannot be published, whatever is tried: they do not keep others waiting for good.
                publication.tellings += 1
                if publication.tellings >= TELLINGS:
                    self._give_up(session_id, publication)
            if some:
                self.tell()
            if not self._find_behind():
                return

    def _find_behind(self) -> bool:
        """Ask SQL for more sessions of which not all is published, if there is room for them: whether some were
        found."""
        room = MOST_BEHIND - len(self._behind)
        if self._behind_from is None or not room:
            return False
        store = self._context.store
        with self._context.database.read() as connection:
            found = manifests.unshared(connection, store.fingerprint, store.rank, store.node, room, self._behind_from)
        self._behind_from = found[-1].place if len(found) == room else None
        with self._mutex:
            for one in found:
                if one.session_id not in self._wanted and one.session_id not in self._behind:
                    self._behind[one.session_id] = Publication(PageKeys.of(one.keys))
        return bool(found)

    def tell(self) -> None:
        """Say in SQL how much of the chains is published. Raises DatabaseError: the next time goes on."""
        with self._mutex:
            waiting = [*self._wanted.items(), *self._behind.items()]
        store, pools = self._context.store, self._context.pools
        for session_id, one in waiting:
            published = pools.published(one.keys)
            if published < pools.durable(one.keys):
                paths = {extent.path for _, extent in self._context.unpublished(one.keys)}
                if any(self._uploads.in_vain(path) for path in paths):
                    self._give_up(session_id, one)
                    continue
                one.refused = next(filter(None, map(self._uploads.over_quota, paths)), None)
                if one.refused is None:
                    continue
            told = not published
            if published:
                found = [(pages.fingerprint, pages.ids_of(of)) for _, pages, of in pools.chains(one.keys[:published])]
                if found[0][0].hex() != store.fingerprint:
                    return  # other weights are being loaded
                if pools.published(one.keys) < published:
                    continue  # one of them has left just now
                told = self._promise(store, session_id, one.keys[:published], set().union(*(ids for _, ids in found)))
            one.promised = published if told else 0
            one.tellings += 1
            # Its newest manifest may not be there yet, and of a session that is deleted will never be.
            if told or one.tellings >= TELLINGS:
                self._give_up(session_id, one)

    def _promise(self, store: StoreName, session_id: str, keys: Sequence[bytes], ids: set[int]) -> bool:
        """Whether SQL says now that a chain is in the shared store, in the extents with these ids."""
        with self._context.database.write() as connection:
            # Or somebody has begun to delete one of them.
            return catalogue.used(connection, ids) == ids and manifests.share(
                connection,
                session_id,
                store.fingerprint,
                store.rank,
                store.node,
                tokens=len(keys) * self._context.pools.page_size,
                last_key=keys[-1],
            )

    def _give_up(self, session_id: str, publication: Publication) -> None:
        with self._mutex:
            for waiting in (self._wanted, self._behind):
                if waiting.get(session_id) is publication:
                    del waiting[session_id]
            self._context.stats.waiting = len(self._wanted) + len(self._behind)
