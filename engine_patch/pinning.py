"""Pins: contexts that are to stay on a tier for a time, within what their accounts may have there.

A pin refuses nothing. What is pinned leaves last, but leaves where a request that runs needs all of the room.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from engine_patch.accounts import TIERS, Accounts
from engine_patch.waits import Waits

# Of a tier, so much is pinned at most for an account that has no quota there.
_PART = 2


class Pinning:
    """Thread-safe. ``size`` tells how many pages of a session are stored, and ``n_bytes`` what they take; ``room`` the
    bytes of each tier, 0 where it does not exist. ``retain`` keeps a session's stored pages on the drive until a time
    of the monotonic clock, as far as that goes: of how many pages. ``fetch`` begins to bring a session to host memory.
    """

    def __init__(
        self,
        waits: Waits,
        accounts: Accounts,
        *,
        size: Callable[[str], int],
        n_bytes: Callable[[int], int],
        room: Callable[[str], int],
        retain: Callable[[str, float], int],
        fetch: Callable[[str], object],
    ):
        self._waits = waits
        self._accounts = accounts
        self._size = size
        self._n_bytes = n_bytes
        self._room = room
        self._retain = retain
        self._fetch = fetch
        self._mutex = threading.Lock()
        # Whom SQL has pinned, as it said last, and the bytes of what is pinned.
        self._told: set[str] = set()
        self._bytes: dict[str, int] = {}

    def pin(self, session_id: str, tier: str, for_s: float) -> dict[str, Any]:
        """Pin a session to a tier, or to the next below where its account has too much pinned already. With ``for_s``
        0 its pin ends. Raises ValueError for a tier that there is not."""
        if tier not in TIERS:
            raise ValueError(f"tier {tier!r} is none of {', '.join(TIERS)}")
        if for_s <= 0:
            with self._mutex:
                self._unpin(session_id)
            return {"state": "unpinned", "tier": tier, "pages": 0, "bytes": 0}
        pages = self._size(session_id)
        n_bytes = self._n_bytes(pages)
        with self._mutex:
            given = next((one for one in TIERS[TIERS.index(tier) :] if self._fits(session_id, one, n_bytes)), None)
            if given is None or not self._waits.pin(session_id, given, for_s):
                return {"state": "ignored", "tier": tier, "pages": 0, "bytes": 0}
            self._bytes[session_id] = n_bytes
        retained = self._retain(session_id, time.monotonic() + for_s)
        if given == "host":
            self._fetch(session_id)
        clipped = given != tier or retained < pages
        if given == "nvme":
            pages, n_bytes = retained, self._n_bytes(retained)
        return {"state": "clipped" if clipped else "accepted", "tier": given, "pages": pages, "bytes": n_bytes}

    def take(self, pins: Mapping[str, tuple[str, float]]) -> None:
        """SQL has these pins, by their sessions: their tiers, and for how long they hold."""
        now_s = time.monotonic()
        with self._mutex:
            before, self._told = self._told, set(pins)
            for session in before - self._told:
                self._unpin(session)
        for session, (tier, for_s) in pins.items():
            known = self._waits.pinned(session)
            # What a service has said itself is pinned already; a clock is not read twice at the same time.
            if known is None or abs(known.until_s - now_s - for_s) > 1.0:
                self.pin(session, tier, for_s)

    def until_s(self, session_id: str) -> float | None:
        """Until when the session is pinned, by the monotonic clock."""
        pin = self._waits.pinned(session_id)
        return None if pin is None else pin.until_s

    def _unpin(self, session_id: str) -> None:
        self._waits.unpin(session_id)
        self._bytes.pop(session_id, None)
        self._retain(session_id, 0.0)

    def _fits(self, session_id: str, tier: str, n_bytes: int) -> bool:
        if tier == "nvme":
            # The store itself bounds what it retains.
            return True
        room, account = self._room(tier), self._accounts.of(session_id)
        limit = self._accounts.limit(account, tier)
        pinned = self._waits.pins()
        self._bytes = {session: held for session, held in self._bytes.items() if session in pinned}
        others = sum(
            held
            for session, held in self._bytes.items()
            if session != session_id and pinned[session].tier == tier and self._accounts.of(session) == account
        )
        return room > 0 and others + n_bytes <= (room // _PART if limit is None else min(room, limit))
