"""Notes about waits, passed on to the process that keeps them.

Of several workers of a service one has the `Waits`. All of them, this one too, pass on to it what happens to sessions:
the notes about a session have one order then, whichever workers its requests come to. A note is one datagram of a pair
of sockets that all inherit, so those that were sent while nobody received are received by the next one. What cannot be
sent at once is dropped: waits are guesses.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from select import select
from typing import Any

import msgpack

from agentstate.fleet.engines import Engine, Phase
from agentstate.fleet.waits import Awaited, Hearing, Took
from agentstate.lookahead.forecast import Forecast

logger = logging.getLogger(__name__)

# A pair of sockets holds less than this, unless the system's defaults were raised.
MAX_BYTES = 1 << 18


def pair() -> tuple[socket.socket, socket.socket]:
    """What notes go into, and what they come out of."""
    into, out = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for end in (into, out):
        end.setblocking(False)
    return into, out


class Passing:
    """Passes on all that it hears. Thread-safe."""

    def __init__(self, into: socket.socket):
        self._into = into

    def begun(self, tenant: str, session: str, awaited: Sequence[Awaited], rank: Engine | None = None) -> None:
        self._pass("begun", tenant, session, [asdict(one) for one in awaited], _packed(rank))

    def expected(self, tenant: str, session: str, forecast: Forecast, kind: str, rank: Engine | None = None) -> None:
        self._pass("expected", tenant, session, forecast.pack(), kind, _packed(rank))

    def released(self, tenant: str, session: str, rank: Engine | None = None) -> None:
        self._pass("released", tenant, session, _packed(rank))

    def over(self, session: str, rank: Engine | None) -> None:
        self._pass("over", session, _packed(rank))

    def took(self, tenant: str, waits: Sequence[Took]) -> None:
        self._pass("took", tenant, [asdict(one) for one in waits])

    def _pass(self, *note: Any) -> None:
        try:
            self._into.send(msgpack.packb(note))
        except (OSError, OverflowError, ValueError) as error:
            logger.warning("what is known of a wait is not passed on: %s", error)


class Passed:
    """Tells ``hearing`` what is passed on, on a thread of its own, until it is closed."""

    def __init__(self, out: socket.socket, hearing: Hearing):
        self._out = out
        self._hearing = hearing
        self._ended, self._ending = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="agentstate-passed", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leaves what was not received to the next one."""
        self._ending.close()
        self._thread.join()
        self._ended.close()

    def _run(self) -> None:
        while True:
            ready, _, _ = select([self._out, self._ended], [], [])
            if self._ended in ready:
                return
            try:
                with suppress(BlockingIOError):
                    hear(self._out.recv(MAX_BYTES), self._hearing)
            except Exception:
                logger.exception("a note about a wait is not understood")


def hear(note: bytes, hearing: Hearing) -> None:
    """Tell ``hearing`` what one datagram says."""
    said, *about = msgpack.unpackb(note)
    if said == "begun":
        tenant, session, awaited, rank = about
        hearing.begun(tenant, session, [Awaited(**one) for one in awaited], _unpacked(rank))
    elif said == "expected":
        tenant, session, forecast, kind, rank = about
        hearing.expected(tenant, session, Forecast.unpack(forecast), kind, _unpacked(rank))
    elif said == "released":
        tenant, session, rank = about
        hearing.released(tenant, session, _unpacked(rank))
    elif said == "over":
        session, rank = about
        hearing.over(session, _unpacked(rank))
    elif said == "took":
        tenant, waits = about
        hearing.took(tenant, [Took(**one) for one in waits])
    else:
        raise ValueError(f"{said!r} is no note")


def _packed(rank: Engine | None) -> dict[str, Any] | None:
    return None if rank is None else {**asdict(rank), "reads": sorted(rank.reads)}


def _unpacked(rank: dict[str, Any] | None) -> Engine | None:
    if rank is None:
        return None
    return Engine(**{**rank, "reads": frozenset(rank["reads"]), "phase": Phase(rank["phase"])})
