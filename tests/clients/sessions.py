"""Tenants of a service, each with a key, and what SQL knows of their sessions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import sqlalchemy as sa

from agentstate.cli.local import LocalStack
from agentstate.fleet import manifests
from agentstate.sessions import tenants
from agentstate.settings import Settings
from agentstate.sql.database import Database
from agentstate.sql.models import SessionStatus, conversation_tips, sessions

PATIENCE_S = 600


@dataclass(frozen=True)
class Session:
    """``turns`` is how many turns it has had; ``durable`` how many of its tokens can be restored."""

    name: str
    status: str
    turns: int
    durable: int


class Tenant:
    """A tenant with a key of its own, by which nobody else has its sessions or finds its pages."""

    def __init__(self, stack: LocalStack, name: str):
        self._name = name
        self._url = Settings(home=stack.home).sqlalchemy_url
        database = Database(self._url)
        with database.write() as connection:
            self.key = tenants.create_key(connection, name).secret
        database.close()

    def sessions(self) -> list[Session]:
        """All of them, by name."""
        database = Database(self._url)
        try:
            with database.read() as connection:
                rows = connection.execute(
                    sa.select(sessions).where(sessions.c.tenant == self._name).order_by(sessions.c.name)
                ).all()
                return [_session(connection, row) for row in rows]
        finally:
            database.close()

    def await_durable(self, tokens: int) -> list[Session]:
        """Its sessions, once each is suspended with so many tokens that can be restored."""
        return self._await(lambda found: all(each.durable >= tokens for each in found))

    def await_turns(self, turns: int, durable: int = 0) -> list[Session]:
        """Its sessions, once all are suspended, and one has had so many turns, and so many tokens of it can be
        restored."""
        return self._await(lambda found: any(each.turns >= turns and each.durable >= durable for each in found))

    def _await(self, reached: Callable[[list[Session]], bool]) -> list[Session]:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = self.sessions()
            if found and all(each.status == SessionStatus.SUSPENDED for each in found) and reached(found):
                return found
            assert time.monotonic() < deadline, f"after {PATIENCE_S} s: {found}"
            time.sleep(0.02)


def _session(connection: sa.Connection, row: sa.Row) -> Session:
    turns = sa.select(sa.func.count()).where(conversation_tips.c.session_id == row.id)
    stored = manifests.coverage(connection, [row.id])
    durable = stored[0].tokens if stored else 0
    return Session(row.name, row.status, connection.execute(turns).scalar_one(), durable)
