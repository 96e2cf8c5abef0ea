"""Requests that run on while rows of what was restored for them still arrive, behind the first token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Trailing:
    """Keeps the pages of such requests out of the tree: what is in the tree is whole and verified, so that nothing else
    has to know of rows that are missing. Nor are a request's pages given back while something is read to them.

    ``over`` tells whether a batch needs no more waiting, because all of it has arrived or something of it is bad, and
    ``conclude`` waits for it and tells the rids of its requests that must not use it. All methods are for the
    scheduler's thread, and an engine of one rank.
    """

    def __init__(self, over: Callable[[int], bool], conclude: Callable[[int, list[str]], Collection[str]]):
        self._over = over
        self._conclude = conclude
        self._batches: dict[int, list[Req]] = {}
        # Of requests that trail or have trailed, what was to enter the tree meanwhile: up to which token.
        self._postponed: dict[str, int] = {}
        self._failed: list[Req] = []
        self._whole: list[Req] = []
        # Those whose first forward waited for rows, and which nobody has asked for.
        self._untimed: set[str] = set()
        # Those of the failed ones that the batch which has run last was to be the last one of.
        self.ended: list[Req] = []

    def begin(self, index: int, reqs: Sequence[Req]) -> None:
        """These requests, all those of a batch of loads, go on before it is over."""
        self._batches[index] = list(reqs)
        self._untimed.update(req.rid for req in reqs)

    def postpones(self, req: Req, up_to: int) -> bool:
        """Whether a request's first ``up_to`` tokens must not enter the tree yet."""
        if req in self._failed or any(req in reqs for reqs in self._batches.values()):
            self._postponed[req.rid] = up_to
            return True
        return False

    def look(self) -> None:
        """Conclude the batches that are over."""
        for index in [index for index in self._batches if self._over(index)]:
            self._end(index)

    def settle(self, req: Req) -> bool:
        """A request's pages are about to be given back, or to the tree: wait until nothing is read to them any more.
        False if they must not enter the tree, because something of them is bad."""
        for index, reqs in list(self._batches.items()):
            if req in reqs:
                self._end(index)
        self._untimed.discard(req.rid)
        good = req not in self._failed
        self._failed = [other for other in self._failed if other is not req]
        self._whole = [other for other in self._whole if other is not req]
        self._postponed.pop(req.rid, None)
        return good

    def _end(self, index: int) -> None:
        reqs = self._batches.pop(index)
        failed = self._conclude(index, [req.rid for req in reqs])
        self._failed += [req for req in reqs if req.rid in failed]
        self._whole += [req for req in reqs if req.rid not in failed]

    @property
    def failed(self) -> list[Req]:
        """The requests that must be recomputed, and none of whose results may be used; each until it is settled."""
        return list(self._failed)

    def take_whole(self) -> list[tuple[Req, int]]:
        """The requests whose pages are whole since this was asked last, with what was postponed of each."""
        whole, self._whole = self._whole, []
        return [(req, up_to) for req in whole if (up_to := self._postponed.pop(req.rid, None)) is not None]

    def take_untimed(self, reqs: Sequence[Req]) -> bool:
        """Whether a forward with these requests, which has been timed, was the first one of some that trail: its time
        says neither what computing takes nor what restoring does. Asked once of each forward."""
        rids = self._untimed.intersection(req.rid for req in reqs)
        self._untimed -= rids
        return bool(rids)

    @property
    def kept(self) -> int:
        """How many requests it knows of."""
        listed = sum(map(len, self._batches.values())) + len(self._failed) + len(self._whole)
        return max(listed, len(self._postponed), len(self._untimed))

    def clear(self) -> None:
        """The cache is flushed, and what was read for it is forgotten."""
        self._batches.clear()
        self._postponed.clear()
        self._untimed.clear()
        self._failed.clear()
        self._whole.clear()
        self.ended.clear()
