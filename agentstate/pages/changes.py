"""Which pages have come or gone: noted where that happens, for one reader."""

from __future__ import annotations

import threading
from collections.abc import Collection

_MOST_KEYS = 1 << 16


class Changes:
    """The keys of pages that have come or gone since `take` was called last, bounded: when there are too many, it may
    be any page. They say where to look, not what is there. Thread-safe; never waits for a disk."""

    def __init__(self, most_keys: int = _MOST_KEYS):
        self._most = most_keys
        self._lock = threading.Lock()
        self._keys: list[bytes] = []
        self._any = False

    def note(self, keys: Collection[bytes]) -> None:
        """These may have come or gone."""
        with self._lock:
            if len(self._keys) + len(keys) > self._most:
                self._any, self._keys = True, []
            elif not self._any:
                self._keys.extend(keys)

    def note_any(self) -> None:
        """Any page may have come or gone."""
        with self._lock:
            self._any, self._keys = True, []

    def take(self) -> list[bytes] | None:
        """The keys of what may have come or gone; None where that may be any page."""
        if not self._keys and not self._any:
            return []
        with self._lock:
            taken = None if self._any else self._keys
            self._any, self._keys = False, []
            return taken
