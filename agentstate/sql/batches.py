"""What the writers of one process share when the database has room for one of them: turns, and commits.

Used for SQLite. A `Turnstile` lets whoever has waited longest go next. A `Batcher` carries out what is submitted on one
thread, and as many of it at once as have gathered meanwhile: a commit costs as much as several small writes.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import Context, copy_context
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Turnstile:
    """A lock that is handed over to whoever has waited for it longest. Thread-safe; not reentrant."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held = False
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, timeout_s: float) -> bool:
        """Whether the caller's turn has come within ``timeout_s``: then it calls `release`."""
        with self._mutex:
            if not self._held:
                self._held = True
                return True
            mine = threading.Lock()
            mine.acquire()
            self._waiting.append(mine)
        if mine.acquire(timeout=timeout_s):
            return True
        with self._mutex:
            if mine in self._waiting:
                self._waiting.remove(mine)
                return False
        return True  # it came at the last moment

    def release(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False


class Job:
    """One of what is carried out together. Whoever submitted it learns nothing before `tell`."""

    def __init__(self, act: Callable[[], Any]):
        self.future: Future[Any] = Future()
        self.error: BaseException | None = None
        self._act = act
        self._context: Context = copy_context()
        self._result: Any = None

    def run(self) -> None:
        """Do it, in the context of whoever submitted it. Raises nothing."""
        try:
            self._result = self._context.run(self._act)
        except BaseException as error:
            self.error = error

    def tell(self, failed: BaseException | None = None) -> None:
        """Its outcome, or that it ``failed`` with the others; its own error comes before that."""
        if (error := self.error or failed) is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(self._result)


class Batcher:
    """``carry_out`` is called on the thread with 1 to ``most`` jobs, in the order of their submission: it runs each and
    tells it its outcome. If it raises, those that it has not told learn that, and the thread goes on."""

    def __init__(self, carry_out: Callable[[Sequence[Job]], None], most: int, name: str):
        self._carry_out = carry_out
        self._most = most
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, act: Callable[[], T]) -> Future[T]:
        job = Job(act)
        self._jobs.put(job)
        return job.future

    def shutdown(self) -> None:
        """End the thread after what was submitted."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        ending = False
        while not ending:
            gathered = [self._jobs.get()]
            while len(gathered) < self._most and gathered[-1] is not None and not self._jobs.empty():
                gathered.append(self._jobs.get())
            ending = gathered[-1] is None
            jobs = [job for job in gathered if job is not None and job.future.set_running_or_notify_cancel()]
            try:
                if jobs:
                    self._carry_out(jobs)
            except BaseException as error:  # without this thread nobody would be answered any more
                logger.exception("what was submitted could not be carried out")
                for job in jobs:
                    if not job.future.done():
                        job.tell(error)
