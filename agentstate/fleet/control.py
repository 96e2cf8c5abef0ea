"""The control protocol between the service and one rank of an engine.

A request is one msgpack map ``{"verb": str, **arguments}``; its answer is ``{"ok": true, **fields}`` or
``{"ok": false, "error": str}``, over ZeroMQ (a REQ socket here, a ROUTER socket at the engine). The engine's side
lives in ``engine_patch.control``.

Verbs::

    flush(session, timeout_ms, durability?)   -> state, tokens, pages, bytes,   the barrier of a suspend: until all is
                                                 shared_tokens, epoch                on the drive ("node", or nothing)
                                                                                     or in the shared store ("shared")
    prefetch(session, keys, tier, timeout_ms, -> state, tokens, pages, bytes    bring pages back before they are asked
             due_ms?)                                                            for: the packed page keys, in order,
                                                                                 to the tier "host" or "device"; without
                                                                                 keys, what the engine knows. They are
                                                                                 needed ``due_ms`` from now: without it,
                                                                                 at once
    demote(session, timeout_ms)               -> state, tokens, pages, bytes    evict the session from the device
                                                                                 first
    foresee(session, forecast, waited_ms,     -> state                          when the session's next request is
            kind)                                                                expected: a wait has begun, or more is
                                                                                 known of it
    release(session)                          -> state                          nobody comes back to the session: it is
                                                                                 the first to leave device and host
                                                                                 memory
    pin(session, tier, ttl_ms)                -> state, tier, tokens, pages,    let the session stay on "device", "host"
                                                 bytes                           or "nvme" for so long; 0 ends that
    explain(session)                          -> tiers, wait, index, place,     where the session's context is, what it
                                                 fetch, decisions, restores,    waits for, what its bytes are worth,
                                                 page_map, more_tokens          what was decided and restored of it
                                                                                lately, and which extents have it
    decisions(after)                          -> decisions, more, missed        the oldest decisions about sessions that
                                                                                 came after the one with this id, 0 for
                                                                                 all that are kept
    spill(on)                                 -> state                          whether what is computed from now on is
                                                                                 stored: "on" or "off"
    stat()                                    -> counters of the rank, its fingerprint and its page store

The first three wait up to ``timeout_ms`` and answer ``pending`` when that was not enough; asking again goes on
waiting, and starts nothing twice. Pages computed while spilling is off are stored when they are used again later, with
spilling on. The other states of the first three are those of ``KvState`` for a flush; ``warm``, ``partial`` and
``cold`` for a prefetch, which also says in ``tier`` where the pages went: to host memory if the device cannot be
reached; ``demoted`` for a demote. An engine answers with an error what it does not know or cannot do.

``shared_tokens`` are those from the head that are in the shared store; an engine that does not say has none there.
``epoch`` is that of the turn whose request was the newest to end there, 0 where none is known. To the durability
``shared`` an engine without a shared store answers with an error.

``foresee`` and ``release`` are answered at once: ``accepted``, or ``ignored`` by an engine that makes no use of them.
A ``pin`` is answered at once, too: ``accepted``; ``clipped`` where it holds on a lower tier, which ``tier`` says, or
for less of the session; ``ignored``; ``unpinned``.
A ``forecast`` is a packed `lookahead.Forecast` of the whole wait, None where nothing is known; ``waited_ms`` of it have
passed, and ``kind`` is what is waited for: ``tool``, ``person`` or ``other``. The newest one of a wait counts, and none
once the session's next request has come. They go to rank 0 alone.

An endpoint is bound to loopback unless an operator sets ``AGENTSTATE_CONTROL_ADDRESS`` otherwise. It answers only those
who know its secret, which the engine generates at start and registers in SQL. The secret is the key of both sides of a
CURVE connection (ZeroMQ's), so exchanges are encrypted and cannot be replayed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import msgpack
import zmq

from agentstate.errors import EngineRefused, EngineUnreachable

# A request brings at most the page keys of a context: 32 MB of them are a million pages.
MAX_BYTES = 64 << 20
# How long a connection is kept without an exchange.
_IDLE_S = 10.0
# What a session may wait for.
KINDS = ("tool", "person", "other")
# The same of a request, in what is counted: ``first`` is a session's first one at an engine, ``none`` one that proves
# no session.
GAPS = (*KINDS, "first", "none")
# Where the tokens of a prompt come from: ``fetched`` are those on the device that were brought there before a request
# needed them.
TIERS = ("device", "fetched", "host", "nvme", "recomputed")
# What an engine decides about a session, and the outcomes of that. A fetch is ``begun``, and then ``there`` or
# ``cancelled``; what is there is ``used``, has ``left`` the device before its request, or its forecast was ``wrong``;
# a request that comes before that makes it ``late``. A demotion is ``begun``, and then ``copied`` or ``failed``. An
# eviction is of a session that was ``waited_for``. A release is ``accepted`` or ``ignored``. Forecasts are listed if
# they are ``ignored``.
DECISIONS = {
    "fetch": ("begun", "there", "used", "late", "left", "wrong", "cancelled"),
    "demote": ("begun", "copied", "failed"),
    "evict": ("waited_for",),
    "release": ("accepted", "ignored"),
    "foresee": ("ignored",),
}
# Why a session's pages are restored to the device: for a request, under its forward; for a request that is queued,
# before its forward; and before there is a request.
RESTORES = ("request", "queued", "prefetch")
# What a request waits for at an engine before its first token, besides other requests.
CAUSES = ("reads", "memory")


def new_secret() -> str:
    """A secret for an endpoint: 40 characters."""
    secret: bytes = zmq.curve_keypair()[1]
    return secret.decode()


def protect(socket: Any, secret: str, *, server: bool) -> None:
    """Let a socket talk only to those who know ``secret``. Call it before the socket is bound or connected. A server
    also needs an authenticator (`zmq.auth`)."""
    public = zmq.curve_public(secret.encode())
    socket.curve_secretkey, socket.curve_publickey = secret.encode(), public
    if server:
        socket.curve_server = True
    else:
        socket.curve_serverkey = public


def pack(message: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(message, use_bin_type=True)
    return packed


def unpack(raw: bytes) -> dict[str, Any]:
    """Raises ValueError when ``raw`` is not one msgpack map with string keys."""
    try:
        message = msgpack.unpackb(raw, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(f"not a control message: {error}") from error
    if not isinstance(message, dict):
        raise ValueError(f"not a control message: a {type(message).__name__} instead of a map")
    if not all(isinstance(name, str) for name in message):
        raise ValueError("not a control message: a map with keys that are no strings")
    return message


class ControlClient:
    """Calls the verbs of one engine rank. Thread-safe: every call opens its own socket, so a call that timed out
    leaves no half-finished exchange behind for the next one. ``secret`` is None for an engine of a release that had
    none."""

    def __init__(self, address: str, secret: str | None = None):
        self.address = address
        self._secret = secret

    def call(self, verb: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises EngineUnreachable when no answer came within ``timeout_s`` (the engine may still act on the
        request) and EngineRefused when the engine answered with an error.
        """
        with (
            _reported(self.address, verb),
            closing(_connected(zmq.Context.instance(), self.address, self._secret)) as socket,
        ):
            socket.send(pack({"verb": verb, **arguments}))
            if not socket.poll(int(timeout_s * 1000), zmq.POLLIN):
                raise _silent(self.address, verb, timeout_s)
            return _answer(self.address, verb, socket.recv())


class ControlConnections:
    """The same for the ranks of many engines on one event loop, where waiting costs no thread. A connection whose
    exchange ended well is kept for the next one with that rank, since a handshake takes longer than a flush. Made and
    used on the loop; closed after its last call."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._idle: dict[tuple[str, str | None], list[tuple[Any, asyncio.TimerHandle]]] = {}

    async def call(
        self, address: str, secret: str | None, verb: str, timeout_s: float, **arguments: Any
    ) -> dict[str, Any]:
        """Send one request to the rank at ``address`` and wait for its answer. Raises EngineUnreachable, EngineRefused
        like `ControlClient.call`."""
        with _reported(address, verb):
            socket = self._take(address, secret)
            try:
                socket.send(pack({"verb": verb, **arguments}), zmq.NOBLOCK)
                if not await _is_answered(socket, timeout_s):
                    raise _silent(address, verb, timeout_s)
                raw = socket.recv(zmq.NOBLOCK)
            except BaseException:
                # Its exchange is half-finished, and an answer may still come.
                socket.close()
                raise
            self._keep(address, secret, socket)
            return _answer(address, verb, raw)

    @property
    def idle(self) -> int:
        """How many connections are kept."""
        return sum(map(len, self._idle.values()))

    def close(self) -> None:
        for kept in self._idle.values():
            for socket, expiry in kept:
                expiry.cancel()
                socket.close()
        self._idle.clear()
        # Also those of exchanges that are given up.
        self._context.destroy(linger=0)

    def _take(self, address: str, secret: str | None) -> Any:
        kept = self._idle.get((address, secret))
        if not kept:
            return _connected(self._context, address, secret)
        socket, expiry = kept.pop()
        expiry.cancel()
        if not kept:
            del self._idle[address, secret]
        return socket

    def _keep(self, address: str, secret: str | None, socket: Any) -> None:
        expiry = asyncio.get_running_loop().call_later(_IDLE_S, self._expire, address, secret)
        self._idle.setdefault((address, secret), []).append((socket, expiry))

    def _expire(self, address: str, secret: str | None) -> None:
        """Close the connection that has been idle longest: ZeroMQ goes on connecting to an engine that has ended."""
        kept = self._idle[address, secret]
        kept.pop(0)[0].close()
        if not kept:
            del self._idle[address, secret]


async def _is_answered(socket: Any, timeout_s: float) -> bool:
    """Whether something can be received within ``timeout_s``. What ZeroMQ has for this wakes up several times."""
    loop = asyncio.get_running_loop()
    answered = loop.create_future()

    def look() -> None:
        # Its descriptor says that there is news, not which.
        if not answered.done() and socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            answered.set_result(True)

    def give_up() -> None:
        if not answered.done():
            answered.set_result(False)

    descriptor = socket.getsockopt(zmq.FD)
    loop.add_reader(descriptor, look)
    timer = loop.call_later(timeout_s, give_up)
    try:
        look()
        found: bool = await answered
        return found
    finally:
        timer.cancel()
        loop.remove_reader(descriptor)


def _connected(context: Any, address: str, secret: str | None) -> Any:
    socket = context.socket(zmq.REQ)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        if secret is not None:
            protect(socket, secret, server=False)
        socket.connect(address)
    except BaseException:
        socket.close()
        raise
    return socket


@contextmanager
def _reported(address: str, verb: str) -> Iterator[None]:
    """Errors of an exchange as those of an engine."""
    try:
        yield
    except ValueError as error:
        raise EngineRefused(f"{address} answered '{verb}' with something else: {error}") from error
    except zmq.ZMQError as error:
        raise EngineUnreachable(f"the engine at {address} cannot be reached: {error}") from error


def _silent(address: str, verb: str, timeout_s: float) -> EngineUnreachable:
    return EngineUnreachable(f"the engine at {address} did not answer '{verb}' within {timeout_s:g} s")


def _answer(address: str, verb: str, raw: bytes) -> dict[str, Any]:
    answer = unpack(raw)
    if not answer.pop("ok", False):
        raise EngineRefused(f"the engine at {address} refused '{verb}': {answer.get('error', 'no reason given')}")
    return answer
