"""What was restored to the device for sessions: the newest restores, for whoever asks later.

Nothing is kept of requests that prove no session.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine_patch.restore import Restored

_MOST = 1024


class Restores:
    """Thread-safe. ``clock`` gives microseconds since the epoch.

    A restore is a map: its ``id``, which is the time in microseconds since the epoch; the ``session``; ``why`` it was
    restored (`control.RESTORES`); how many ``tokens`` came from which tier (``host``, ``nvme``, ``shared``); ``bytes``
    as they were read, in ``seconds`` from its begin to its end, of which a forward waited ``waited_s``. The seconds are
    those of its batch, which may have brought other requests theirs.
    """

    def __init__(self, clock: Callable[[], int] = lambda: time.time_ns() // 1000, most: int = _MOST):
        self._clock = clock
        self._kept: deque[dict[str, Any]] = deque(maxlen=most)
        self._mutex = threading.Lock()

    def add(self, session: str | None, why: str, restored: Restored, rid: str, page_size: int) -> None:
        """A batch has ``restored`` pages for the request ``rid`` of a session, if it did not fail."""
        of_request = restored.requests.get(rid)
        if session is None or of_request is None:
            return
        host, shared = of_request.host_pages, of_request.shared_pages
        pages: Mapping[str, int] = {"host": host, "nvme": of_request.pages - host - shared, "shared": shared}
        made = {
            "id": self._clock(),
            "session": session,
            "why": why,
            "tokens": {tier: count * page_size for tier, count in pages.items() if count > 0},
            "bytes": of_request.n_bytes,
            "seconds": restored.seconds,
            "waited_s": restored.waited_s,
        }
        with self._mutex:
            self._kept.append(made)

    def of(self, session: str, most: int) -> list[dict[str, Any]]:
        """The newest restores of a session, the newest last."""
        with self._mutex:
            kept = list(self._kept)
        return list(islice((made for made in reversed(kept) if made["session"] == session), most))[::-1]
