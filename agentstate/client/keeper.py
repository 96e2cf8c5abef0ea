"""A turn's threads: one renews its lease, another ends the turn if its caller cannot wait.

These are threads and not tasks, even for asynchronous turns: a tool that blocks the event loop must not cost the lease,
and a cancelled turn must still end.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TypeVar

from agentstate.answers import Lease
from agentstate.client.routes import Call
from agentstate.errors import AgentStateError, LeaseLost

logger = logging.getLogger(__name__)

A = TypeVar("A")


class BlockingSender(Protocol):
    """A thread-safe client."""

    def _send(self, call: Call[A]) -> A: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Keeper:
    """Renews a lease every ``interval_s`` until it is stopped or the lease is lost; it then calls ``on_lost``.

    ``sender`` returns the client to renew with; the keeper's thread calls it when a renewal is due.
    """

    def __init__(
        self,
        session_id: str,
        renewal: Call[Lease],
        sender: Callable[[], BlockingSender],
        interval_s: float,
        on_lost: Callable[[], None],
    ):
        self._session_id = session_id
        self._renewal = renewal
        self._sender = sender
        self._interval_s = interval_s
        self._on_lost = on_lost
        self._stopping = threading.Event()
        threading.Thread(target=self._run, name=f"agentstate-lease-{session_id}", daemon=True).start()

    def stop(self) -> None:
        """Stop renewing. Does not wait: a renewal in progress ends by itself, without calling ``on_lost``."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            try:
                self._sender()._send(self._renewal)
            except LeaseLost:
                if not self._stopping.is_set():
                    self._on_lost()
                return
            except AgentStateError:
                continue  # the service may be back before the lease lapses
            except Exception as error:
                # The client was closed, perhaps during this request.
                if not self._stopping.is_set():
                    logger.warning("the lease of session %s is not renewed any more: %s", self._session_id, error)
                return


def apart(session_id: str, client: BlockingSender, work: Callable[[BlockingSender], None]) -> None:
    """Do ``work`` with ``client`` on a new thread, then close the client. The process waits for it at exit."""

    def run() -> None:
        try:
            with client:
                work(client)
        except AgentStateError as error:
            logger.warning("session %s stays as it is until its lease lapses: %s", session_id, error)

    threading.Thread(target=run, name=f"agentstate-end-{session_id}", daemon=False).start()
