"""What the console's routes share, from the service's start to its end."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Annotated

from fastapi import Depends, Request

from agentstate import answers
from agentstate.api.console import snapshot
from agentstate.api.console.access import SignedIn
from agentstate.api.placement import placement
from agentstate.api.service import Service
from agentstate.sessions.verbs import Sessions

_MAX_PLACED = 500


class Console:
    """Used on one event loop."""

    def __init__(self, service: Service):
        self.service = service
        self.signed_in = SignedIn(service.database)
        self.snapshots = snapshot.Snapshots(service)
        self._placed: OrderedDict[tuple[str, str], tuple[float, asyncio.Task[answers.Placement]]] = OrderedDict()

    def close(self) -> None:
        self.snapshots.close()

    async def placement(self, sessions: Sessions, tenant: str, session_id: str) -> answers.Placement:
        """Where a session's KV is, for all who look at it: its engine is asked at most every ``snapshot.PERIOD_S``.
        Raises SessionNotFound, SessionExpired, DatabaseError."""
        now_s, key = asyncio.get_running_loop().time(), (tenant, session_id)
        at_s, asking = self._placed.get(key, (float("-inf"), None))
        if asking is None or (asking.done() and now_s - at_s >= snapshot.PERIOD_S):
            asking = asyncio.create_task(placement(self.service, sessions, session_id))
            asking.add_done_callback(lambda task: task.cancelled() or task.exception())
            self._placed[key] = (now_s, asking)
            while len(self._placed) > _MAX_PLACED:
                self._placed.popitem(last=False)
        return await asyncio.shield(asking)

    def forget_placement(self, tenant: str, session_id: str) -> None:
        """Ask again: something was done to the session."""
        self._placed.pop((tenant, session_id), None)


async def _console_of(request: Request) -> Console:
    console: Console = request.app.state.console
    return console


ConsoleDep = Annotated[Console, Depends(_console_of)]
