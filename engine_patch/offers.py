"""Offers of pages to be stored, and their answers, in one order."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from engine_patch.transfer import PageNumbers


@dataclass
class Offer:
    """``numbers`` are the page numbers of ``keys`` on the device, which may be read after ``ready``. An offer that is
    ``skipped`` is answered as not stored when its turn comes. ``number`` counts the offers from 1 on."""

    keys: Sequence[bytes]
    numbers: torch.Tensor | PageNumbers
    ready: Sequence[torch.Event]
    skipped: bool
    session_id: str | None = None
    owner: str = ""
    rid: str = ""
    number: int = 0
    # Whether its device pages are being read, and whether its result is in: after that they are read no more.
    copying: bool = False
    answered: bool = False


class Answered(Exception):
    """An offer's result is in, so that its device pages may have changed."""


class Offers:
    """What waits for one thread: offers, and what is to be done after them.

    Every offer gets one entry in ``results``, in the order of the offers, never earlier: the tree takes a result for
    its oldest offer, and unlocks that one's device pages. When nothing has `moved` for ``timeout_s``, every unanswered
    offer is answered as not stored, except one that is being copied at that moment, and so is every new offer until
    something moves. What was queued stays queued.

    ``abandoned`` is told how many offers were not waited for; ``skipped``, by one thread at a time, how many pages are
    not stored for that or another reason.
    """

    def __init__(self, timeout_s: float, abandoned: Callable[[int], None], skipped: Callable[[int], None]):
        self.results: deque[bool] = deque()
        self._timeout_s = timeout_s
        self._abandoned = abandoned
        self._skipped = skipped
        # The unanswered offers, in order; how many offers are queued and not concluded, answered or not; and when
        # something last moved.
        self._unanswered: deque[Offer] = deque()
        self._unconcluded = 0
        # How many there were: ranks that read a store count its writer's too.
        self._made = 0
        self._moved_s = time.monotonic()
        self._answering = threading.Lock()
        # Each with the number of offers that were made before it.
        self._queue: queue.Queue[tuple[int, Any] | None] = queue.Queue()

    def add(self, offer: Offer) -> None:
        """Queue an offer; its device pages are to be unchanged until its result is in."""
        with self._answering:
            self._made += 1
            offer.number = self._made
            if not self._unanswered and self._hangs():
                # Do not even queue it: as long as nothing moves, nothing would take it out.
                self.results.append(False)
                self._skipped(len(offer.keys))
                return
            if not self._unconcluded:
                self.moved()
            self._unconcluded += 1
            self._unanswered.append(offer)
            self._queue.put((offer.number, offer))

    def put(self, item: Any) -> None:
        """Queue something behind all offers that were made so far."""
        with self._answering:
            self._queue.put((self._made, item))

    def end(self) -> None:
        """Nothing follows that is waited for."""
        self._queue.put(None)

    def take(self) -> tuple[int, Any] | None:
        """Wait for what is queued next, and for how many offers it waits, itself included; None at the `end`. To be
        followed by `done`, from any thread."""
        return self._queue.get()

    def done(self) -> None:
        self._queue.task_done()

    @property
    def empty(self) -> bool:
        return self._queue.empty()

    @property
    def waiting(self) -> int:
        """Offers and whatever else is queued or being worked on."""
        return self._queue.unfinished_tasks

    def drain(self) -> None:
        """Wait until everything queued so far is done."""
        self._queue.join()

    def answered(self) -> int:
        """How many results are in. Call it often: it also answers the offers that a hung drive holds up."""
        if self._unanswered and self._hangs():
            abandoned = 0
            with self._answering:
                while self._unanswered and self._hangs() and not self._unanswered[0].copying:
                    self._answer(self._unanswered[0], False)
                    abandoned += 1
            if abandoned:
                self._abandoned(abandoned)
        return len(self.results)

    def moved(self) -> None:
        """Something of the offers, or for them, has been done."""
        self._moved_s = time.monotonic()

    def _hangs(self) -> bool:
        return self._unconcluded > 0 and time.monotonic() - self._moved_s > self._timeout_s

    @contextmanager
    def copying(self, offer: Offer) -> Iterator[None]:
        """Within it the offer is not answered, and its device pages do not change. Raises Answered if it has been."""
        with self._answering:
            if offer.answered:
                raise Answered
            offer.copying = True
        try:
            yield
        finally:
            offer.copying = False

    def conclude(self, offer: Offer, stored: bool, skipped: int = 0) -> int:
        """Answer an offer, unless it has been, of which so many pages were ``skipped``. Returns how many offers are
        over."""
        with self._answering:
            self._skipped(skipped)
            self._unconcluded -= 1
            # While nothing moved, offers were answered that nobody queued.
            over = offer.number if self._unconcluded else self._made
            self.moved()
            if not offer.answered:
                self._answer(offer, stored)
        return over

    def _answer(self, offer: Offer, stored: bool) -> None:
        offer.answered = True
        self._unanswered.popleft()
        self.results.append(stored)

    def kept(self) -> dict[str, int]:
        return {
            "unanswered_offers": len(self._unanswered),
            "untaken_results": len(self.results),
            "spill_tasks": self.waiting,
        }
