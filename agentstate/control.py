"""The control protocol between the service and one rank of an engine.

A request is one msgpack map ``{"verb": str, **arguments}``; its answer is ``{"ok": true, **fields}`` or
``{"ok": false, "error": str}``, over ZeroMQ (a REQ socket here, a ROUTER socket at the engine). The engine's side
lives in ``engine_patch.control``.

Verbs::

    flush(session, timeout_ms)           -> state, tokens, pages, bytes    the barrier of a suspend
    prefetch(session, tier, timeout_ms)  -> state, tier, tokens, bytes     bring its pages to host or device memory
    demote(session)                      -> demoted                        its device pages are evicted first
    stat()                               -> counters of the rank, its fingerprint and its page store

The state of a flush is a `KvState`. That of a prefetch is ``running`` when the time was up before it ended; ``done``;
``missing`` when nothing of the session is stored; or ``full`` when there was no room on the device. ``tier`` says where
the pages went: to host memory also when the device was asked for and cannot be reached.

An endpoint is bound to loopback unless an operator sets ``AGENTSTATE_CONTROL_ADDRESS`` otherwise. It carries no
secrets and authenticates nobody: whoever reaches it can ask for durability and for statistics, not for pages.
"""

from __future__ import annotations

from typing import Any

import msgpack
import zmq

from agentstate.errors import EngineRefused, EngineUnreachable


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
    leaves no half-finished exchange behind for the next one."""

    def __init__(self, address: str):
        self.address = address

    def call(self, verb: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises EngineUnreachable when no answer came within ``timeout_s`` (the engine may still act on the
        request) and EngineRefused when the engine answered with an error.
        """
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REQ)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            socket.connect(self.address)
            socket.send(pack({"verb": verb, **arguments}))
            if not socket.poll(int(timeout_s * 1000), zmq.POLLIN):
                raise EngineUnreachable(f"the engine at {self.address} did not answer '{verb}' within {timeout_s:g} s")
            answer = unpack(socket.recv())
        except ValueError as error:
            raise EngineRefused(f"{self.address} answered '{verb}' with something else: {error}") from error
        except zmq.ZMQError as error:
            raise EngineUnreachable(f"the engine at {self.address} cannot be reached: {error}") from error
        finally:
            socket.close()
        if not answer.pop("ok", False):
            raise EngineRefused(
                f"the engine at {self.address} refused '{verb}': {answer.get('error', 'no reason given')}"
            )
        return answer
