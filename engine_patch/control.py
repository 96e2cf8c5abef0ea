"""The control endpoint of one rank: answers the verbs that `agentstate.control` lists, from a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import zmq

from agentstate.control import pack, unpack
from agentstate.errors import EngineError

logger = logging.getLogger(__name__)

_POLL_MS = 2  # how often what waits is looked at again
_IDLE_MS = 200  # how long `close` may have to wait
_TICK_S = 1.0


class _Waiter(NamedTuple):
    peer: list[bytes]
    answer: Callable[[], dict[str, Any]]
    deadline_s: float


class ControlEndpoint:
    """Binds ``address`` (``*`` takes a free port; `address` then says which) and serves until `close`.

    ``standing(session)`` answers a flush as of now, and ``prefetch(session, tier, keys)`` begins one and gives what
    answers it as of now; while the state is ``pending`` the peer waits, up to its own timeout. ``demote(session)``,
    ``spill(on)`` and ``stat()`` answer the other verbs. ``tick()`` is called about once a second. Raises EngineError
    when the address cannot be bound.
    """

    def __init__(
        self,
        address: str,
        *,
        standing: Callable[[str], dict[str, Any]],
        stat: Callable[[], dict[str, Any]],
        prefetch: Callable[[str, str, bytes | None], Callable[[], dict[str, Any]]],
        demote: Callable[[str], dict[str, Any]],
        spill: Callable[[bool], dict[str, Any]],
        tick: Callable[[], None],
    ):
        self._standing = standing
        self._stat = stat
        self._prefetch = prefetch
        self._demote = demote
        self._spill = spill
        self._tick = tick
        self._socket = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            raise EngineError(
                f"the control endpoint {address} cannot be bound ({error}): set AGENTSTATE_CONTROL_ADDRESS"
            ) from error
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._waiters: list[_Waiter] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agentstate-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        next_tick_s = time.monotonic() + _TICK_S
        while not self._closing.is_set():
            if self._socket.poll(_POLL_MS if self._waiters else _IDLE_MS):
                *peer, request = self._socket.recv_multipart()
                self._answer(peer, request)
            self._waiters = [waiting for waiting in self._waiters if not self._settle(waiting)]
            if time.monotonic() >= next_tick_s:
                next_tick_s = time.monotonic() + _TICK_S
                try:
                    self._tick()
                except Exception:
                    # Before the rank is complete, or what cannot be told now: the next one will.
                    logger.debug("agentstate: a tick failed", exc_info=True)

    def _answer(self, peer: list[bytes], raw: bytes) -> None:
        try:
            request = unpack(raw)
            deadline_s = time.monotonic() + float(request.get("timeout_ms", 0)) / 1000
            match request.get("verb"):
                case "flush":
                    session = str(request["session"])
                    self._waiters.append(_Waiter(peer, lambda: self._standing(session), deadline_s))
                case "prefetch":
                    begun = self._prefetch(str(request["session"]), str(request["tier"]), request.get("keys"))
                    self._waiters.append(_Waiter(peer, begun, deadline_s))
                case "demote":
                    self._send(peer, {"ok": True, **self._demote(str(request["session"]))})
                case "spill":
                    self._send(peer, {"ok": True, **self._spill(bool(request["on"]))})
                case "stat":
                    self._send(peer, {"ok": True, **self._stat()})
                case verb:
                    self._send(peer, {"ok": False, "error": f"unknown verb {verb!r}"})
        except (KeyError, TypeError, ValueError) as error:
            self._send(peer, {"ok": False, "error": f"malformed request: {error!r}"})
        except EngineError as error:
            self._send(peer, {"ok": False, "error": str(error)})
        except Exception as error:
            logger.exception("agentstate: a control request failed")
            self._send(peer, {"ok": False, "error": str(error)})

    def _settle(self, waiting: _Waiter) -> bool:
        """Answer what is final or whose time is up."""
        try:
            answer = waiting.answer()
            if answer["state"] == "pending" and time.monotonic() < waiting.deadline_s:
                return False
            self._send(waiting.peer, {"ok": True, **answer})
        except Exception as error:
            logger.exception("agentstate: a control request failed")
            self._send(waiting.peer, {"ok": False, "error": str(error)})
        return True

    def _send(self, peer: list[bytes], answer: dict[str, Any]) -> None:
        self._socket.send_multipart([*peer, pack(answer)])
