"""Operations: work that goes on after its request was answered, to be followed by its id.

The one kind now is ``flush``: a suspend whose KV was not durable in time. The service that answered keeps asking the
engine and writes the outcome; when that service ends, the operation fails, and the pages are stored all the same.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate import ids
from agentstate.control import ControlClient
from agentstate.database import Database, now_us
from agentstate.engines import Engine
from agentstate.errors import DatabaseError, EngineError, EngineRefused, EngineUnreachable, OperationNotFound
from agentstate.manifests import KvState
from agentstate.models import OperationState, operations

logger = logging.getLogger(__name__)

FLUSH_LIMIT_S = 120.0
# How long one question to an engine may wait: the longest that closing a service waits for a flush.
SLICE_MS = 1000
# What an engine may take to answer beyond the time that it was told to wait.
GRACE_S = 1.0
# A busy engine may miss a question; one that missed so many in a row is taken for gone.
MISSED_ANSWERS = 5
FOLLOWERS = 8
# Twice the limit of a flush: whoever owned an older one is gone.
ABANDONED_S = 2 * FLUSH_LIMIT_S

# The state of several ranks is that of the worst.
_WORST_FIRST = (KvState.UNKNOWN, KvState.LOST, KvState.PARTIAL, KvState.PENDING, KvState.DURABLE)


@dataclass(frozen=True)
class FlushOutcome:
    """What the engine has stored of a session: tokens from its head, pages and bytes over all ranks."""

    state: KvState
    tokens: int = 0
    pages: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Operation:
    """``result`` is None until the operation is ``done`` (what came of it) or ``failed`` (``{"error": reason}``)."""

    id: str
    kind: str
    session_id: str
    state: OperationState
    result: dict[str, Any] | None
    created_us: int
    finished_us: int | None


def load(connection: Connection, operation_id: str) -> Operation:
    """Raises OperationNotFound."""
    row = connection.execute(
        sa.select(*(operations.c[name] for name in Operation.__dataclass_fields__)).where(
            operations.c.id == operation_id
        )
    ).one_or_none()
    if row is None:
        raise OperationNotFound(f"there is no operation {operation_id}")
    return Operation(**{**row._mapping, "state": OperationState(row.state)})


def flush(ranks: Sequence[Engine], session_id: str, timeout_ms: int) -> FlushOutcome:
    """Ask all ranks of an engine to make a session durable, and wait for it up to ``timeout_ms``.

    ``pending`` when the time was not enough. Raises EngineUnreachable, EngineRefused.
    """
    deadline = time.monotonic() + timeout_ms / 1000
    answers = []
    for rank in ranks:
        left_ms = max(0, round((deadline - time.monotonic()) * 1000))
        answer = ControlClient(rank.control_address).call(
            "flush", left_ms / 1000 + GRACE_S, session=session_id, timeout_ms=left_ms
        )
        try:
            answers.append(
                FlushOutcome(
                    KvState(answer["state"]), int(answer["tokens"]), int(answer["pages"]), int(answer["bytes"])
                )
            )
        except (KeyError, TypeError, ValueError) as error:
            raise EngineRefused(
                f"the engine at {rank.control_address} gave an answer that is none to a flush: {error!r}"
            ) from error
    return FlushOutcome(
        state=min((answer.state for answer in answers), key=_WORST_FIRST.index, default=KvState.UNKNOWN),
        tokens=min((answer.tokens for answer in answers), default=0),
        pages=sum(answer.pages for answer in answers),
        nbytes=sum(answer.nbytes for answer in answers),
    )


class Flushes:
    """The barriers of one service, and the threads that follow those that are not through in time.

    ``owner`` names this service, the same after a restart. Close it to end the threads.
    """

    def __init__(self, database: Database, owner: str):
        self._database = database
        self.owner = owner
        self._closing = threading.Event()
        self._followers = ThreadPoolExecutor(FOLLOWERS, thread_name_prefix="agentstate-flush")

    def fail_abandoned(self) -> None:
        """Mark failed what an earlier process of this service, or one long gone, left unfinished."""
        with self._database.write() as connection:
            connection.execute(
                sa.update(operations)
                .where(
                    operations.c.state.in_((OperationState.PENDING, OperationState.RUNNING)),
                    sa.or_(
                        operations.c.owner == self.owner,
                        operations.c.created_us < now_us() - round(ABANDONED_S * 1_000_000),
                    ),
                )
                .values(
                    state=OperationState.FAILED,
                    result={"error": "the service ended before the operation did; suspend or resume the session again"},
                    finished_us=now_us(),
                )
            )

    def barrier(self, ranks: Sequence[Engine], session_id: str, timeout_ms: int) -> tuple[FlushOutcome, str | None]:
        """Wait up to ``timeout_ms`` for a session to be durable.

        Returns the outcome, and while that is ``pending`` the id of the operation that follows it (None if the
        database cannot record one). ``unknown`` when there is no engine to ask or it gives no usable answer: never
        a hope.
        """
        try:
            outcome = flush(ranks, session_id, timeout_ms)
        except EngineError as error:
            logger.warning("the durability of session %s is unknown: %s", session_id, error)
            return FlushOutcome(KvState.UNKNOWN), None
        if outcome.state is not KvState.PENDING:
            return outcome, None
        operation_id = ids.new("op")
        try:
            with self._database.write() as connection:
                connection.execute(
                    sa.insert(operations).values(
                        id=operation_id,
                        kind="flush",
                        session_id=session_id,
                        state=OperationState.PENDING,
                        owner=self.owner,
                        created_us=now_us(),
                    )
                )
        except DatabaseError as error:
            # The suspend itself is committed: it must not be answered with an error.
            logger.error("the flush of session %s cannot be followed: %s", session_id, error)
            return outcome, None
        self._followers.submit(self._follow, operation_id, list(ranks), session_id)
        return outcome, operation_id

    def close(self) -> None:
        """End the threads; what they followed fails. Waits for at most one question to an engine."""
        self._closing.set()
        self._followers.shutdown(wait=True)

    def _follow(self, operation_id: str, ranks: list[Engine], session_id: str) -> None:
        try:
            self._update(operation_id, state=OperationState.RUNNING)
            try:
                outcome = self._until_settled(ranks, session_id)
                values = {
                    "state": OperationState.DONE,
                    "result": {
                        "state": outcome.state,
                        "tokens": outcome.tokens,
                        "pages": outcome.pages,
                        "bytes": outcome.nbytes,
                    },
                }
            except (EngineError, TimeoutError) as error:
                values = {"state": OperationState.FAILED, "result": {"error": str(error)}}
            self._update(operation_id, **values, finished_us=now_us())
        except DatabaseError as error:
            logger.error("the outcome of operation %s could not be written: %s", operation_id, error)
        except Exception:
            logger.exception("operation %s stopped", operation_id)

    def _until_settled(self, ranks: list[Engine], session_id: str) -> FlushOutcome:
        deadline = time.monotonic() + FLUSH_LIMIT_S
        missed = 0
        while time.monotonic() < deadline:
            if self._closing.is_set():
                raise TimeoutError("the service was stopped before the session was durable")
            try:
                outcome = flush(ranks, session_id, SLICE_MS)
                missed = 0
            except EngineUnreachable:
                missed += 1
                if missed == MISSED_ANSWERS:
                    raise
                continue
            if outcome.state is not KvState.PENDING:
                return outcome
            # An engine that answers at once, although it was told to wait, is not asked in a tight loop.
            self._closing.wait(0.05)
        raise TimeoutError(f"the session was not durable after {FLUSH_LIMIT_S:g} s")

    def _update(self, operation_id: str, **values: Any) -> None:
        with self._database.write() as connection:
            connection.execute(sa.update(operations).where(operations.c.id == operation_id).values(**values))
