"""Write-behind of pages, device → staging → extent, in the order in which the tree offered them."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

import torch

from agentstate.errors import OwnerFull, PageStoreError, PageStoreFull
from agentstate.pages import ExtentDraft, LayerwiseReader, PageKeys, PageStore, Writer, merge
from engine_patch.offers import Answered, Offer, Offers
from engine_patch.staging import PinnedMemory
from engine_patch.transfer import DevicePages, PageNumbers

logger = logging.getLogger(__name__)


# Extra time `close` gives to writes that are already running.
_GRACE_S = 1.0
# Bound of the keys of chains whose extents may be merged.
_CHAINS_BYTES = 16 << 20
_MOST_SEEN = 1 << 18
# Merging needs little to read: it runs when there is nothing else to do.
_MERGE_STAGING_BYTES = 8 << 20


@dataclass
class SpillStats:
    """Counters since the engine started. ``pages_known`` were offered again and not written again; ``pages_linked``
    were not written because another engine of this machine had written them; ``pages_skipped`` were not written because
    the drive did not answer, spilling was off, or the engine ended. Of requests without a turn, ``pages_over_budget``
    were not written because as much as a day may have had been, and ``pages_one_shot`` because no second request had
    used them. ``extents_merged`` were replaced by larger ones."""

    pages_spilled: int = 0
    bytes_spilled: int = 0
    pages_known: int = 0
    pages_linked: int = 0
    pages_skipped: int = 0
    pages_failed: int = 0
    pages_over_budget: int = 0
    pages_one_shot: int = 0
    extents_merged: int = 0


class _Seen:
    """Which request was the first to use a page that is not stored: of the newest 262,144 pages, some 30 MiB."""

    def __init__(self) -> None:
        self._first: dict[bytes, str] = {}

    def before(self, key: bytes, rid: str) -> bool:
        """Whether another request than ``rid`` has used a page, now that this one does."""
        if self._first.setdefault(key, rid) != rid:
            return True
        if len(self._first) > _MOST_SEEN:
            del self._first[next(iter(self._first))]
        return False


class Spiller:
    """Stores what `offer` queues: one thread copies pages out of the device, another publishes them. A page is written
    once: keys that are stored or on their way are skipped. This is decided when an offer's turn comes, so that an
    earlier offer of the same page counts.

    Every offer gets one entry in ``results`` (`Offers`). ``staging_bytes`` bounds the copy out of the device. An offer
    made while ``on`` is false is answered as not stored. When the drive has taken no extent for ``timeout_s``, every
    unanswered offer is answered so too, and so is every new offer until the drive takes an extent. Copies that were
    made are written all the same; the others are not made. The tree offers those pages again.

    Without ``one_shots``, what is charged to nobody is written once a second request offers it; so is what ``shared``,
    if it is given, says that the shared store has. The tree offers what is not stored again whenever a request that has
    not offered it yet ends with it. ``adopt``, if it is given, stores some of the pages that are to be written without
    writing them (`Replicas.adopt`).
    """

    def __init__(
        self,
        store: PageStore,
        pages: DevicePages,
        staging_bytes: int,
        timeout_s: float = math.inf,
        *,
        one_shots: bool = True,
        shared: Callable[[Sequence[bytes]], list[bool]] | None = None,
        adopt: Callable[[Sequence[bytes]], set[bytes]] | None = None,
    ):
        self.stats = SpillStats()
        self.on = True
        self._timeout_s = timeout_s
        self._offers = Offers(timeout_s, self._abandoned, self._skipped)
        self._one_shots, self._shared, self._adopt = one_shots, shared, adopt
        self._seen = _Seen()
        self._store = store
        self._pages = pages
        self._writer = Writer(store, staging_bytes)
        self._pinned = PinnedMemory(self._writer.staging, pages.device)
        # Copied and not yet published.
        self._on_their_way: set[bytes] = set()
        self._merge_reader = LayerwiseReader(store.geometry, staging_bytes=_MERGE_STAGING_BYTES, threads=1)
        self._until_s = math.inf
        # Chains to look for small extents in, by their last keys.
        self._chains: dict[bytes, PageKeys] = {}
        self._chains_bytes = 0
        # The reason last logged for not storing pages; None once some have been stored since.
        self._said: tuple[object, ...] | None = None
        self._thread = threading.Thread(target=self._run, name="agentstate-spill", daemon=True)
        self._thread.start()

    def offer(
        self,
        keys: Sequence[bytes],
        numbers: torch.Tensor | PageNumbers,
        ready: Sequence[torch.Event] = (),
        session_id: str | None = None,
        owner: str = "",
        rid: str = "",
    ) -> None:
        """Queue pages for writing: ``numbers`` are their page numbers on the device, which the caller keeps unchanged
        until the result is in. ``ready`` are the events after which the device pages may be read. The pages of a
        session count as needed by it as soon as they are written, and their bytes are charged to ``owner``. ``rid`` is
        the request that they are of."""
        # Decide here, but answer in turn: ranks learn of it at different times, and each must answer every offer.
        self._offers.add(Offer(keys, numbers, ready, skipped=not self.on, session_id=session_id, owner=owner, rid=rid))

    @property
    def results(self) -> deque[bool]:
        return self._offers.results

    def answered(self) -> int:
        """`Offers.answered`."""
        return self._offers.answered()

    def _abandoned(self, count: int) -> None:
        logger.error(
            "agentstate: the drive has taken nothing for %g s; %d offer(s) are not waited for, and of what comes "
            "nothing is stored until it goes on (AGENTSTATE_DRIVE_TIMEOUT_S)",
            self._timeout_s,
            count,
        )

    def _skipped(self, pages: int) -> None:
        self.stats.pages_skipped += pages

    def then(self, action: Callable[[], None]) -> None:
        """Run ``action`` on a spilling thread once everything offered so far is stored or has failed."""
        self._offers.put(action)

    def merge(self, chain: Sequence[bytes]) -> None:
        """Merge the small extents of a stored chain when there is nothing else to do."""
        keys = PageKeys.of(chain)
        self.then(lambda: self._offers.put(keys))

    @property
    def waiting(self) -> int:
        """Offers and actions that are queued or being worked on."""
        return self._offers.waiting

    def kept(self) -> dict[str, int]:
        return {
            **self._offers.kept(),
            "pages_on_their_way": len(self._on_their_way),
            "chains_to_merge": len(self._chains),
            "drafts": self._writer.in_use,
            **self._merge_reader.kept(),
        }

    def drain(self) -> None:
        """Wait until everything queued so far is done."""
        self._offers.drain()

    def close(self, within_s: float = math.inf) -> bool:
        """Store what is queued, but begin no extent later than ``within_s`` from now. Returns False, and closes
        nothing, if something still waits for the drive a little later."""
        self._until_s = time.monotonic() + within_s
        self._offers.end()
        patience_s = None if within_s == math.inf else within_s + _GRACE_S
        self._thread.join(patience_s)
        try:
            if self._thread.is_alive():
                raise TimeoutError
            self._writer.after(lambda: None).result(patience_s)
        except TimeoutError:
            logger.error("agentstate: the drive does not answer; what waits to be stored is left")
            return False
        self._writer.close()
        self._merge_reader.close()
        self._pinned.close()
        return True

    def _run(self) -> None:
        while (item := self._next()) is not None:
            if isinstance(item, Offer):
                self._store_offer(item)
            elif isinstance(item, PageKeys):
                self._remember(item)
                self._offers.done()
            else:
                self._writer.after(partial(self._act, item))
        self._offers.done()

    def _act(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            logger.exception("agentstate: an action that had waited for pages to be stored failed")
        finally:
            self._offers.done()

    def _next(self) -> Offer | Callable[[], None] | PageKeys | None:
        while self._chains and self._offers.empty and self._until_s == math.inf:
            self._merge_one()
        taken = self._offers.take()
        return None if taken is None else taken[1]

    def _merge_one(self) -> None:
        """Merge one run, so that what arrives in the meantime waits for no more than that."""
        last, chain = next(iter(self._chains.items()))
        replaced = 0
        try:
            if not self._store.wear.spent():
                with self._writer.memory() as memory:
                    replaced = merge(self._store, self._merge_reader, chain, memory, most_runs=1)
        except (KeyError, PageStoreFull) as error:
            # Evicted or dropped in the meantime, or no room for a second copy.
            logger.debug("agentstate: not merged: %s", error)
        except Exception:
            logger.exception("agentstate: merging failed; the extents stay as they are")
        self.stats.extents_merged += replaced
        self._offers.moved()
        if not replaced:
            self._forget(last)

    def _remember(self, chain: PageKeys) -> None:
        """Merge along a chain when there is time. If the chains take too much memory, forget the oldest, which stay
        unmerged."""
        self._forget(chain[-1])
        self._chains[chain[-1]] = chain
        self._chains_bytes += len(chain.packed)
        while self._chains_bytes > _CHAINS_BYTES:
            self._forget(next(iter(self._chains)))

    def _forget(self, last: bytes) -> None:
        self._chains_bytes -= len(self._chains.pop(last, PageKeys()).packed)

    def _store_offer(self, offer: Offer) -> None:
        """Copy the new pages of an offer, and have it concluded when they are published."""
        skipped = offer.skipped or offer.answered or time.monotonic() > self._until_s
        new: list[int] = []
        publishing: list[tuple[list[bytes], Future[None]]] = []
        failure: Exception | None = None
        late = barred = linked = 0
        try:
            # In this order: a page published in the meantime leaves `_on_their_way` and is then found stored.
            if not skipped:
                self._store.attend()
            every = [] if skipped else list(offer.keys)
            unknown = [i for i, key in enumerate(every) if key not in self._on_their_way]
            stored = self._store.stored([every[i] for i in unknown])
            missing = [i for i, is_stored in zip(unknown, stored, strict=True) if not is_stored]
            new = missing if offer.owner else self._admitted(offer, missing)
            barred = len(missing) - len(new)
            if new and self._adopt is not None:
                adopted = self._adopted(offer, [every[i] for i in new])
                linked, new = len(adopted), [i for i in new if every[i] not in adopted]
            if new:
                self._pages.outbound.after(offer.ready)
            for start in range(0, len(new), self._writer.pages_an_extent):
                if start and time.monotonic() > self._until_s:
                    late = len(new) - start
                    break
                run = new[start : start + self._writer.pages_an_extent]
                keys = [every[i] for i in run]
                published = self._writer.write(keys, partial(self._fill, offer, offer.numbers[run]), offer.owner)
                published.add_done_callback(partial(self._published, offer, keys))
                publishing.append((keys, published))
                self._on_their_way.update(keys)
        except Answered:
            late = len(new) - start
        except Exception as error:
            failure = error
        known = len(offer.keys) - len(new) - barred - linked
        self._writer.after(partial(self._conclude, offer, skipped, known, len(new), late, publishing, failure))

    def _adopted(self, offer: Offer, keys: list[bytes]) -> set[bytes]:
        """Those of ``keys`` that need not be written, because another engine of this machine has."""
        assert self._adopt is not None
        adopted = self._adopt(keys)
        self.stats.pages_linked += len(adopted)
        if adopted and offer.session_id:
            self._store.need(adopted, offer.session_id)
        return adopted

    def _admitted(self, offer: Offer, missing: list[int]) -> list[int]:
        """Those pages of an offer, which is charged to nobody, that are written."""
        if missing and self._store.wear.spent():
            self.stats.pages_over_budget += len(missing)
            return []
        shared = [False] * len(missing) if self._shared is None else self._shared([offer.keys[i] for i in missing])
        written = [
            i
            for i, there in zip(missing, shared, strict=True)
            if (self._one_shots and not there) or self._seen.before(offer.keys[i], offer.rid)
        ]
        self.stats.pages_one_shot += len(missing) - len(written)
        return written

    def _published(self, offer: Offer, keys: list[bytes], published: Future[None]) -> None:
        self._offers.moved()
        if offer.session_id and published.exception() is None:
            # Before anything further is published: in a store full of needed pages, these would be evicted for it.
            self._store.need(keys, offer.session_id)

    def _conclude(
        self,
        offer: Offer,
        skipped: bool,
        known: int,
        new: int,
        late: int,
        publishing: Sequence[tuple[list[bytes], Future[None]]],
        failure: Exception | None,
    ) -> None:
        """Count and answer an offer, on the publishing thread. ``known`` of its pages were stored, or on their way;
        ``new`` were to be written, and it was too late for the last ``late`` of them."""
        stored = False
        try:
            spilled = 0
            for keys, published in publishing:
                if (error := published.exception()) is None:
                    spilled += len(keys)
                else:
                    failure = failure or error
                self._on_their_way.difference_update(keys)
            self.stats.pages_spilled += spilled
            self.stats.bytes_spilled += spilled * self._store.geometry.page_bytes
            self.stats.pages_failed += new - late - spilled
            if not skipped:
                self.stats.pages_known += known
            # Pages that were on their way for an earlier offer must have arrived too.
            stored = not skipped and all(self._store.stored(offer.keys))
            if isinstance(failure, OwnerFull):
                # Who is at its limit fails for as long as it is, and the store has said so.
                pass
            elif failure is not None:
                self._complain(failure)
            elif spilled:
                self._said = None
        except Exception:
            logger.exception("agentstate: an offer could not be concluded; its pages count as not stored")
        finally:
            self._store.conclude(self._offers.conclude(offer, stored, len(offer.keys) if skipped else late))
            self._offers.done()

    def _complain(self, failure: Exception) -> None:
        """Log why pages are not stored. The disk's state takes one line, and is logged once until some are stored."""
        if not isinstance(failure, PageStoreError | OSError):
            logger.error("agentstate: spilling failed; the pages are recomputed when they are needed", exc_info=failure)
            return
        said, self._said = self._said, (type(failure), getattr(failure, "errno", None))
        level = logging.DEBUG if said == self._said else logging.WARNING
        logger.log(level, "agentstate: pages are not stored, and recomputed when they are needed: %s", failure)

    def _fill(self, offer: Offer, numbers: torch.Tensor, draft: ExtentDraft) -> None:
        components = range(len(draft.geometry.component_bytes))
        with self._offers.copying(offer):
            try:
                place = self._pages.place(numbers, self._pages.outbound)
                for layer in range(draft.geometry.layers):
                    self._pages.gather(layer, place, [draft.component(layer, c) for c in components])
                    if self._pages.outbound.immediate:
                        draft.sum_up(layer)
            finally:
                # Nothing may arrive in the buffer any more when it is checksummed, or used for something else.
                self._pages.outbound.finish()
