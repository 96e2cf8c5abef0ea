"""What this rank knows of the sessions it serves: how far each is durable from its head."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from agentstate.manifests import KEY_BYTES, KvState, Manifest

_REMEMBERED = 10_000


@dataclass(frozen=True)
class Standing:
    """A session as of its newest finished request: ``requests`` finished so far, ``settled`` of them stored, and
    ``saved`` of them in SQL. ``keys`` are all whole pages of its newest settled request, ``durable`` of which, from
    the head, are stored."""

    requests: int = 0
    settled: int = 0
    saved: int = 0
    keys: tuple[bytes, ...] = ()
    durable: int = 0


class Ledger:
    """Thread-safe. Remembers the sessions that were used last; SQL remembers the others. ``n_bytes`` says how many
    bytes a prefix of so many pages has in the stores, ``stored`` how many pages of a chain are there now."""

    def __init__(self, page_size: int, n_bytes: Callable[[int], int], stored: Callable[[Sequence[bytes]], int]):
        self._page_size = page_size
        self._stored = stored
        self._n_bytes = n_bytes
        self._standings: OrderedDict[str, Standing] = OrderedDict()
        self._mutex = threading.Lock()

    def finished(self, session_id: str) -> int:
        """A request of the session has finished and its pages are queued: the number of this request."""
        with self._mutex:
            standing = self._standings.get(session_id, Standing())
            standing = replace(standing, requests=standing.requests + 1)
            self._put(session_id, standing)
            return standing.requests

    def settled(self, session_id: str, request: int, keys: list[bytes], durable: int) -> None:
        """The pages queued by request number ``request`` are stored, ``durable`` of them from the head."""
        with self._mutex:
            standing = self._standings.get(session_id, Standing(requests=request))
            self._put(session_id, replace(standing, settled=request, keys=tuple(keys), durable=durable))

    def saved(self, manifest: Manifest) -> None:
        """``manifest`` is in SQL. It counts when it is the one of the newest settled request: a page's key covers
        everything before it, so equal last keys are equal manifests."""
        with self._mutex:
            standing = self._standings.get(manifest.session_id)
            if standing is not None and manifest.keys[-KEY_BYTES:] == b"".join(standing.keys[: standing.durable][-1:]):
                self._put(manifest.session_id, replace(standing, saved=standing.settled))

    def standing(self, session_id: str) -> dict[str, object] | None:
        """The answer of a ``flush`` right now, or None for a session that this process has not served."""
        with self._mutex:
            standing = self._standings.get(session_id)
        if standing is None:
            return None
        if min(standing.settled, standing.saved) < standing.requests:
            return self._answer(KvState.PENDING, standing.durable)
        # What was stored then may have been evicted since.
        return self.remembered(self._stored(standing.keys[: standing.durable]), len(standing.keys))

    def remembered(self, stored: int, pages: int) -> dict[str, object]:
        """The answer of a ``flush`` for a session of so many ``pages``, of which ``stored`` are still here."""
        return self._answer(_state(stored, pages), stored)

    def forget(self, session_id: str) -> None:
        """What is known of the session is true no more."""
        with self._mutex:
            self._standings.pop(session_id, None)

    def chain(self, session_id: str) -> list[bytes] | None:
        """The stored pages of the session's newest settled request, or None when there is none."""
        with self._mutex:
            standing = self._standings.get(session_id)
        return None if standing is None or not standing.settled else list(standing.keys[: standing.durable])

    def _answer(self, state: KvState, pages: int) -> dict[str, object]:
        return {
            "state": state.value,
            "tokens": pages * self._page_size,
            "pages": pages,
            "bytes": self._n_bytes(pages),
        }

    def _put(self, session_id: str, standing: Standing) -> None:
        self._standings[session_id] = standing
        self._standings.move_to_end(session_id)
        if len(self._standings) > _REMEMBERED:
            self._standings.popitem(last=False)


def _state(durable: int, pages: int) -> KvState:
    if durable == pages:
        return KvState.DURABLE
    return KvState.PARTIAL if durable else KvState.LOST
