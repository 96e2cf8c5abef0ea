"""What was decided about sessions, and what became of it: the newest decisions, for whoever asks later.

Nothing is kept of requests that prove no session.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from itertools import islice
from typing import Any

_MOST = 4096
# A page of them.
_AT_ONCE = 500


class Decisions:
    """Thread-safe. ``clock`` gives microseconds since the epoch.

    A decision is a map: its ``id``, which is the time in microseconds since the epoch, and larger than those before;
    the ``session``; what was decided (``decision``, of `control.DECISIONS`) about how many ``tokens`` of it, and the
    ``outcome``. A byte was worth ``index``, and at most ``displaced`` of what had to go.
    """

    def __init__(self, clock: Callable[[], int] = lambda: time.time_ns() // 1000, most: int = _MOST):
        self._clock = clock
        self._kept: deque[dict[str, Any]] = deque(maxlen=most)
        self._mutex = threading.Lock()
        # The ids of the newest one, and of the newest one that is not kept any more.
        self._newest = self._dropped = 0

    def add(
        self,
        session: Hashable,
        decision: str,
        outcome: str,
        tokens: int = 0,
        index: float | None = None,
        displaced: float | None = None,
    ) -> None:
        """Something was decided about a session, or a decision has an outcome. What is no session is passed over."""
        if not isinstance(session, str):
            return
        made = {"session": session, "decision": decision, "outcome": outcome, "tokens": tokens}
        made |= {"index": _finite(index), "displaced": _finite(displaced)}
        with self._mutex:
            if len(self._kept) == self._kept.maxlen:
                self._dropped = self._kept[0]["id"]
            self._newest = made["id"] = max(self._newest + 1, self._clock())
            self._kept.append(made)

    def after(self, after: int) -> dict[str, Any]:
        """The oldest of those that came after the one with this id, whether there are ``more``, and whether some were
        ``missed`` that are not kept any more."""
        with self._mutex:
            kept, dropped = list(self._kept), self._dropped
        newer = [made for made in kept if made["id"] > after]
        return {"decisions": newer[:_AT_ONCE], "more": len(newer) > _AT_ONCE, "missed": after < dropped}

    def of(self, session: str, most: int) -> list[dict[str, Any]]:
        """The newest decisions about a session, the newest last."""
        with self._mutex:
            kept = list(self._kept)
        return list(islice((made for made in reversed(kept) if made["session"] == session), most))[::-1]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
