"""Pages on their way to staging before the request that needs them has device memory: of requests that wait in the
queue, and of sessions that are about to be resumed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial

from agentstate.pages import DEMAND, PLANNED, LayerwiseReader, Need, PageStore, Pin
from engine_patch.feeds import Piece, Reading, Source, pieces, refined
from engine_patch.host_tier import HostPool
from engine_patch.shared_pool import SharedPool


@dataclass
class PrefetchStats:
    """Counters since the engine started: reads begun ahead of admission, those that a request then used, and those
    that expired or were abandoned unused. What is in the host tier is not read."""

    issued: int = 0
    used: int = 0
    wasted: int = 0


class _ReadAhead(Reading):
    """A stream that ``claims`` owners asked for. ``used`` is whether it is a request's by now, None while it is neither
    that nor abandoned."""

    claims = 0
    used: bool | None = None

    def fraction(self) -> float | None:
        """Which fraction of it is in memory once there will not be more; None until then."""
        return self.stream.staged if self.used is None else float(self.used)


@dataclass
class _Claim:
    """What one owner asked for, in the readings that read it, with how many of the pages each of them reads."""

    keys: Sequence[bytes]
    expires_s: float | None
    parts: list[tuple[_ReadAhead, int]]

    @property
    def whole(self) -> bool:
        return all(reading.used is None for reading, _ in self.parts)

    def fraction(self) -> float | None:
        fractions = [(reading.fraction(), pages) for reading, pages in self.parts]
        known = [fraction * pages for fraction, pages in fractions if fraction is not None]
        return sum(known) / len(self.keys) if len(known) == len(fractions) else None


_Claims = dict[str, _Claim]


class Prefetches:
    """Streams by who asked for them: a waiting request by its rid, a session by its id. What several ask for is read
    once.

    A stream takes staging memory as the reader grants it and keeps it until it is used or abandoned, so every claim has
    an end: that of a request when the request leaves the queue, that of a session by time. A stream is abandoned with
    the last claim. Pages that are in the ``host`` tier are kept there by a claim, and not read. Thread-safe.
    """

    def __init__(
        self,
        store: PageStore,
        reader: LayerwiseReader,
        clock: Callable[[], float] = time.monotonic,
        host: HostPool | None = None,
        shared: SharedPool | None = None,
    ):
        self.stats = PrefetchStats()
        self._store = store
        self._host = host
        self._shared = shared
        self._reader = reader
        self._clock = clock
        self._mutex = threading.Lock()
        self._readings: list[_ReadAhead] = []
        self._requests: _Claims = {}
        self._sessions: _Claims = {}

    def for_request(self, rid: str, keys: Sequence[bytes]) -> None:
        """Begin to read those of ``keys`` for a request that has just been queued that are not being read already."""
        with self._mutex:
            if rid not in self._requests:
                self._claim(self._requests, rid, keys, None, DEMAND)

    def for_session(
        self, session_id: str, keys: Sequence[bytes], expires_in_s: float, need: Need = PLANNED
    ) -> Callable[[], float | None]:
        """Begin to read ``keys``, a session's chain, or go on with that: what tells which fraction of it is in memory
        once there will not be more, because it is all there, or the memory is full; None until then. All of it is
        where it is wanted when a request has it, and nothing when it was abandoned, or is not stored (any more)."""
        with self._mutex:
            claim, expires_s = self._sessions.get(session_id), self._clock() + expires_in_s
            if claim is not None and claim.whole and list(claim.keys) == list(keys):
                claim.expires_s = expires_s
                for reading, _ in claim.parts:
                    reading.stream.need(need)
                return claim.fraction
            new = self._claim(self._sessions, session_id, keys, expires_s, need)
            # Only now: they may have most of it in common.
            self._release(claim)
            if new is None:
                self._sessions.pop(session_id, None)
                return lambda: 0.0
            return new.fraction

    def covers(self, keys: Sequence[bytes]) -> bool:
        """Whether all of ``keys`` are being read, or in the host tier."""
        first = 0
        here = self._host.has(keys) if self._host is not None else []
        with self._mutex:
            while first < len(keys):
                pages = max((reading.common(keys, first)[0] for reading in self._readings), default=0)
                if not pages and not any(here[first : first + 1]):
                    return False
                while any(here[first + pages : first + pages + 1]):
                    pages += 1
                first += pages
        return True

    def take(self, keys: Sequence[bytes]) -> list[Piece]:
        """``keys`` in pieces, by the streams that read them, which are the caller's from now on."""
        with self._mutex:
            found = pieces(keys, self._readings)
            for reading in {id(piece.reading): piece.reading for piece in found}.values():
                if isinstance(reading, _ReadAhead):
                    self._readings.remove(reading)
                    reading.used = True
                    self.stats.used += reading.source is not Source.HOST
            for claims in (self._requests, self._sessions):
                for owner in [owner for owner, claim in claims.items() if not any(_unused(claim))]:
                    del claims[owner]
            return found

    def tidy(self, waiting: Collection[str]) -> None:
        """Abandon what was read for requests that are not ``waiting`` any more, and what has expired."""
        with self._mutex:
            for rid in self._requests.keys() - set(waiting):
                self._release(self._requests.pop(rid))
            now = self._clock()
            expired = [owner for owner, claim in self._sessions.items() if (claim.expires_s or 0) <= now]
            for session in expired:
                self._release(self._sessions.pop(session))

    def forget(self, pages: Set[bytes]) -> None:
        """Abandon what was read with any of these pages, for whomever."""
        with self._mutex:
            for claims in (self._requests, self._sessions):
                for owner in [owner for owner, claim in claims.items() if not pages.isdisjoint(claim.keys)]:
                    self._release(claims.pop(owner))

    def __len__(self) -> int:
        """How many streams there are."""
        return len(self._readings)

    def kept(self) -> dict[str, int]:
        return {
            "request_read_aheads": len(self._requests),
            "session_read_aheads": len(self._sessions),
            "streams_read_ahead": len(self._readings),
        }

    def clear(self) -> None:
        """Abandon everything."""
        with self._mutex:
            for claims in (self._requests, self._sessions):
                while claims:
                    self._release(claims.popitem()[1])

    def move(self, store: PageStore) -> None:
        """Abandon everything, and read from another store from now on: its pages have the same keys."""
        with self._mutex:
            self._store = store
            for claims in (self._requests, self._sessions):
                while claims:
                    self._release(claims.popitem()[1])

    def _claim(
        self, claims: _Claims, owner: str, keys: Sequence[bytes], expires_s: float | None, need: Need
    ) -> _Claim | None:
        """Enter a claim in place of the owner's last; None when not all of ``keys`` are stored."""
        plan = pieces(keys, self._readings)
        if self._host is not None:
            plan = list(refined(keys, plan, self._host.pieces))
        if self._shared is not None:
            plan = list(refined(keys, plan, partial(self._shared.pieces, need=need)))
        pins: dict[int, Pin] = {}
        try:
            for piece in plan:
                if piece.reading is None:
                    pins[piece.pages.start] = self._store.pin(keys[piece.pages.start : piece.pages.stop])
        except KeyError:
            for pin in pins.values():
                pin.close()
            for piece in plan:
                if piece.reading is not None and not isinstance(piece.reading, _ReadAhead):
                    piece.reading.stream.discard()
            return None
        claim = claims[owner] = _Claim(keys, expires_s, [])
        for piece in plan:
            reading = piece.reading
            if not isinstance(reading, _ReadAhead):
                if reading is None:
                    stream = self._reader.open(pins[piece.pages.start], need)
                    reading = Reading(stream, Source.STAGING)
                self.stats.issued += reading.source is not Source.HOST
                reading = _ReadAhead(reading.stream, reading.source)
                self._readings.append(reading)
            else:
                reading.stream.need(need)
            reading.claims += 1
            claim.parts.append((reading, len(piece.pages)))
        return claim

    def _release(self, claim: _Claim | None) -> None:
        for reading in _unused(claim) if claim is not None else ():
            reading.claims -= 1
            if not reading.claims:
                self._readings.remove(reading)
                reading.used = False
                # Whoever asks for it must not wait for a drive.
                reading.stream.discard()
                self.stats.wasted += reading.source is not Source.HOST


def _unused(claim: _Claim) -> Iterator[_ReadAhead]:
    return (reading for reading, _ in claim.parts if reading.used is None)
