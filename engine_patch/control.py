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

_TICK_MS = 2  # how often a waiting flush is looked at again
_IDLE_MS = 200  # how long `close` may have to wait


class _Waiting(NamedTuple):
    peer: list[bytes]
    session: str
    deadline: float


class ControlEndpoint:
    """Binds ``address`` (``*`` takes a free port; `address` then says which) and serves until `close`.

    ``standing(session)`` answers a flush as of now; while its state is ``pending`` the peer waits, up to its own
    timeout. ``stat()`` answers the other verb. Raises EngineError when the address cannot be bound.
    """

    def __init__(self, address: str, standing: Callable[[str], dict[str, Any]], stat: Callable[[], dict[str, Any]]):
        self._standing = standing
        self._stat = stat
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
        self._waiting: list[_Waiting] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agentstate-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            if self._socket.poll(_TICK_MS if self._waiting else _IDLE_MS):
                *peer, request = self._socket.recv_multipart()
                self._answer(peer, request)
            self._waiting = [waiting for waiting in self._waiting if not self._settle(waiting)]

    def _answer(self, peer: list[bytes], raw: bytes) -> None:
        try:
            request = unpack(raw)
            match request.get("verb"):
                case "flush":
                    deadline = time.monotonic() + float(request.get("timeout_ms", 0)) / 1000
                    self._waiting.append(_Waiting(peer, str(request["session"]), deadline))
                case "stat":
                    self._send(peer, {"ok": True, **self._stat()})
                case verb:
                    self._send(peer, {"ok": False, "error": f"unknown verb {verb!r}"})
        except (KeyError, TypeError, ValueError) as error:
            self._send(peer, {"ok": False, "error": f"malformed request: {error!r}"})
        except Exception as error:
            logger.exception("agentstate: a control request failed")
            self._send(peer, {"ok": False, "error": str(error)})

    def _settle(self, waiting: _Waiting) -> bool:
        """Answer a flush whose state is final or whose time is up."""
        try:
            answer = self._standing(waiting.session)
            if answer["state"] == "pending" and time.monotonic() < waiting.deadline:
                return False
            self._send(waiting.peer, {"ok": True, **answer})
        except Exception as error:
            logger.exception("agentstate: flush of %s failed", waiting.session)
            self._send(waiting.peer, {"ok": False, "error": str(error)})
        return True

    def _send(self, peer: list[bytes], answer: dict[str, Any]) -> None:
        self._socket.send_multipart([*peer, pack(answer)])
