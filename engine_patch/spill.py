"""Write-behind of pages, device → staging → extent, in the order in which the tree offered them."""

from __future__ import annotations

import logging
import math
import queue
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
from engine_patch.staging import PinnedMemory
from engine_patch.transfer import DevicePages, PageNumbers

logger = logging.getLogger(__name__)


# Extra time `close` gives to writes that are already running.
_GRACE_S = 1.0
# Bound of the keys of chains whose extents may be merged.
_CHAINS_BYTES = 16 << 20
# Merging needs little to read: it runs when there is nothing else to do.
_MERGE_STAGING_BYTES = 8 << 20


@dataclass
class SpillStats:
    """Counters since the engine started. ``pages_known`` were offered again and not written again; ``pages_skipped``
    were not written because the drive did not answer, spilling was off, or the engine ended; ``extents_merged`` were
    replaced by larger ones."""

    pages_spilled: int = 0
    bytes_spilled: int = 0
    pages_known: int = 0
    pages_skipped: int = 0
    pages_failed: int = 0
    extents_merged: int = 0


@dataclass
class _Offer:
    keys: Sequence[bytes]
    numbers: torch.Tensor | PageNumbers
    ready: Sequence[torch.Event]
    skipped: bool
    session_id: str | None
    owner: str
    # Whether its device pages are being read, and whether its result is in: after that they are read no more.
    copying: bool = False
    answered: bool = False


class _Abandoned(Exception):
    """The offer has been answered, so its device pages may have changed."""


class Spiller:
    """Stores what `offer` queues: one thread copies pages out of the device, another publishes them. A page is written
    once: keys that are stored or on their way are skipped. This is decided when an offer's turn comes, so that an
    earlier offer of the same page counts.

    Every offer gets one entry in ``results``, in the order of the offers, never earlier: the tree takes a result for
    its oldest offer, and unlocks that one's device pages. ``staging_bytes`` bounds the copy out of the device. An offer
    made while ``on`` is false is answered as not stored. When the drive has taken no extent for ``timeout_s``, every
    unanswered offer is answered so too, except one that is being copied at that moment, and so is every new offer until
    the drive takes an extent. Copies that were made are written all the same; the others are not made. The tree offers
    those pages again.
    """

    def __init__(self, store: PageStore, pages: DevicePages, staging_bytes: int, timeout_s: float = math.inf):
        self.stats = SpillStats()
        self.on = True
        self.results: deque[bool] = deque()
        self._timeout_s = timeout_s
        # The unanswered offers, in order; how many offers are not concluded, answered or not; and when the drive last
        # took something of theirs.
        self._unanswered: deque[_Offer] = deque()
        self._unconcluded = 0
        self._moved_s = time.monotonic()
        self._answering = threading.Lock()
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
        self._queue: queue.Queue[_Offer | Callable[[], None] | PageKeys | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="agentstate-spill", daemon=True)
        self._thread.start()

    def offer(
        self,
        keys: Sequence[bytes],
        numbers: torch.Tensor | PageNumbers,
        ready: Sequence[torch.Event] = (),
        session_id: str | None = None,
        owner: str = "",
    ) -> None:
        """Queue pages for writing: ``numbers`` are their page numbers on the device, which the caller keeps unchanged
        until the result is in. ``ready`` are the events after which the device pages may be read. The pages of a
        session count as needed by it as soon as they are written, and their bytes are charged to ``owner``."""
        # Decide here, but answer in turn: ranks learn of it at different times, and each must answer every offer.
        offer = _Offer(keys, numbers, ready, skipped=not self.on, session_id=session_id, owner=owner)
        with self._answering:
            if not self._unanswered and self._hangs():
                # Do not even queue it: as long as the drive hangs, nothing would take it out.
                self.results.append(False)
                self.stats.pages_skipped += len(keys)
                return
            if not self._unconcluded:
                self._moved()
            self._unconcluded += 1
            self._unanswered.append(offer)
        self._queue.put(offer)

    def answered(self) -> int:
        """How many results are in. Call it often: it also answers the offers that a hung drive holds up."""
        if self._unanswered and self._hangs():
            self._abandon()
        return len(self.results)

    def _abandon(self) -> None:
        abandoned = 0
        with self._answering:
            while self._unanswered and self._hangs() and not self._unanswered[0].copying:
                self._answer(self._unanswered[0], False)
                abandoned += 1
        if abandoned:
            logger.error(
                "agentstate: the drive has taken nothing for %g s; %d offer(s) are not waited for, and of what comes "
                "nothing is stored until it goes on (AGENTSTATE_DRIVE_TIMEOUT_S)",
                self._timeout_s,
                abandoned,
            )

    def _hangs(self) -> bool:
        return self._unconcluded > 0 and time.monotonic() - self._moved_s > self._timeout_s

    def _answer(self, offer: _Offer, stored: bool) -> None:
        offer.answered = True
        self._unanswered.popleft()
        self.results.append(stored)

    def _moved(self) -> None:
        self._moved_s = time.monotonic()

    def then(self, action: Callable[[], None]) -> None:
        """Run ``action`` on a spilling thread once everything offered so far is stored or has failed."""
        self._queue.put(action)

    def merge(self, chain: Sequence[bytes]) -> None:
        """Merge the small extents of a stored chain when there is nothing else to do."""
        keys = PageKeys.of(chain)
        self.then(lambda: self._queue.put(keys))

    @property
    def waiting(self) -> int:
        """Offers and actions that are queued or being worked on."""
        return self._queue.unfinished_tasks

    def kept(self) -> dict[str, int]:
        return {
            "unanswered_offers": len(self._unanswered),
            "untaken_results": len(self.results),
            "spill_tasks": self.waiting,
            "pages_on_their_way": len(self._on_their_way),
            "chains_to_merge": len(self._chains),
            "drafts": self._writer.in_use,
            **self._merge_reader.kept(),
        }

    def drain(self) -> None:
        """Wait until everything queued so far is done."""
        self._queue.join()

    def close(self, within_s: float = math.inf) -> bool:
        """Store what is queued, but begin no extent later than ``within_s`` from now. Returns False, and closes
        nothing, if something still waits for the drive a little later."""
        self._until_s = time.monotonic() + within_s
        self._queue.put(None)
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
            if isinstance(item, _Offer):
                self._store_offer(item)
            elif isinstance(item, PageKeys):
                self._remember(item)
                self._queue.task_done()
            else:
                self._writer.after(partial(self._act, item))
        self._queue.task_done()

    def _act(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            logger.exception("agentstate: an action that had waited for pages to be stored failed")
        finally:
            self._queue.task_done()

    def _next(self) -> _Offer | Callable[[], None] | PageKeys | None:
        while self._chains and self._queue.empty() and self._until_s == math.inf:
            self._merge_one()
        return self._queue.get()

    def _merge_one(self) -> None:
        """Merge one run, so that what arrives in the meantime waits for no more than that."""
        last, chain = next(iter(self._chains.items()))
        replaced = 0
        try:
            with self._writer.memory() as memory:
                replaced = merge(self._store, self._merge_reader, chain, memory, most_runs=1)
        except (KeyError, PageStoreFull) as error:
            # Evicted or dropped in the meantime, or no room for a second copy.
            logger.debug("agentstate: not merged: %s", error)
        except Exception:
            logger.exception("agentstate: merging failed; the extents stay as they are")
        self.stats.extents_merged += replaced
        self._moved()
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

    def _store_offer(self, offer: _Offer) -> None:
        """Copy the new pages of an offer, and have it concluded when they are published."""
        skipped = offer.skipped or offer.answered or time.monotonic() > self._until_s
        new: list[int] = []
        publishing: list[tuple[list[bytes], Future[None]]] = []
        failure: Exception | None = None
        late = 0
        try:
            # In this order: a page published in the meantime leaves `_on_their_way` and is then found stored.
            if not skipped:
                self._store.attend()
            every = [] if skipped else list(offer.keys)
            unknown = [i for i, key in enumerate(every) if key not in self._on_their_way]
            stored = self._store.stored([every[i] for i in unknown])
            new = [i for i, is_stored in zip(unknown, stored, strict=True) if not is_stored]
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
        except _Abandoned:
            late = len(new) - start
        except Exception as error:
            failure = error
        self._writer.after(partial(self._conclude, offer, skipped, len(new), late, publishing, failure))

    def _published(self, offer: _Offer, keys: list[bytes], published: Future[None]) -> None:
        self._moved()
        if offer.session_id and published.exception() is None:
            # Before anything further is published: in a store full of needed pages, these would be evicted for it.
            self._store.need(keys, offer.session_id)

    def _conclude(
        self,
        offer: _Offer,
        skipped: bool,
        new: int,
        late: int,
        publishing: Sequence[tuple[list[bytes], Future[None]]],
        failure: Exception | None,
    ) -> None:
        """Count and answer an offer, on the publishing thread. ``new`` of its pages were to be written; it was too late
        for the last ``late`` of them."""
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
                self.stats.pages_known += len(offer.keys) - new
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
            with self._answering:
                self.stats.pages_skipped += len(offer.keys) if skipped else late
                self._unconcluded -= 1
                self._moved()
                if not offer.answered:
                    self._answer(offer, stored)
            self._queue.task_done()

    def _complain(self, failure: Exception) -> None:
        """Log why pages are not stored. The disk's state takes one line, and is logged once until some are stored."""
        if not isinstance(failure, PageStoreError | OSError):
            logger.error("agentstate: spilling failed; the pages are recomputed when they are needed", exc_info=failure)
            return
        said, self._said = self._said, (type(failure), getattr(failure, "errno", None))
        level = logging.DEBUG if said == self._said else logging.WARNING
        logger.log(level, "agentstate: pages are not stored, and recomputed when they are needed: %s", failure)

    def _fill(self, offer: _Offer, numbers: torch.Tensor, draft: ExtentDraft) -> None:
        components = range(len(draft.geometry.component_bytes))
        with self._answering:
            if offer.answered:
                raise _Abandoned
            offer.copying = True
        try:
            place = self._pages.place(numbers, self._pages.outbound)
            for layer in range(draft.geometry.layers):
                self._pages.gather(layer, place, [draft.component(layer, c) for c in components])
        finally:
            # Nothing may arrive in the buffer any more when it is checksummed, or used for something else.
            self._pages.outbound.finish()
            offer.copying = False
