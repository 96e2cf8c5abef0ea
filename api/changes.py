"""Wait for sessions to change: one database query at a time serves all waiters, and none needs a thread.

Waiters also see changes by other services and engines, because all changes are in SQL.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa
from starlette.concurrency import run_in_threadpool

from agentstate.errors import DatabaseError
from agentstate.sql.database import Database
from agentstate.sql.models import sessions

logger = logging.getLogger(__name__)

POLL_S = 0.1
CHUNK = 500


class Watch:
    """A waiter; ``closing`` is set when the service ends."""

    def __init__(self) -> None:
        self.closing = False
        self._changed = asyncio.Event()

    def wake(self) -> None:
        self._changed.set()

    async def wait(self, timeout_s: float) -> bool:
        """Whether the session may have changed since the last wait; False when ``timeout_s`` passed first."""
        try:
            await asyncio.wait_for(self._changed.wait(), timeout_s)
        except TimeoutError:
            return False
        self._changed.clear()
        return True


class Changes:
    """Tells waiters that a session has a new revision. Used on one event loop."""

    def __init__(self, database: Database):
        self._database = database
        self._watches: dict[str, set[Watch]] = {}
        self._revisions: dict[str, int | None] = {}
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    @contextmanager
    def watch(self, uid: str) -> Iterator[Watch]:
        watch = Watch()
        watch.closing = self._closing
        self._watches.setdefault(uid, set()).add(watch)
        if self._task is None:
            self._task = asyncio.create_task(self._poll())
        try:
            yield watch
        finally:
            self._watches[uid].discard(watch)
            if not self._watches[uid]:
                del self._watches[uid]
                self._revisions.pop(uid, None)

    def close(self) -> None:
        """Tell all waiters that the service ends."""
        self._closing = True
        for watches in self._watches.values():
            for watch in watches:
                watch.closing = True
                watch.wake()

    async def _poll(self) -> None:
        try:
            while self._watches:
                await asyncio.sleep(POLL_S)
                watched = list(self._watches)
                try:
                    found = await run_in_threadpool(self._look_up, watched)
                except DatabaseError as error:
                    logger.warning("changes of sessions are not seen for now: %s", error)
                    continue
                for uid in watched:
                    # The first look-up only records the revision. It also wakes the waiters once, so those that came
                    # before it miss nothing.
                    if uid not in self._revisions or self._revisions[uid] != found.get(uid):
                        self._revisions[uid] = found.get(uid)
                        for watch in self._watches.get(uid, ()):
                            watch.wake()
        finally:
            self._task = None

    def _look_up(self, uids: list[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        with self._database.read() as connection:
            for start in range(0, len(uids), CHUNK):
                query = sa.select(sessions.c.id, sessions.c.revision).where(
                    sessions.c.id.in_(uids[start : start + CHUNK])
                )
                found.update((row.id, row.revision) for row in connection.execute(query))
        return found
