"""Whether to ask a store at all, after it has failed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Literal

Change = Literal["opened", "closed"] | None


class Breaker:
    """Closed, requests pass. It opens after ``in_row`` failures in a row, or if at least the share ``share`` of the
    last ``of`` requests failed. After 1, 2, 4 … ``most_wait_s`` seconds one request passes, a probe: if it succeeds,
    the breaker is closed; if it fails, the next wait is twice as long. Closed again, it opens at the first failure, and
    waits twice as long, until a request has succeeded.

    Not thread-safe. ``now`` is the time in seconds.
    """

    def __init__(
        self,
        now: Callable[[], float],
        *,
        in_row: int,
        share: float = 1.0,
        of: int = 1 << 30,
        first_wait_s: float = 1.0,
        most_wait_s: float = 60.0,
    ):
        self._now = now
        self._in_row, self._share, self._of = in_row, share, of
        self._first_wait_s, self._most_wait_s = first_wait_s, most_wait_s
        self._state: Literal["closed", "open", "probing"] = "closed"
        # Of the state: what began in an earlier one says nothing of this one.
        self._era = 0
        self._row = 0
        self._recent: deque[bool] = deque(maxlen=min(of, 1024))
        self._wait_s = 0.0
        self._until_s = 0.0

    @property
    def closed(self) -> bool:
        return self._state == "closed"

    @property
    def wait_s(self) -> float:
        """How long it is until a probe may pass; 0 if one may now, or is under way, or if it is closed."""
        return max(0.0, self._until_s - self._now()) if self._state == "open" else 0.0

    def admit(self) -> int | None:
        """A ticket for a request, which `ended` wants back, or None: it may not pass."""
        if self._state == "open" and self._now() >= self._until_s:
            self._enter("probing")
            return self._era
        return self._era if self._state == "closed" else None

    def ended(self, ticket: int, ok: bool | None) -> Change:
        """How a request ended: well, badly, or so that nothing can be said. What that changed."""
        if ticket != self._era:
            return None
        if self._state == "probing":
            if ok is None:
                self._enter("open")
                self._until_s = self._now()
                return None
            if ok:
                self._enter("closed")
                self._row = 0
                self._recent.clear()
                return "closed"
            self._open()
            return None  # as it was before
        if ok is None:
            return None
        self._recent.append(ok)
        if ok:
            self._row, self._wait_s = 0, 0.0
            if not self._fails_often():
                return None
        else:
            self._row += 1
            if self._row < self._in_row and not self._wait_s and not self._fails_often():
                return None
        self._open()
        return "opened"

    def _fails_often(self) -> bool:
        full = len(self._recent) >= self._of
        return full and self._recent.count(False) >= self._share * len(self._recent)

    def _open(self) -> None:
        self._wait_s = min(self._most_wait_s, 2 * self._wait_s) if self._wait_s else self._first_wait_s
        self._until_s = self._now() + self._wait_s
        self._enter("open")

    def _enter(self, state: Literal["closed", "open", "probing"]) -> None:
        self._state = state
        self._era += 1
