"""Pages on their way to staging before the request that needs them has device memory: of requests that wait in the
queue, and of sessions that are about to be resumed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from agentstate.pages import LayerwiseReader, PageStore, Stream


@dataclass
class PrefetchStats:
    """Counters since the engine started: reads begun ahead of admission, those that a request then used, and those
    that expired or were abandoned unused."""

    issued: int = 0
    used: int = 0
    wasted: int = 0


@dataclass
class _ReadAhead:
    """A stream that somebody asked for. ``used`` is whether it is a request's by now, None while it is neither that
    nor abandoned."""

    stream: Stream
    position: dict[bytes, int]
    expires_s: float | None
    used: bool | None = None

    def fraction(self) -> float | None:
        """Which fraction of it is in memory once there will not be more; None until then."""
        return self.stream.staged if self.used is None else float(self.used)


class Prefetches:
    """Streams by who asked for them: a waiting request by its rid, a session by its id.

    A stream takes staging memory as the reader grants it and keeps it until it is used or abandoned, so every one has
    an end: that of a request when the request leaves the queue, that of a session by time. Thread-safe.
    """

    def __init__(self, store: PageStore, reader: LayerwiseReader, clock: Callable[[], float] = time.monotonic):
        self.stats = PrefetchStats()
        self._store = store
        self._reader = reader
        self._clock = clock
        self._mutex = threading.Lock()
        self._requests: dict[str, _ReadAhead] = {}
        self._sessions: dict[str, _ReadAhead] = {}

    def for_request(self, rid: str, keys: Sequence[bytes]) -> None:
        """Begin to read ``keys`` for a request that has just been queued, unless they are being read already."""
        with self._mutex:
            if rid in self._requests:
                return
            if (found := self._covering(keys)) is not None:
                group, owner = found
                group[owner].stream.need()
            else:
                self._begin(self._requests, rid, keys, None)

    def for_session(self, session_id: str, keys: Sequence[bytes], expires_in_s: float) -> Callable[[], float | None]:
        """Begin to read ``keys``, a session's chain, or go on with that: what tells which fraction of it is in memory
        once there will not be more, because it is all there, or the memory is full; None until then. All of it is
        where it is wanted when a request has it, and nothing when it was abandoned, or is not stored (any more)."""
        with self._mutex:
            ahead = self._sessions.get(session_id)
            if ahead is not None and list(ahead.position) == list(keys):
                ahead.expires_s = self._clock() + expires_in_s
                return ahead.fraction
            self._abandon(self._sessions, session_id)
            ahead = self._begin(self._sessions, session_id, keys, self._clock() + expires_in_s)
            return (lambda: 0.0) if ahead is None else ahead.fraction

    def covers(self, keys: Sequence[bytes]) -> bool:
        """Whether `take` would find a stream."""
        with self._mutex:
            return self._covering(keys) is not None

    def take(self, keys: Sequence[bytes]) -> tuple[Stream, int] | None:
        """The stream that reads ``keys``, which is the caller's from now on, and the position of the first of them in
        it."""
        with self._mutex:
            found = self._covering(keys)
            if found is None:
                return None
            group, owner = found
            ahead = group.pop(owner)
            ahead.used = True
            self.stats.used += 1
            return ahead.stream, ahead.position[keys[0]]

    def tidy(self, waiting: Collection[str]) -> None:
        """Abandon what was read for requests that are not ``waiting`` any more, and what has expired."""
        with self._mutex:
            for rid in [rid for rid in self._requests if rid not in waiting]:
                self._abandon(self._requests, rid)
            now = self._clock()
            for session in [name for name, ahead in self._sessions.items() if ahead.expires_s <= now]:
                self._abandon(self._sessions, session)

    def __len__(self) -> int:
        """How many streams there are."""
        return len(self._requests) + len(self._sessions)

    def clear(self) -> None:
        """Abandon everything."""
        with self._mutex:
            for group in (self._requests, self._sessions):
                for owner in list(group):
                    self._abandon(group, owner)

    def _begin(
        self, group: dict[str, _ReadAhead], owner: str, keys: Sequence[bytes], expires_s: float | None
    ) -> _ReadAhead | None:
        try:
            pin = self._store.pin(keys)
        except KeyError:
            return None
        position = {key: page for page, key in enumerate(keys)}
        ahead = group[owner] = _ReadAhead(
            self._reader.open(pin, background=group is self._sessions), position, expires_s
        )
        self.stats.issued += 1
        return ahead

    def _covering(self, keys: Sequence[bytes]) -> tuple[dict[str, _ReadAhead], str] | None:
        for group in (self._requests, self._sessions):
            for owner, ahead in group.items():
                first = ahead.position.get(keys[0])
                # A key covers everything before it: chains that share their last page share all before.
                if first is not None and ahead.position.get(keys[-1]) == first + len(keys) - 1:
                    return group, owner
        return None

    def _abandon(self, group: dict[str, _ReadAhead], owner: str) -> None:
        ahead = group.pop(owner, None)
        if ahead is not None:
            ahead.used = False
            # Whoever asks for it must not wait for a drive.
            ahead.stream.discard()
            self.stats.wasted += 1
