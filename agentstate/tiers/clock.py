"""Time, as what waits for it sees it: so that a test can let it pass."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

_log = logging.getLogger(__name__)


class Timer:
    """What is to be done later. `cancel` forgets it, unless it is being done already."""

    __slots__ = ("_do",)

    def __init__(self, do: Callable[[], None]):
        self._do: Callable[[], None] | None = do

    def cancel(self) -> None:
        self._do = None

    def fire(self) -> None:
        do, self._do = self._do, None
        if do is not None:
            do()

    @property
    def cancelled(self) -> bool:
        return self._do is None


class Clock(ABC):
    @abstractmethod
    def now(self) -> float:
        """Seconds since some moment; never goes back."""

    @abstractmethod
    def after(self, seconds: float, do: Callable[[], None]) -> Timer:
        """Call ``do``, which must be short, on a thread of the clock's when so many seconds have passed."""

    @abstractmethod
    def close(self) -> None:
        """Forget what is still to be done."""


class SystemClock(Clock):
    """The machine's own, with one thread, which begins with the first timer."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def now(self) -> float:
        return time.monotonic()

    def after(self, seconds: float, do: Callable[[], None]) -> Timer:
        timer = Timer(do)
        with self._changed:
            if self._closed:
                return timer
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), timer))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="agentstate-tier-clock", daemon=True)
                self._thread.start()
            elif self._due[0][2] is timer:
                self._changed.notify()
        return timer

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed:
                    # Most timers are cancelled: their requests are answered in time.
                    while self._due and self._due[0][2].cancelled:
                        heapq.heappop(self._due)
                    wait_s = self._due[0][0] - time.monotonic() if self._due else None
                    if wait_s is not None and wait_s <= 0:
                        break
                    self._changed.wait(wait_s)
                if self._closed:
                    return
                _, _, timer = heapq.heappop(self._due)
            try:
                timer.fire()
            except Exception:
                _log.exception("a timer failed")

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
