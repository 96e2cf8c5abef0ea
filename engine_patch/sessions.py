"""The sessions of one rank: how far each is stored, its manifest, and bringing its pages nearer before they are asked
for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from enum import Enum, auto
from itertools import groupby
from typing import Any, Protocol

from agentstate.errors import EngineError
from agentstate.fleet import turns
from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import KvState, Manifest, split_keys
from agentstate.fleet.quotas import Quota
from agentstate.fleet.turns import Turn
from agentstate.pages import PLANNED, Need, PageKeys, Urgency
from agentstate.settings import Settings
from agentstate.sql.database import Database
from engine_patch.accounts import Accounts
from engine_patch.catalog import Catalog
from engine_patch.erasing import Eraser, ErasureStats
from engine_patch.ledger import Ledger
from engine_patch.sglang_api import RadixKey, get_storage_hash_str
from engine_patch.sharing import Publication, Sharing
from engine_patch.stored_pools import StoredPools
from engine_patch.turns import RequestSession

logger = logging.getLogger(__name__)


# A later due time counts as this one: what has been read is kept until then.
_LATEST_DUE_S = 600.0
# Of a map of pages.
_PARTS = 256


class Progress(Enum):
    """How far a prefetch to the device is. It fails when a page cannot be used, or when there is not enough memory."""

    RUNNING = auto()
    DONE = auto()
    FAILED = auto()


class Device(Protocol):
    """What can be asked of the radix tree for a session. From any thread."""

    def prefetch(self, session_id: str, keys: list[bytes], need: Need) -> Callable[[], Progress] | None:
        """Bring the pages ``keys`` into the tree: what tells how far that is. None where it cannot be done."""


class Sessions:
    """Thread-safe. `close` writes the manifests that wait, and must come while the stores are open.

    ``stores`` says whether what requests compute is stored at all: while it is not, nothing is said about them.
    ``dead`` are the stores whose manifests go (`Space.take_dead`). ``accounts`` is told who proves which account, and
    ``take`` what SQL says of quotas and pins (`Catalog`). ``writer`` is the rank that stores the pages of this one, if
    it is another: it says in SQL what is stored, publishes it and erases it, for its whole group.
    """

    def __init__(
        self,
        pools: StoredPools,
        engine: Engine,
        database: Database,
        settings: Settings,
        *,
        page_size: int,
        stores: Callable[[], bool],
        dead: Callable[[], list[tuple[str, int]]],
        accounts: Accounts | None = None,
        take: Callable[[Mapping[str, Quota], Mapping[str, tuple[str, float]]], None] = lambda quotas, pins: None,
        sharing: Sharing | None = None,
        writer: int | None = None,
    ):
        self._sharing = sharing
        self._speaks = writer is None or writer == engine.rank
        self._shares_all = settings.share == "through"
        self._shares_suspended = settings.share != "evict"
        self.device: Device | None = None
        self._accounts = accounts = accounts or Accounts()
        # Until when a session is pinned, by the monotonic clock.
        self.pinned_until: Callable[[str], float | None] = lambda session_id: None
        self._page_size = page_size
        self._stores = stores
        self._prefetch_ttl_s = settings.prefetch_ttl_s
        self._engine = engine
        self._pools = pools
        self._ledger = Ledger(page_size, pools.n_bytes, pools.durable)
        # Of each session, the newest request whose pages are not stored yet: its ticket and its tokens.
        self._unsettled: dict[str, tuple[object, RadixKey]] = {}
        self._settling = threading.Lock()
        # That a request proved no turn, which is said once.
        self._warned = False
        self._catalog = Catalog(
            database,
            engine,
            settings.heartbeat_interval_s,
            saved=self._ledger.saved,
            refused=self._ledger.refused,
            needed=pools.need_only,
            stored=self._still_stored,
            held=pools.held,
            losers=pools.take_losers,
            dead=dead,
            n_bytes=pools.n_bytes,
            told=take,
            reads=pools.reads,
            writer=writer,
        )

        erase = {} if sharing is None else {"shared": sharing.erase}
        self._eraser = (
            Eraser(database, engine, pools, self._catalog, self._unsettled_keys, **erase) if self._speaks else None
        )

    def stop_erasing(self) -> bool:
        """Erase nothing any more; False where the drive keeps it from ending. Before the stores are closed, or others
        take their place."""
        return self._eraser is None or self._eraser.close()

    def close(self) -> None:
        self.stop_erasing()
        self._catalog.close()

    @property
    def erasures(self) -> dict[str, int]:
        """What of sessions that are gone waits to be erased, and what has been erased."""
        return asdict(ErasureStats() if self._eraser is None else self._eraser.stats)

    def turn(self, session: RequestSession) -> Turn | None:
        """The turn that a request's token proves, or None."""
        key = self._catalog.signing_key
        found = None if key is None or session.token is None else turns.verify(key, str(session), session.token)
        if found is not None:
            self._accounts.note(found.session_id, found.account)
        elif not self._warned:
            self._warned = True
            remedy = "send the extra_body of `resume` as it is" if key else "the database has not answered yet"
            logger.warning(
                "agentstate: a request of session %.60r proves no turn: it is served, but the session's KV is not kept "
                "track of; %s (said once)",
                str(session),
                remedy,
            )
        return found

    def finished(self, turn: Turn, key: RadixKey) -> None:
        """A request of a turn has ended with the tokens of ``key`` in the tree: publish the session's manifest as soon
        as its pages are stored. Its keys are computed on the spilling thread, not the scheduler's."""
        session_id = turn.session_id
        if not self._stores():
            # What is stored is not its newest request's any more.
            self._ledger.forget(session_id)
            return
        if (request := self._ledger.finished(turn)) is None:
            # A later turn speaks for the session.
            self._abandon(session_id, key)
            return
        ticket = object()
        with self._settling:
            _, before = self._unsettled.get(session_id, (None, key))
            self._unsettled[session_id] = ticket, key
        if not _goes_on(before, key):
            self._abandon(session_id, before)

        def settle() -> None:
            with self._settling:
                newest, key = self._unsettled.get(session_id, (None, None))
                if newest is not ticket:
                    # The manifest is that of the newest request, whose turn is still to come. So a drive that hangs
                    # keeps the tokens of one request a session, and not of all.
                    return
                del self._unsettled[session_id]
            keys = self._keys(key)
            durable = self._pools.durable(keys, use=True)
            if self._stores():
                if left := self._ledger.settled(session_id, request, keys, durable, turn.epoch):
                    self._pools.supersede(left, session_id)
            else:
                self._ledger.forget(session_id)
            self._pools.need(session_id, keys[:durable])
            if (until_s := self.pinned_until(session_id)) is not None:
                self._pools.retain(keys[:durable], until_s)
            self._pools.merge(keys[:durable])
            manifest = self._manifest(turn, keys, durable)
            if not self._speaks:
                # The writer's is in SQL, or will be: who asks how far the session is asks the writer as well.
                self._ledger.saved(manifest)
                return
            if self._sharing is not None and self._shares_all:
                self._sharing.publish(session_id, keys[:durable])
            self._catalog.save(manifest)
            if self._sharing is not None:
                self._sharing.note(session_id, keys[: self._pools.published(keys[:durable])])
            self._catalog.abandon(session_id, keys, durable)

        self._pools.then(settle)

    def _unsettled_keys(self) -> Iterator[bytes]:
        """The pages of requests that have ended and are not settled yet."""
        with self._settling:
            ended = [key for _, key in self._unsettled.values()]
        for key in ended:
            yield from self._keys(key)

    def _abandon(self, session_id: str, key: RadixKey) -> None:
        """Remember, once they are stored, pages of a session that no manifest is to list: they are erased with it."""
        if self._speaks:
            self._pools.then(lambda: self._catalog.abandon(session_id, self._keys(key), 0))

    def _keys(self, key: RadixKey) -> PageKeys:
        return PageKeys.from_hex(get_storage_hash_str(key, page_size=self._page_size))

    def kept(self) -> dict[str, int]:
        return {"unsettled_sessions": len(self._unsettled), "unsaved_manifests": self._catalog.waiting}

    def _still_stored(self, keys: Sequence[bytes]) -> int:
        """How many pages of a chain that was stored may be still: all, before it is known what the shared store has."""
        return self._pools.durable(keys) if self._pools.shared_known else len(keys)

    def flush(self, session_id: str, *, shared: bool = False) -> Callable[[], dict[str, Any]]:
        """What answers a ``flush`` as of now, asked every few milliseconds while it is ``pending``. Once the session's
        pages are stored they are published in the shared store, if there is one and the policy says so, and are
        ``pending`` until SQL promises them, if they are to be ``shared``. So are those of a session of which this node
        has not all: no copy of it would be durable otherwise. Then it raises EngineError if they are not published for
        now. A rank that another one writes for leaves that to the other one's answer."""
        sharing = self._sharing
        stored: dict[str, Any] = {}
        publication: Publication | None = None
        must = shared

        def answer() -> dict[str, Any]:
            nonlocal stored, publication, must
            if publication is None:
                stored = self.standing(session_id)
                if sharing is None or stored["state"] == KvState.PENDING.value or not stored["pages"]:
                    return stored
                if not self._speaks:
                    return {**stored, "shared_tokens": stored["tokens"]}
                keys = self._chain(session_id)[: stored["pages"]]
                must = shared or not self._pools.here(keys)
                if not must and not self._shares_suspended and self._pools.published(keys) < len(keys):
                    return stored
                publication = sharing.publish(session_id, keys)
            promised = publication.promised
            missing = must and promised < len(publication.keys)
            if missing and (reason := sharing.refused(publication)) is not None:
                raise EngineError(reason)
            pending = {"state": KvState.PENDING.value} if missing else {}
            return {**stored, **pending, "shared_tokens": promised * self._page_size}

        return answer

    def standing(self, session_id: str) -> dict[str, Any]:
        """How far the session is stored on this node, as of which turn."""
        epoch = self._ledger.epoch(session_id)  # before what it is about: a newer request's counts for none before it
        standing = self._ledger.standing(session_id)
        if standing is None and self._stores() and (manifest := self._catalog.load(session_id)) is not None:
            keys = manifest.page_keys()
            lost = manifest.lost_tokens // self._page_size
            standing, epoch = self._ledger.remembered(self._pools.durable(keys), len(keys) + lost), manifest.epoch
        return {**(standing or {"state": "unknown", "tokens": 0, "pages": 0, "bytes": 0}), "epoch": epoch}

    def prefetch(
        self,
        session_id: str,
        tier: str,
        packed: bytes | None,
        due_s: float | None = None,
        *,
        planned: bool = False,
    ) -> Callable[[], dict[str, Any]]:
        """Begin to bring a session's pages nearer, those of ``packed`` or all that are known: what tells how far that
        is, as of now. Goes on with what has begun already. They are needed ``due_s`` from now (None: at once): of
        several sessions' pages, those that are due first are read first, and those that are only ``planned`` last.

        ``tier`` is ``device`` or ``host``; where the device cannot be reached (`Device`), host memory is.
        """
        if tier not in ("host", "device"):
            raise ValueError(f"tier {tier!r} is neither host nor device")
        chain = self._chain(session_id) if packed is None else split_keys(packed)
        keys = chain[: self._pools.reachable(chain)] if self._stores() else []
        whole = "warm" if len(keys) == len(chain) else "partial"
        if not keys:
            return lambda: self._answer("cold", 0, tier)
        due_s = min(due_s or 0.0, _LATEST_DUE_S)
        need = PLANNED if planned else Need(Urgency.DUE, time.monotonic() + due_s)
        device = self.device.prefetch(session_id, keys, need) if tier == "device" and self.device else None
        if device is not None:
            states = {Progress.RUNNING: "pending", Progress.DONE: whole, Progress.FAILED: "cold"}
            return lambda: self._answer(states[device()], len(keys), tier)
        staged = self._pools.prefetch(session_id, keys, due_s + self._prefetch_ttl_s, need)

        def answer() -> dict[str, Any]:
            if (fraction := staged()) is None:
                return self._answer("pending", len(keys), "host")
            if fraction == 1:
                return self._answer(whole, len(keys), "host")
            # A part of every page, by layers: so much less of it is left to be read.
            pages = int(fraction * len(keys))
            return self._answer("partial" if pages else "cold", pages, "host")

        return answer

    def size(self, session_id: str) -> int:
        """How many pages of the session are stored."""
        return self._pools.durable(self._chain(session_id))

    def retain(self, session_id: str, until_s: float) -> int:
        """Keep the session's pages on the drive until then, by the monotonic clock: of how many pages, from its head,
        that is done. A time in the past ends it."""
        return self._pools.retain(self._chain(session_id), until_s)

    def places(self, session_id: str) -> dict[str, int]:
        """How many pages from the head of the session's context are on disk, and in the host tier."""
        chain = self._chain(session_id)
        in_memory = self._pools.in_host_memory(chain)
        return {"disk": self._pools.on_node(chain), "host": [*in_memory, False].index(False)}

    def page_map(self, session_id: str, on_device: int) -> dict[str, Any]:
        """Where each page of the session's context is, of which so many from its head are ``on_device``: in the order
        of its tokens, a part for as many as are in the same places. Parts beyond `_PARTS` are left out; ``more_tokens``
        says how many tokens these have."""
        chain = self._chain(session_id)
        length = max(len(chain), on_device)
        rest: list[Any] = [None] * (length - len(chain))
        extents = [*self._pools.extent_names(chain), *((None, None) for _ in rest)]
        in_memory = [*self._pools.in_host_memory(chain), *(False for _ in rest)]
        places = [
            (page < on_device, host, *of_page)
            for page, (host, of_page) in enumerate(zip(in_memory, extents, strict=True))
        ]
        parts: list[dict[str, Any]] = []
        first = 0
        for place, alike in groupby(places):
            if len(parts) == _PARTS:
                break
            pages = sum(1 for _ in alike)
            where = dict(zip(("device", "host", "extent", "shared_extent"), place, strict=True))
            parts.append({"first": first * self._page_size, "tokens": pages * self._page_size, **where})
            first += pages
        return {"page_map": parts, "more_tokens": (length - first) * self._page_size}

    def demoted(self, session_id: str) -> dict[str, Any]:
        """The answer for a session whose pages are the first that the device evicts."""
        return self._answer("demoted", len(self._ledger.chain(session_id) or ()), "device")

    def _chain(self, session_id: str) -> list[bytes]:
        """The session's pages that were stored when its newest request had ended."""
        if (keys := self._ledger.chain(session_id)) is not None:
            return keys
        manifest = self._catalog.load(session_id) or self._catalog.elsewhere(session_id)
        return [] if manifest is None else manifest.page_keys()

    def _answer(self, state: str, pages: int, tier: str) -> dict[str, Any]:
        """``pages`` are those that the state is about; nothing of a session that is ``cold`` is anywhere."""
        pages = 0 if state == "cold" else pages
        tokens = pages * self._page_size
        return {"state": state, "tokens": tokens, "pages": pages, "bytes": self._pools.n_bytes(pages), "tier": tier}

    def _manifest(self, turn: Turn, keys: Sequence[bytes], durable: int) -> Manifest:
        return Manifest(
            session_id=turn.session_id,
            fingerprint=self._engine.fingerprint,
            rank=self._engine.rank,
            node=self._engine.node,
            engine_id=self._engine.id,
            page_size=self._page_size,
            tokens=durable * self._page_size,
            keys=b"".join(keys[:durable]),
            nbytes=self._pools.n_bytes(durable),
            lost_tokens=(len(keys) - durable) * self._page_size,
            epoch=turn.epoch,
            account=turn.account,
        )


def _goes_on(before: RadixKey, key: RadixKey) -> bool:
    """Whether the pages of ``key`` include those of ``before``."""
    tokens = before.raw_token_ids()
    namespaces = [(one.extra_key, one.cache_salt) for one in (before, key)]
    return namespaces[0] == namespaces[1] and key.raw_token_ids()[: len(tokens)] == tokens
