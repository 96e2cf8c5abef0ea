"""How many bytes an account may have in the shared store."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from agentstate.fleet.quotas import shown
from engine_patch.sharing.access import Access
from engine_patch.sharing.context import FOLLOW_S, Context


class Allowance:
    """``limits`` gives the accounts that may have only so many bytes."""

    def __init__(self, context: Context, access: Access, limits: Callable[[], Mapping[str, int]]):
        self._context, self._access, self._limits = context, access, limits
        # By account: the bytes it has, with what was sent since they were counted; when that was; and when there was
        # no more room.
        self._held: dict[str, tuple[int, float, float]] = {}

    def take(self, owner: str, n_bytes: int) -> str | None:
        """Count so many bytes more of an account's, for which others may go first that nobody needs; the reason, and
        nothing counted, where there is no room. Raises DatabaseError."""
        if (limit := self._limits().get(owner)) is None:
            return None
        held, counted_s, full_s = self._held.get(owner, (0, -math.inf, -math.inf))
        now_s = self._context.clock()
        if now_s - counted_s >= FOLLOW_S or (held + n_bytes > limit and now_s - full_s >= FOLLOW_S):
            held, counted_s = self._access.rows.make_room(owner, n_bytes, limit), now_s
        within = held + n_bytes <= limit
        self._held[owner] = (held + n_bytes, counted_s, full_s) if within else (held, counted_s, now_s)
        if within:
            return None
        return (
            f"{shown(owner)} has {held:,} bytes in the shared store, and may have {limit:,}: an extent of "
            f"{n_bytes:,} bytes is not published"
        )
