"""What a rank does with pages that another rank of its group stores: nothing but wait until that is done."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import torch

from agentstate.errors import BadExtent
from agentstate.pages import StoreView
from agentstate.pages.files import header_of, opened
from agentstate.pages.rewriting import read_pages
from agentstate.private import FILE_MODE
from engine_patch.offers import Answered, Offer, Offers
from engine_patch.spill import SpillStats
from engine_patch.transfer import DevicePages, PageNumbers

logger = logging.getLogger(__name__)

# How often the other rank is asked, at first and at most.
_POLL_S, _LONGEST_POLL_S = 0.001, 0.02
# A store that nobody has open for so long has no writer any more, or has none yet.
_GONE_S = 1.0
# How many of the first pages are compared with the other rank's.
_COMPARED = 8
# How far apart two ranks' values of one page may be, as a part of their size. Ranks that add up in another order differ
# by a thousandth or so, and two heads by more than one.
_ALIKE = 0.25


class FollowingSpiller:
    """A `Spiller` of a rank that reads the ``view`` of another rank's store. All ranks offer the same pages in the same
    order, and the writing rank tells how many offers it has concluded. So an offer is answered here, and what was to
    happen after it happens, once it is over there; the answer is whether its pages are found from here.

    Nothing is copied out of the device but one layer of the first pages, to compare these with what the other rank has
    stored. If they differ, the ranks are ``unlike``: what is stored is no KV of this rank's. That is remembered beside
    the store.

    When the other rank has concluded nothing for ``timeout_s``, every unanswered offer is answered as not stored, and
    every new one until it has, as there.
    """

    def __init__(self, view: StoreView, pages: DevicePages, dtype: str, timeout_s: float = math.inf):
        self.stats = SpillStats()
        self.on = True
        # What is restored is like what is stored: only what was computed shows it, in the first life of the store.
        self._mark = view.directory / "unlike"
        self.unlike = self._mark.exists()
        self._pages = pages
        self._dtype: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
        self._compared = 0
        self._view = view
        self._timeout_s = timeout_s
        self._offers = Offers(timeout_s, self._abandoned, self._skipped)
        self._until_s = math.inf
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
        """Count an offer that the other rank has as well. One result follows, in order."""
        self._offers.add(Offer(keys, numbers, ready, skipped=not self.on))

    @property
    def results(self) -> deque[bool]:
        return self._offers.results

    def answered(self) -> int:
        """`Offers.answered`."""
        return self._offers.answered()

    def _abandoned(self, count: int) -> None:
        logger.error(
            "agentstate: the rank that writes %s has stored nothing for %g s; %d offer(s) are not waited for "
            "(AGENTSTATE_DRIVE_TIMEOUT_S)",
            self._view.directory,
            self._timeout_s,
            count,
        )

    def _skipped(self, pages: int) -> None:
        self.stats.pages_skipped += pages

    def then(self, action: Callable[[], None]) -> None:
        """Run ``action`` on a thread once everything offered so far is stored or has failed."""
        self._offers.put(action)

    def merge(self, chain: Sequence[bytes]) -> None:
        """The other rank does."""

    @property
    def waiting(self) -> int:
        """Offers and actions that are not over."""
        return self._offers.waiting

    def kept(self) -> dict[str, int]:
        return self._offers.kept()

    def drain(self) -> None:
        """Wait until everything queued so far is over."""
        self._offers.drain()

    def close(self, within_s: float = math.inf) -> bool:
        """Wait for what is queued, but no longer than so many seconds. True: nothing is written here."""
        self._until_s = time.monotonic() + within_s
        self._offers.end()
        self._thread.join()
        return True

    def _run(self) -> None:
        over = 0
        while (item := self._offers.take()) is not None:
            number, of = item
            if over < number:
                over = self._wait_for(number)
            try:
                if isinstance(of, Offer):
                    self._conclude(of)
                else:
                    of()
            except Exception:
                logger.exception("agentstate: what had waited for pages to be stored failed")
            self._offers.done()
        self._offers.done()

    def _wait_for(self, number: int) -> int:
        """Wait until so many offers are over at the rank that writes, as long as there is one: how many are."""
        pause_s, owned_s = _POLL_S, time.monotonic()
        while (told := self._view.told()).offers < number:
            now_s = time.monotonic()
            if told.is_open:
                owned_s = now_s
            if now_s - owned_s > _GONE_S or now_s > self._until_s:
                break
            time.sleep(pause_s)
            pause_s = min(_LONGEST_POLL_S, pause_s * 1.5)
        return told.offers

    def _conclude(self, offer: Offer) -> None:
        stored = False
        try:
            # It was asked for the pages: what it has is worth another try.
            self._view.look_again(offer.keys)
            stored = not offer.skipped and all(self._view.stored(offer.keys))
            if stored and self._compared < _COMPARED:
                self._compare(offer)
        finally:
            self.stats.pages_known += len(offer.keys) if stored else 0
            self._offers.conclude(offer, stored, 0 if stored else len(offer.keys))

    def _compare(self, offer: Offer) -> None:
        sizes = self._pages.geometry.component_bytes
        try:
            with self._view.pin(offer.keys[: _COMPARED - self._compared]) as pin:
                theirs = [np.empty((len(pin.keys), size), dtype=np.uint8) for size in sizes]
                for extent, slot, pages, first in pin.segments:
                    with opened(extent.path) as file:
                        header = header_of(file, extent.path.name)
                        read_pages(file, header, 0, slot, [rows[first : first + pages] for rows in theirs])
        except (KeyError, ValueError, BadExtent, OSError):
            # It has just left, or cannot be read: another one is compared.
            return
        pinned = self._pages.device.type == "cuda"
        own = [torch.empty(rows.shape, dtype=torch.uint8, pin_memory=pinned).numpy() for rows in theirs]
        try:
            with self._offers.copying(offer):
                self._pages.outbound.after(offer.ready)
                self._pages.gather(0, offer.numbers[: len(pin.keys)], own)
                self._pages.outbound.finish()
        except Answered:
            # Its device pages may have changed.
            return
        self._compared += len(pin.keys)
        if not self.unlike and any(self._differ(*of_both) for of_both in zip(own, theirs, strict=True)):
            self.unlike = True
            with suppress(OSError):
                os.close(os.open(self._mark, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
            logger.error(
                "agentstate: this rank computes other KV than the rank that writes %s, though both were taken to hold "
                "the same heads: nothing is restored; please report the model",
                self._view.directory,
            )

    def _differ(self, own: np.ndarray, theirs: np.ndarray) -> bool:
        if np.array_equal(own, theirs):
            return False
        one, other = (torch.from_numpy(rows).view(self._dtype).float() for rows in (own, theirs))
        apart, size = float((one - other).norm()), max(float(one.norm()), float(other.norm()))
        # Of what is no number nothing can be said.
        return apart > _ALIKE * size
