"""What this rank knows of the sessions it serves: how far each is durable from its head."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from agentstate.fleet.manifests import KEY_BYTES, KvState, Manifest, split_keys
from agentstate.fleet.turns import Turn

# Bound of what is kept of sessions that SQL knows as well; a key takes 32 bytes a page.
_REMEMBERED_BYTES = 64 << 20
# About what a session takes besides its keys.
_STANDING_BYTES = 1 << 10


@dataclass(frozen=True)
class Standing:
    """A session as of its newest finished request, in the turn ``epoch``. ``requests`` have finished so far;
    ``settled`` of them are stored, and ``saved`` of them are in SQL. The newest settled request, of the turn
    ``settled_in``, had ``pages`` whole pages; ``keys`` packs the keys of the first ones, those that were stored."""

    epoch: int = 0
    requests: int = 0
    settled: int = 0
    saved: int = 0
    pages: int = 0
    keys: bytes = b""
    settled_in: int = 0

    @property
    def durable(self) -> int:
        return len(self.keys) // KEY_BYTES

    @property
    def pending(self) -> bool:
        """Whether SQL lags behind it."""
        return min(self.settled, self.saved) < self.requests

    @property
    def n_bytes(self) -> int:
        return _STANDING_BYTES + len(self.keys)


class Ledger:
    """Thread-safe. Of the sessions that SQL does not lag behind, it remembers the most recently used, up to a bound in
    bytes; SQL remembers the others. ``n_bytes`` gives the bytes that a prefix of so many pages takes in the stores,
    ``stored`` how many pages of a chain are there now."""

    def __init__(self, page_size: int, n_bytes: Callable[[int], int], stored: Callable[[Sequence[bytes]], int]):
        self._page_size = page_size
        self._stored = stored
        self._n_bytes = n_bytes
        self._standings: OrderedDict[str, Standing] = OrderedDict()
        # The sessions that SQL lags behind, and the bytes of all sessions.
        self._pending: set[str] = set()
        self._held_bytes = 0
        self._mutex = threading.Lock()

    def finished(self, turn: Turn) -> int | None:
        """Record that a request of a turn has finished and its pages are queued. Returns the request's number, or None
        if a later turn of the session has been seen."""
        with self._mutex:
            standing = self._standings.get(turn.session_id, Standing())
            if turn.epoch < standing.epoch:
                return None
            standing = replace(standing, epoch=turn.epoch, requests=standing.requests + 1)
            self._put(turn.session_id, standing)
            return standing.requests

    def settled(
        self, session_id: str, request: int, keys: Sequence[bytes], durable: int, epoch: int = 0
    ) -> list[bytes]:
        """The pages queued by request number ``request``, of the turn ``epoch``, are stored, ``durable`` of them from
        the head. Returns the stored pages that the session has left: those of an earlier turn that this one does not go
        on from."""
        with self._mutex:
            before = self._standings.get(session_id, Standing(requests=request))
            packed = b"".join(keys[:durable])
            after = replace(before, settled=request, pages=len(keys), keys=packed, settled_in=epoch)
            self._put(session_id, after)
        if epoch <= before.settled_in or before.keys == packed[: len(before.keys)]:
            return []
        old = split_keys(before.keys)
        common = next((page for page, pair in enumerate(zip(old, keys, strict=False)) if pair[0] != pair[1]), len(keys))
        return old[common:]

    def saved(self, manifest: Manifest) -> None:
        """``manifest`` is in SQL. It counts only if it is of the newest settled request: a page's key covers everything
        before it, so equal last keys are equal manifests."""
        with self._mutex:
            standing = self._standings.get(manifest.session_id)
            if standing is not None and manifest.keys[-KEY_BYTES:] == standing.keys[-KEY_BYTES:]:
                self._put(manifest.session_id, replace(standing, saved=standing.settled))

    def refused(self, manifest: Manifest) -> None:
        """SQL refused ``manifest``: its turn is over, or its session is deleted. Forget the session, since SQL
        decides."""
        with self._mutex:
            standing = self._standings.get(manifest.session_id)
            if standing is not None and standing.epoch <= manifest.epoch:
                self._remove(manifest.session_id)

    def standing(self, session_id: str) -> dict[str, object] | None:
        """The answer to a ``flush`` right now, or None for a session that this process has not served."""
        with self._mutex:
            standing = self._standings.get(session_id)
        if standing is None:
            return None
        if standing.pending:
            return self._answer(KvState.PENDING, standing.durable)
        # What was stored then may have been evicted since.
        return self.remembered(self._stored(split_keys(standing.keys)), standing.pages)

    def epoch(self, session_id: str) -> int:
        """The turn of the session whose request was the newest to end; 0 for a session that this process has not
        served."""
        with self._mutex:
            return self._standings.get(session_id, Standing()).epoch

    def remembered(self, stored: int, pages: int) -> dict[str, object]:
        """The answer to a ``flush`` for a session of so many ``pages``, of which ``stored`` are still here."""
        return self._answer(_state(stored, pages), stored)

    def forget(self, session_id: str) -> None:
        """Forget the session: what is known of it no longer holds."""
        with self._mutex:
            self._remove(session_id)

    def chain(self, session_id: str) -> list[bytes] | None:
        """The stored pages of the session's newest settled request, or None when there is none."""
        with self._mutex:
            standing = self._standings.get(session_id)
        return None if standing is None or not standing.settled else split_keys(standing.keys)

    def _answer(self, state: KvState, pages: int) -> dict[str, object]:
        return {
            "state": state.value,
            "tokens": pages * self._page_size,
            "pages": pages,
            "bytes": self._n_bytes(pages),
        }

    def _put(self, session_id: str, standing: Standing) -> None:
        self._remove(session_id)
        self._standings[session_id] = standing
        self._held_bytes += standing.n_bytes
        if standing.pending:
            self._pending.add(session_id)
        if self._held_bytes > _REMEMBERED_BYTES and len(self._pending) < len(self._standings):
            self._shrink()

    def _shrink(self) -> None:
        """Forget sessions that SQL knows, down to three quarters of the bound, so that scans over pending ones are
        rare."""
        for session_id in [name for name in self._standings if name not in self._pending]:
            if self._held_bytes <= _REMEMBERED_BYTES * 3 // 4:
                return
            self._remove(session_id)

    def _remove(self, session_id: str) -> None:
        standing = self._standings.pop(session_id, None)
        if standing is not None:
            self._held_bytes -= standing.n_bytes
            self._pending.discard(session_id)


def _state(durable: int, pages: int) -> KvState:
    if durable == pages:
        return KvState.DURABLE
    return KvState.PARTIAL if durable else KvState.LOST
