"""The control endpoint of one rank: a thread of its own answers the verbs that `agentstate.fleet.control` lists."""

from __future__ import annotations

import hmac
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import zmq
from zmq.auth.thread import ThreadAuthenticator

from agentstate.errors import EngineError
from agentstate.fleet.control import KINDS, MAX_BYTES, new_secret, pack, protect, unpack

logger = logging.getLogger(__name__)

_POLL_MS = 2  # how often waiters are looked at again
_IDLE_MS = 200  # how long `close` may have to wait
_TICK_S = 1.0
_MOST_WAITERS = 256
_LONGEST_WAIT_S = 600.0


def _seconds(ms: Any) -> float:
    """Raises ValueError unless ``ms`` is a number of milliseconds from 0 on."""
    if isinstance(ms, bool) or not isinstance(ms, int | float) or not 0 <= ms < math.inf:
        raise ValueError(f"{ms!r} is no number of milliseconds")
    return ms / 1000


class _Waiter(NamedTuple):
    peer: list[bytes]
    answer: Callable[[], dict[str, Any]]
    deadline_s: float


class _Knows:
    """Lets peers connect that have the key derived from a secret."""

    def __init__(self, secret: str):
        self._key = zmq.curve_public(secret.encode())

    def callback(self, domain: str, key: bytes) -> bool:
        return hmac.compare_digest(key, self._key)


class Verbs(Protocol):
    """Answers the verbs, on the endpoint's thread. An EngineError is reported to the peer."""

    def flush(self, session_id: str, durability: str) -> Callable[[], dict[str, Any]]:
        """What tells how far the session is durable, on the ``node`` or in the ``shared`` store; while the state is
        ``pending`` the peer waits."""

    def prefetch(
        self, session_id: str, tier: str, packed: bytes | None, due_s: float | None
    ) -> Callable[[], dict[str, Any]]:
        """Begin a prefetch of the pages ``packed``, or of all that are known, which are needed ``due_s`` from now
        (None: at once), and return what tells its state."""

    def demote(self, session_id: str) -> dict[str, Any]: ...

    def foresee(self, session_id: str, packed: bytes | None, waited_s: float, kind: str) -> dict[str, Any]:
        """Take note of a forecast (`lookahead.Forecast`), None where nothing is known; ``waited_s`` of it have passed.
        Raises ValueError if it is malformed."""

    def pin(self, session_id: str, tier: str, for_s: float) -> dict[str, Any]:
        """Pin the session to a tier for so long, or end its pin with 0. Raises ValueError for another tier."""

    def release(self, session_id: str) -> dict[str, Any]: ...

    def explain(self, session_id: str) -> dict[str, Any]: ...

    def decisions(self, after: int) -> dict[str, Any]:
        """The decisions that came after the one with this id."""

    def spill(self, on: bool) -> dict[str, Any]: ...

    def stat(self) -> dict[str, Any]: ...

    def tick(self) -> None:
        """Called about once a second."""


class ControlEndpoint:
    """Binds ``address`` (``*`` takes a free port; `address` then says which). From `serve` to `close`, ``verbs``
    answers the requests of peers that know its ``secret``. A peer waits for a ``pending`` answer up to its own timeout,
    ten minutes at most; while 256 peers wait, more are refused. Raises EngineError if the address cannot be bound.
    """

    def __init__(self, address: str, verbs: Verbs):
        self.secret = new_secret()
        self._verbs = verbs
        # A context of its own, since all sockets of a context are authenticated alike.
        self._context = zmq.Context()
        self._gate = ThreadAuthenticator(self._context, log=logging.getLogger(f"{__name__}.gate"))
        self._gate.start()
        self._gate.configure_curve_callback(domain="*", credentials_provider=_Knows(self.secret))
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_BYTES)
        protect(self._socket, self.secret, server=True)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._end()
            raise EngineError(
                f"the control endpoint {address} cannot be bound ({error}): set AGENTSTATE_CONTROL_ADDRESS"
            ) from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._waiters: list[_Waiter] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agentstate-control", daemon=True)

    @property
    def waiting(self) -> int:
        """How many peers wait for an answer."""
        return len(self._waiters)

    def serve(self) -> None:
        """Answer from now on."""
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
        self._end()

    def _end(self) -> None:
        self._socket.close()
        self._gate.stop()
        self._context.term()

    def _run(self) -> None:
        next_tick_s = time.monotonic() + _TICK_S
        while not self._closing.is_set():
            if self._socket.poll(_POLL_MS if self._waiters else _IDLE_MS):
                *peer, request = self._socket.recv_multipart()
                self._answer(peer, request)
            self._waiters = [waiter for waiter in self._waiters if not self._settle(waiter)]
            if time.monotonic() >= next_tick_s:
                next_tick_s = time.monotonic() + _TICK_S
                try:
                    self._verbs.tick()
                except Exception:
                    # The next tick catches up.
                    logger.debug("agentstate: a tick failed", exc_info=True)

    def _answer(self, peer: list[bytes], raw: bytes) -> None:
        try:
            request = unpack(raw)
            timeout_s = float(request.get("timeout_ms", 0)) / 1000
            deadline_s = time.monotonic() + (timeout_s if 0 <= timeout_s <= _LONGEST_WAIT_S else _LONGEST_WAIT_S)
            match request.get("verb"):
                case "flush" | "prefetch" if len(self._waiters) >= _MOST_WAITERS:
                    self._send(peer, {"ok": False, "error": f"{_MOST_WAITERS} peers wait for answers already"})
                case "flush":
                    durability = str(request.get("durability", "node"))
                    answer = self._verbs.flush(str(request["session"]), durability)
                    self._waiters.append(_Waiter(peer, answer, deadline_s))
                case "prefetch":
                    due_s = None if (due_ms := request.get("due_ms")) is None else _seconds(due_ms)
                    begun = self._verbs.prefetch(
                        str(request["session"]), str(request["tier"]), request.get("keys"), due_s
                    )
                    self._waiters.append(_Waiter(peer, begun, deadline_s))
                case "demote":
                    self._send(peer, {"ok": True, **self._verbs.demote(str(request["session"]))})
                case "foresee":
                    self._send(peer, {"ok": True, **self._foresee(request)})
                case "pin":
                    self._send(peer, {"ok": True, **self._pin(request)})
                case "release":
                    self._send(peer, {"ok": True, **self._verbs.release(str(request["session"]))})
                case "explain":
                    self._send(peer, {"ok": True, **self._verbs.explain(str(request["session"]))})
                case "decisions":
                    self._send(peer, {"ok": True, **self._verbs.decisions(int(request["after"]))})
                case "spill":
                    self._send(peer, {"ok": True, **self._verbs.spill(bool(request["on"]))})
                case "stat":
                    self._send(peer, {"ok": True, **self._verbs.stat()})
                case verb:
                    self._send(peer, {"ok": False, "error": f"unknown verb {verb!r}"})
        except (KeyError, TypeError, ValueError) as error:
            self._send(peer, {"ok": False, "error": f"malformed request: {error!r}"})
        except EngineError as error:
            self._send(peer, {"ok": False, "error": str(error)})
        except Exception as error:
            logger.exception("agentstate: a control request failed")
            self._send(peer, {"ok": False, "error": str(error)})

    def _pin(self, request: dict[str, Any]) -> dict[str, Any]:
        return self._verbs.pin(str(request["session"]), str(request["tier"]), _seconds(request["ttl_ms"]))

    def _foresee(self, request: dict[str, Any]) -> dict[str, Any]:
        packed, kind = request["forecast"], request["kind"]
        if not isinstance(packed, bytes | None):
            raise ValueError(f"forecast is a {type(packed).__name__}, not packed")
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
        return self._verbs.foresee(str(request["session"]), packed, _seconds(request["waited_ms"]), kind)

    def _settle(self, waiter: _Waiter) -> bool:
        """Answer a waiter when its answer is final or its time is up. Returns whether it did."""
        try:
            answer = waiter.answer()
            if answer["state"] == "pending" and time.monotonic() < waiter.deadline_s:
                return False
            self._send(waiter.peer, {"ok": True, **answer})
        except EngineError as error:
            self._send(waiter.peer, {"ok": False, "error": str(error)})
        except Exception as error:
            logger.exception("agentstate: a control request failed")
            self._send(waiter.peer, {"ok": False, "error": str(error)})
        return True

    def _send(self, peer: list[bytes], answer: dict[str, Any]) -> None:
        self._socket.send_multipart([*peer, pack(answer)])
