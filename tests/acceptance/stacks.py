"""What the tests' stacks are made with, what their ranks say, and when nothing is under way in them.

An engine answers before all is done that follows from the answer. Waits for that are here, so that no test asserts what
may be so a moment later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import sqlalchemy as sa

from agentstate.cli.local import LocalService, LocalStack
from agentstate.fleet.control import ControlClient
from agentstate.fleet.manifests import split_keys
from agentstate.pages.files import read_header
from agentstate.sql.database import Database
from agentstate.sql.models import engines, shared_extents

PATIENCE_S = 600


class MakeStack(Protocol):
    def __call__(self, home: Path, checkpoint: Path, beside: LocalService | None = None) -> LocalStack: ...


def until(reached: Callable[[], Any], otherwise: Callable[[], Any] = lambda: "it never happened") -> None:
    """Wait for something that happens by itself. Raises AssertionError, with what there is ``otherwise``, if it does
    not."""
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.05)


def give_up(stack: LocalStack) -> None:
    """Have the service take the stack's engine, which was killed, for one that has ended: its heartbeats are long
    ago."""
    own = engines.c.base_url == f"{stack.engine_url}/v1"
    with closing(Database(stack.database_url)) as database, database.write() as connection:
        connection.execute(sa.update(engines).where(own).values(heartbeat_us=1))
    assert not stack.ranks()


def ask_ranks(stack: LocalStack, verb: str, **arguments: Any) -> list[dict[str, Any]]:
    """What each rank of the engine answers at its control endpoint."""
    found = stack.ranks()
    found.sort(key=lambda engine: engine.rank)
    return [
        ControlClient(engine.control_address, engine.control_secret).call(verb, 60, **arguments) for engine in found
    ]


def stats_at_rest(stack: LocalStack) -> list[dict[str, Any]]:
    """What each rank says once none keeps anything: everything is stored and merged, what was wrong is dropped, and
    the extents on disk stay as they are. Raises AssertionError, with what is kept, if that does not come."""
    found: list[dict[str, Any]] = []

    def at_rest() -> bool:
        found[:] = ask_ranks(stack, "stat")
        return bool(found) and not any(any(stat["kept"].values()) for stat in found)

    def left() -> list[dict[str, int]]:
        return [{what: count for what, count in stat["kept"].items() if count} for stat in found]

    until(at_rest, left)
    return found


def stat_at_rest(stack: LocalStack) -> dict[str, Any]:
    """The same of an engine with one rank."""
    (stat,) = stats_at_rest(stack)
    return stat


def suspend(stack: LocalStack) -> None:
    """Wait until nothing is under way on any rank, and empty the device."""
    stats_at_rest(stack)
    stack.flush_device()


def all_shared(*stacks: LocalStack) -> None:
    """Wait until all that the engines have stored is in the store that they share, and each knows all that is there:
    those that publish everything."""

    def shared() -> bool:
        for stack in stacks:
            stack.settle()
        with closing(Database(stacks[0].database_url)) as database, database.read() as connection:
            columns = shared_extents.c.fingerprint, shared_extents.c["keys"]
            listed = connection.execute(sa.select(*columns).where(shared_extents.c.doomed_us.is_(None))).all()
        there = {(row.fingerprint, key) for row in listed for key in split_keys(row.keys)}
        headers = [read_header(path) for stack in stacks for path in stack.home.glob("pages/*/rank0/extents/*.ext")]
        stored = {(header.fingerprint.hex(), key) for header in headers for key in header.keys}
        return stored <= there and all(knows(stack.stat(), len(listed)) for stack in stacks)

    def knows(stat: dict[str, Any], extents: int) -> bool:
        of_pools = [pool["shared"] for pool in (stat, *stat["pools"].values())]
        known = sum(pool["extents"] + pool["extents_rejected"] for pool in of_pools)
        return known >= extents and all(pool["available"] for pool in of_pools)

    def shared_undisturbed() -> bool:
        try:
            return shared()
        except FileNotFoundError:  # an extent was merged meanwhile
            return False

    until(shared_undisturbed)
