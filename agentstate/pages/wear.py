"""How much is written to a drive: the bytes of the last 24 hours, against what a day may have.

The count survives restarts in a small file, to which every process that writes below the same directory adds what it
has written since it last did. The file is replaced at once, under a lock. If it is lost or damaged, counting begins
anew; nothing else depends on it. A process that is killed loses the count of its last minute.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from agentstate.private import make_directory, private

logger = logging.getLogger(__name__)

_DAY_S = 24 * 3600
# The window moves in such steps.
_STEP_S = 600
_STEPS = _DAY_S // _STEP_S
_SAVED_EVERY_S = 60.0
_MOST_BYTES = 1 << 16


class Wear:
    """The bytes written in the last day by all that share ``file``, or by this process alone without one. ``budget`` is
    how many may be (None: any number), and ``clock`` tells the time in seconds since the epoch. Thread-safe."""

    def __init__(self, file: Path | None = None, budget: int | None = None, clock: Callable[[], float] = time.time):
        self.budget = budget
        self._file = file
        self._clock = clock
        # Never held while the drive is used, which may hang: then who asks would too.
        self._mutex = threading.Lock()
        self._saving = threading.Lock()
        # By the numbers of steps since the epoch: what the file said last, and what it does not say yet.
        self._known: Counter[int] = Counter()
        self._new: Counter[int] = Counter()
        self._saved_s = time.monotonic()
        self._said = False
        if file is not None:
            with suppress(OSError):
                self._known = _read(file)

    @property
    def bytes_written(self) -> int:
        """The bytes of the last 24 hours, to ten minutes."""
        with self._mutex:
            return self._window().total()

    def wrote(self, n_bytes: int) -> None:
        """So many bytes have gone to the drive."""
        with self._mutex:
            self._new[self._step()] += n_bytes
            due = time.monotonic() - self._saved_s >= _SAVED_EVERY_S
            if due:
                self._saved_s = time.monotonic()
                # Perhaps none of it can be noted.
                self._new = _within(self._new, self._step())
        if due:
            self.save()

    def until_s(self) -> float | None:
        """When less than the budget will have been written, in seconds since the epoch, if nothing more is; None where
        that is so now."""
        if self.budget is None:
            return None
        with self._mutex:
            window = self._window()
        left = window.total()
        if left < self.budget:
            return None
        for step in sorted(window):
            left -= window[step]
            if left < self.budget:
                return float((step + _STEPS + 1) * _STEP_S)
        return float((self._step() + _STEPS + 1) * _STEP_S)

    def spent(self) -> bool:
        """Whether as much as the budget has been written. When that begins, the log says until when."""
        until_s = self.until_s()
        with self._mutex:
            said, self._said = self._said, until_s is not None
        if until_s is not None and not said:
            logger.warning(
                "page store: %s bytes have been written in 24 hours (AGENTSTATE_WRITES_PER_DAY): what requests without "
                "a session compute is not stored, and small extents are not merged, until %s at the earliest",
                f"{self.bytes_written:,}",
                time.strftime("%Y-%m-%d %H:%M", time.localtime(until_s)),
            )
        return until_s is not None

    def save(self) -> None:
        """Let a later process know what was written."""
        if self._file is None:
            return
        with self._saving:
            with self._mutex:
                known, new = self._known, self._new.copy()
            if not new:
                return
            try:
                known = _add_to(self._file, known, new, self._step())
            except OSError as error:
                logger.debug("page store: what was written could not be noted in %s: %s", self._file, error)
                return
            with self._mutex:
                self._known = known
                self._new -= new

    def _step(self) -> int:
        return int(self._clock()) // _STEP_S

    def _window(self) -> Counter[int]:
        return _within(self._known + self._new, self._step())


def files_of(root: Path) -> list[Path]:
    """The files of all ranks below a root of pages."""
    return sorted(root.glob("writes-rank*.json"))


def file_of(root: Path, rank: int) -> Path:
    return root / f"writes-rank{rank}.json"


def _within(written: Counter[int], now: int) -> Counter[int]:
    """The last day of it. What is said of the future is not believed."""
    return Counter({step: n_bytes for step, n_bytes in written.items() if now - _STEPS <= step <= now})


def _add_to(file: Path, known: Counter[int], new: Counter[int], now: int) -> Counter[int]:
    """Add ``new`` to what a file says, which is what is ``known`` if it is lost. Returns what it says then, of the last
    day. Raises OSError."""
    make_directory(file.parent)
    with open(file.with_suffix(".lock"), "ab", opener=private) as lock:
        # Who has it may be stopped for long: then this is noted the next time.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(FileNotFoundError):
            # Others have added to it.
            known = _read(file)
        written = _within(known + new, now)
        partial = file.with_suffix(".partial")
        with open(partial, "w", opener=private) as opened:
            json.dump({"step_s": _STEP_S, "written": {str(step): written[step] for step in sorted(written)}}, opened)
        os.replace(partial, file)
    return written


def _read(file: Path) -> Counter[int]:
    """What a file says; nothing if it is damaged. Raises OSError."""
    with file.open("rb") as opened:
        raw = opened.read(_MOST_BYTES)
    try:
        said = json.loads(raw)
        if said["step_s"] != _STEP_S:
            return Counter()
        written = {int(step): n_bytes for step, n_bytes in said["written"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Counter()
    good = all(isinstance(n_bytes, int) and 0 <= n_bytes < 1 << 62 for n_bytes in written.values())
    return Counter(written) if good else Counter()
