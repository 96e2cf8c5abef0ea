"""Engines: which ranks of which SGLang servers run, what they serve and where they answer.

Each rank registers itself and then sends heartbeats; one whose heartbeat stops is no longer live. Only its heartbeat
says that an engine runs, and a live engine may have died a moment ago.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate.sql.database import now_us
from agentstate.sql.models import engines
from agentstate.sql.prepared import Prepared


class Phase(StrEnum):
    """``prefill`` computes and restores prompts, and sends their KV to an engine that does ``decode``."""

    BOTH = ""
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True)
class Engine:
    """One rank of an engine.

    ``base_url`` is the OpenAI base URL of the server the rank belongs to (the same for all its ranks);
    ``control_address`` the rank's own ZeroMQ endpoint and ``control_secret`` what it answers to (`fleet.control`), None
    for an engine of an earlier release; ``model`` the name it is served under; ``fingerprint`` that of the pages which
    it reads: ranks that hold the same pages have one, and one of them writes manifests; ``pages_dir`` the root of its
    page store, and ``shared_store`` the URL of the store that it shares with other engines, empty for none. It
    ``reads`` what these other nodes have stored too, since they are page directories of its machine. The times are
    microseconds of the database's clock, 0 before the engine is registered.

    With data parallelism a server has ``dp_size`` DP ranks. Each serves requests of its own from pages of its own, with
    a ``node`` of their own. ``dp_rank`` is the one that this rank belongs to, ``rank`` its number within that one.

    ``phase`` is what it does of a request, where prefill and decode are apart.
    """

    id: str
    node: str
    rank: int
    control_address: str
    base_url: str
    model: str
    fingerprint: str
    pages_dir: str
    started_us: int = 0
    heartbeat_us: int = 0
    control_secret: str | None = field(default=None, repr=False)
    shared_store: str = ""
    dp_rank: int = 0
    dp_size: int = 1
    reads: frozenset[str] = frozenset()
    phase: Phase = Phase.BOTH


def register(connection: Connection, engine: Engine) -> None:
    """Announce an engine rank, started and alive now by the database's clock.

    Replaces the registration that the same rank left behind when it ended without unregistering: a store directory
    (root, fingerprint, rank on a node) has one owner at a time.
    """
    connection.execute(
        sa.delete(engines).where(
            engines.c.node == engine.node,
            engines.c.rank == engine.rank,
            engines.c.fingerprint == engine.fingerprint,
            engines.c.pages_dir == engine.pages_dir,
        )
    )
    connection.execute(
        sa.insert(engines).values(
            id=engine.id,
            node=engine.node,
            rank=engine.rank,
            control_address=engine.control_address,
            base_url=engine.base_url,
            model=engine.model,
            fingerprint=engine.fingerprint,
            pages_dir=engine.pages_dir,
            control_secret=engine.control_secret,
            shared_store=engine.shared_store,
            dp_rank=engine.dp_rank,
            dp_size=engine.dp_size,
            reads=_packed(engine.reads),
            phase=engine.phase,
            started_us=now_us(),
            heartbeat_us=now_us(),
        )
    )


def heartbeat(connection: Connection, engine_id: str, reads: Collection[str] = ()) -> bool:
    """Record that an engine is alive now, and ``reads`` what these other nodes have. False if it is not registered (any
    more): it must register again."""
    alive = {"heartbeat_us": now_us(), "reads": _packed(reads)}
    return connection.execute(sa.update(engines).where(engines.c.id == engine_id).values(alive)).rowcount == 1


def _packed(nodes: Collection[str]) -> str:
    return " ".join(sorted(nodes))


def unregister(connection: Connection, engine_id: str) -> None:
    """Take an engine off the list. Its pages and manifests stay."""
    connection.execute(sa.delete(engines).where(engines.c.id == engine_id))


def live(connection: Connection, timeout_s: float, model: str | None = None) -> list[Engine]:
    """The engines whose last heartbeat is at most ``timeout_s`` old, the youngest heartbeat first."""
    return [engine for engine in live_later(connection, timeout_s)() if model in (None, engine.model)]


def live_later(connection: Connection, timeout_s: float) -> Callable[[], list[Engine]]:
    """`live`, asked now and answered later."""
    sent = _LIVE.send(connection, {"timeout_us": round(timeout_s * 1_000_000)})
    return lambda: [_engine(row) for row in sent.all()]


def registered(connection: Connection) -> list[Engine]:
    """Every engine that registered and did not unregister, live or not, the oldest first."""
    query = _SELECT.order_by(engines.c.started_us, engines.c.id)
    return [_engine(row) for row in connection.execute(query)]


def _engine(row: Any) -> Engine:
    values = dict(zip(Engine.__dataclass_fields__, row, strict=True))
    reads, phase = frozenset(values["reads"].split()), Phase(values["phase"])
    return Engine(**{**values, "reads": reads, "phase": phase})


_SELECT = sa.select(*(engines.c[name] for name in Engine.__dataclass_fields__))
_LIVE = Prepared(
    _SELECT.where(engines.c.heartbeat_us >= now_us() - sa.bindparam("timeout_us", type_=sa.BigInteger())).order_by(
        engines.c.heartbeat_us.desc(), engines.c.id
    )
)
