"""Operations: what the service asks of engines and goes on following after it has answered the request.

======== ============================================================================================
kind     what is carried out
======== ============================================================================================
flush    a suspend whose KV was not durable in time: asked again until it is
demote   a suspend that gives up the session's device memory, once its KV is durable
prefetch the session's pages are brought back before the next request needs them
======== ============================================================================================

One thread with an event loop asks for all of them, so a suspend that waits costs no thread. When the service ends, the
operations that it followed fail; the engines carry on all the same. The same thread sends `fleet.notices`, which nobody
waits for.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from agentstate import ids
from agentstate.errors import (
    DatabaseError,
    EngineError,
    EngineRefused,
    EngineUnreachable,
    OperationNotFound,
    TooManyOperations,
)
from agentstate.fleet.control import ControlConnections
from agentstate.fleet.engines import Engine
from agentstate.fleet.manifests import Durability, KvState
from agentstate.fleet.notices import Notice, Notices
from agentstate.sql.database import Database, now_us
from agentstate.sql.models import OperationState, operations

logger = logging.getLogger(__name__)

FLUSH_LIMIT_S = 120.0
# How long one question to an engine may wait: the longest that closing a service waits for an engine.
SLICE_MS = 1000
# How much longer an engine may take to answer than it was told to wait.
GRACE_S = 1.0
# A busy engine may miss a question; one that missed so many in a row is taken for gone.
MISSED_ANSWERS = 5
MAX_FOLLOWED = 2000
MAX_QUESTIONS = 200  # at once; each is a connection
# Twice the limit of a flush: whoever owned an older one is gone.
ABANDONED_S = 2 * FLUSH_LIMIT_S


class Kind(StrEnum):
    FLUSH = "flush"
    DEMOTE = "demote"
    PREFETCH = "prefetch"


class Tier(StrEnum):
    HOST = "host"
    DEVICE = "device"


class PrefetchState(StrEnum):
    WARM = "warm"  # all pages are in the tier
    PENDING = "pending"
    PARTIAL = "partial"  # a prefix is, and no more will be
    COLD = "cold"  # none is, and none will be


class DemoteState(StrEnum):
    DEMOTED = "demoted"
    PENDING = "pending"


# The state of several ranks is that of the worst, which comes first.
_STATES: dict[Kind, tuple[StrEnum, ...]] = {
    Kind.FLUSH: (KvState.UNKNOWN, KvState.LOST, KvState.PARTIAL, KvState.PENDING, KvState.DURABLE),
    Kind.PREFETCH: (PrefetchState.COLD, PrefetchState.PARTIAL, PrefetchState.PENDING, PrefetchState.WARM),
    Kind.DEMOTE: (DemoteState.PENDING, DemoteState.DEMOTED),
}


@dataclass(frozen=True)
class Outcome:
    """The outcome of a question: tokens from the session's head, pages and bytes over all ranks. Of a flush,
    ``durable_on`` is where all of the tokens are, None where there are none."""

    state: StrEnum
    tokens: int = 0
    pages: int = 0
    nbytes: int = 0
    durable_on: Durability | None = None

    @property
    def settled(self) -> bool:
        return self.state.value != "pending"

    def as_result(self) -> dict[str, Any]:
        found = {"state": self.state.value, "tokens": self.tokens, "pages": self.pages, "bytes": self.nbytes}
        return found if self.durable_on is None else {**found, "durable_on": self.durable_on.value}


class _Answer(NamedTuple):
    """A rank's. ``shared_tokens`` are in the shared store, from the head: none for an engine that does not say.
    ``epoch`` is of the turn that it is about, 0 if the engine does not say."""

    state: StrEnum
    tokens: int
    pages: int
    nbytes: int
    shared_tokens: int
    epoch: int


@dataclass(frozen=True)
class Operation:
    """``result`` is None until the operation is ``done`` (its outcome) or ``failed`` (``{"error": reason}``)."""

    id: str
    kind: str
    session_id: str
    state: OperationState
    result: dict[str, Any] | None
    created_us: int
    finished_us: int | None


@dataclass(frozen=True)
class Question:
    """What the ranks of one engine are asked about a session; ``keys`` are packed page keys, one string a rank, which
    are needed at ``due_s`` of the monotonic clock, or at once. A flush is ``pending`` until all is stored where
    ``durability`` says.

    With data parallelism the ``ranks`` are those of the DP rank that the session's turn was given to. A flush after the
    turn ``epoch`` asks those of the other ones ``beside`` it too if that one has served no request of the turn: the
    client, or a router before the engine, may have sent it elsewhere.

    Where prefill and decode are apart, a flush asks those of the engines that decode as well (``decoding``). What one
    of them says of the turn counts before what the engine that prefills says, which has the turn's prompts alone."""

    kind: Kind
    session_id: str
    ranks: Sequence[Engine]
    tier: Tier | None = None
    keys: Sequence[bytes] = ()
    due_s: float | None = None
    durability: Durability = Durability.NODE
    beside: Sequence[Sequence[Engine]] = ()
    decoding: Sequence[Sequence[Engine]] = ()
    epoch: int = 0

    def arguments(self, number: int) -> dict[str, Any]:
        if self.kind is not Kind.PREFETCH:
            # What an engine of an earlier release does too is asked as it was then.
            beyond = {} if self.durability is Durability.NODE else {"durability": self.durability.value}
            return {"session": self.session_id, **beyond}
        due = {} if self.due_s is None else {"due_ms": max(0, round((self.due_s - time.monotonic()) * 1000))}
        return {"session": self.session_id, "tier": str(self.tier), "keys": self.keys[number], **due}


def _epoch(answers: Sequence[_Answer]) -> int:
    """The turn that all ranks have served a request of."""
    return min((answer.epoch for answer in answers), default=0)


def _tokens(answers: Sequence[_Answer]) -> int:
    """The tokens that all ranks answer for."""
    return min((answer.tokens for answer in answers), default=0)


def _is_pending(answers: Sequence[_Answer]) -> bool:
    """Whether some rank has not stored all yet."""
    return any(answer.state is KvState.PENDING for answer in answers)


def load(connection: Connection, operation_id: str, tenant: str) -> Operation:
    """Raises OperationNotFound, also for another tenant's."""
    row = connection.execute(
        sa.select(*(operations.c[name] for name in Operation.__dataclass_fields__)).where(
            operations.c.id == operation_id, operations.c.tenant == tenant
        )
    ).one_or_none()
    if row is None:
        raise OperationNotFound(f"there is no operation {operation_id}")
    return Operation(**{**row._mapping, "state": OperationState(row.state)})


def fail_abandoned(database: Database, owner: str) -> None:
    """Fail the operations that ``owner``, and whatever `part_of` it, left unfinished when it ended, and those older
    than any that runs."""
    with database.write() as connection:
        connection.execute(
            sa.update(operations)
            .where(
                operations.c.state.in_((OperationState.PENDING, OperationState.RUNNING)),
                sa.or_(
                    operations.c.owner == owner,
                    operations.c.owner.startswith(part_of(owner, ""), autoescape=True),
                    operations.c.created_us < now_us() - round(ABANDONED_S * 1_000_000),
                ),
            )
            .values(
                state=OperationState.FAILED,
                result={"error": "the service ended before the operation did"},
                finished_us=now_us(),
            )
        )


def part_of(owner: str, part: object) -> str:
    """The name of one of several processes that are an owner together."""
    return f"{owner}/{part}"


class _Asker:
    """Asks engines, on the event loop that it is made on."""

    def __init__(self) -> None:
        self.connections = ControlConnections()
        self._questions = asyncio.Semaphore(MAX_QUESTIONS)

    def close(self) -> None:
        self.connections.close()

    async def ask(self, question: Question, timeout_ms: int) -> Outcome:
        """Ask all ranks once, for up to ``timeout_ms``. Raises EngineUnreachable, EngineRefused."""
        deadline = time.monotonic() + timeout_ms / 1000
        answers = await self._answers(question, deadline)
        if question.beside and _epoch(answers) < question.epoch:
            answers = max([answers, *await self._of_others(question, question.beside, deadline)], key=_epoch)
        if question.decoding:
            decoded = await self._of_others(question, question.decoding, deadline)
            # Of equals, the first: one that has yet to store what it has decoded, then who has stored most.
            decoded.sort(key=lambda found: (_is_pending(found), _tokens(found)), reverse=True)
            answers = max([*decoded, answers], key=_epoch)
        worst_first = _STATES[question.kind]
        tokens = _tokens(answers)
        durable_on = None
        if question.kind is Kind.FLUSH and tokens > 0:
            shared = all(answer.shared_tokens >= tokens for answer in answers)
            durable_on = Durability.SHARED if shared else Durability.NODE
        state = min((answer.state for answer in answers), key=worst_first.index, default=worst_first[0])
        if question.durability is Durability.SHARED and durable_on is Durability.NODE and state is KvState.DURABLE:
            # Whatever the engine makes of the question: it is not durable where that asks for it.
            state = KvState.PENDING
        return Outcome(
            state=state,
            tokens=tokens,
            pages=sum(answer.pages for answer in answers),
            nbytes=sum(answer.nbytes for answer in answers),
            durable_on=durable_on,
        )

    async def _answers(self, question: Question, deadline: float) -> list[_Answer]:
        async with self._questions:
            return await asyncio.gather(
                *(self._ask_rank(question, number, deadline) for number in range(len(question.ranks)))
            )

    async def _of_others(
        self, question: Question, others: Sequence[Sequence[Engine]], deadline: float
    ) -> list[list[_Answer]]:
        questions = [replace(question, ranks=ranks, beside=(), decoding=()) for ranks in others]
        return await asyncio.gather(*(self._answers_if_any(one, deadline) for one in questions))

    async def _answers_if_any(self, question: Question, deadline: float) -> list[_Answer]:
        try:
            return await self._answers(question, deadline)
        except EngineError:
            return []

    async def _ask_rank(self, question: Question, number: int, deadline: float) -> _Answer:
        rank = question.ranks[number]
        left_ms = max(0, round((deadline - time.monotonic()) * 1000))
        answer = await self.connections.call(
            rank.control_address,
            rank.control_secret,
            question.kind,
            left_ms / 1000 + GRACE_S,
            timeout_ms=left_ms,
            **question.arguments(number),
        )
        try:
            states = {state.value: state for state in _STATES[question.kind]}
            tokens, pages, nbytes = (int(answer[name]) for name in ("tokens", "pages", "bytes"))
            more = (int(answer.get(name, 0)) for name in ("shared_tokens", "epoch"))
            return _Answer(states[answer["state"]], tokens, pages, nbytes, *more)
        except (KeyError, TypeError, ValueError) as error:
            raise EngineRefused(
                f"the engine at {rank.control_address} gave an answer that is none to a {question.kind}: {error!r}"
            ) from error


class Operations:
    """The operations of one process of a service. ``owner`` names it, the same after a restart; ``on_told`` is called
    with what became of each notice (`Notices`). Close it to end its threads."""

    def __init__(self, database: Database, owner: str, on_told: Callable[[str], None] = lambda state: None):
        self._database = database
        self._on_told = on_told
        self.owner = owner
        self._closing = threading.Event()
        self._writers = ThreadPoolExecutor(2, thread_name_prefix="agentstate-operations-sql")
        self._loop = asyncio.new_event_loop()
        self._stop: asyncio.Event | None = None
        self._here: _Asker | None = None  # for whoever waits for an answer
        self._followed: set[asyncio.Task[None]] = set()
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), name="agentstate-operations", daemon=True)
        self._thread.start()
        started.wait()

    def announce(self, connection: Connection, tenant: str, kind: Kind, session_id: str) -> str:
        """Record an operation that is about to start, in the caller's transaction, and return its id.

        Raises TooManyOperations.
        """
        if len(self._followed) >= MAX_FOLLOWED:
            raise TooManyOperations(f"{MAX_FOLLOWED} operations are being followed: try again later")
        operation_id = ids.new("op")
        connection.execute(
            sa.insert(operations).values(
                id=operation_id,
                tenant=tenant,
                kind=kind,
                session_id=session_id,
                state=OperationState.PENDING,
                owner=self.owner,
                created_us=now_us(),
            )
        )
        return operation_id

    async def ask(self, question: Question, timeout_ms: int) -> Outcome:
        """Ask all ranks once, for up to ``timeout_ms``, on the caller's event loop: always the same one. Raises
        EngineUnreachable, EngineRefused."""
        if self._here is None:
            self._here = _Asker()
        return await self._here.ask(question, timeout_ms)

    def explain(self, session_id: str, ranks: Sequence[Engine], timeout_s: float) -> Future[list[dict[str, Any]]]:
        """Ask every rank where a session is, and why. The future raises EngineUnreachable, EngineRefused."""
        return self._of_all(ranks, "explain", timeout_s, session=session_id)

    def pin(
        self, session_id: str, ranks: Sequence[Engine], tier: str, for_s: float, timeout_s: float
    ) -> Future[list[dict[str, Any]]]:
        """Have every rank pin a session for so long, 0 to end that. The future raises EngineUnreachable,
        EngineRefused."""
        return self._of_all(ranks, "pin", timeout_s, session=session_id, tier=tier, ttl_ms=round(for_s * 1000))

    def _of_all(
        self, ranks: Sequence[Engine], verb: str, timeout_s: float, **arguments: Any
    ) -> Future[list[dict[str, Any]]]:
        async def ask() -> list[dict[str, Any]]:
            said = (
                self._asker.connections.call(rank.control_address, rank.control_secret, verb, timeout_s, **arguments)
                for rank in ranks
            )
            return list(await asyncio.gather(*said))

        return asyncio.run_coroutine_threadsafe(ask(), self._loop)

    def stat(self, rank: Engine, timeout_s: float) -> Future[dict[str, Any]]:
        """Ask a rank for its counters. The future raises EngineUnreachable, EngineRefused."""

        async def ask() -> dict[str, Any]:
            return await self._asker.connections.call(rank.control_address, rank.control_secret, "stat", timeout_s)

        return asyncio.run_coroutine_threadsafe(ask(), self._loop)

    def decisions(self, rank: Engine, after: int, timeout_s: float) -> dict[str, Any]:
        """Ask a rank for its decisions after an id, and wait for them. Raises EngineUnreachable, EngineRefused."""

        async def ask() -> dict[str, Any]:
            return await self._asker.connections.call(
                rank.control_address, rank.control_secret, "decisions", timeout_s, after=after
            )

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result()

    def follow(self, operation_id: str, questions: Sequence[Question], limit_s: float | None = None) -> None:
        """Carry out an operation that was announced and committed: ask one question after the other until each is
        settled, and record the outcome of the last one.

        It fails if an engine refuses, vanishes or takes longer than ``limit_s`` (by default ``FLUSH_LIMIT_S``), or if a
        flush that another question follows does not end ``durable``.
        """
        limit_s = FLUSH_LIMIT_S if limit_s is None else limit_s
        steps = [lambda question=question: self._until_settled(question, limit_s) for question in questions]
        self._loop.call_soon_threadsafe(self._start, operation_id, steps)

    def finish(self, operation_id: str, outcome: Outcome) -> None:
        """Record the outcome of an operation that needs no following."""
        self._update(operation_id, state=OperationState.DONE, result=outcome.as_result(), finished_us=now_us())

    def fail(self, operation_id: str, reason: str) -> None:
        self._update(operation_id, state=OperationState.FAILED, result={"error": reason}, finished_us=now_us())

    def tell(self, tenant: str, session: str, rank: Engine, verb: str, arguments: Callable[[], dict[str, Any]]) -> None:
        """Tell a rank something about a session of the tenant, once, without waiting for it (`Notices`)."""
        self._on_loop(lambda: self._notices.add(tenant, session, Notice(rank, verb, arguments)))

    def untell(self, session: str) -> None:
        """Do not tell what has not been told about a session."""
        self._on_loop(lambda: self._notices.remove(session))

    @property
    def told(self) -> Mapping[str, int]:
        """What became of all that was to be told (`Notices`)."""
        return dict(self._notices.told)

    def telling(self) -> int:
        """How much is still being told, of what was to be told before this is asked."""

        async def count() -> int:
            return self._notices.waiting

        return asyncio.run_coroutine_threadsafe(count(), self._loop).result()

    def _on_loop(self, act: Callable[[], None]) -> None:
        # After `close` there is no loop, and nobody to tell.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(act)

    def close(self) -> None:
        """End the threads; what they followed fails. Waits for at most one question to an engine. On the event loop
        that has asked, if one has."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._here is not None:
            self._here.close()
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._writers.shutdown(wait=True)

    # --- on the loop's thread

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve(started))
        self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        self._stop = asyncio.Event()
        self._asker = asker = _Asker()
        self._notices = Notices(
            lambda address, secret, verb, timeout_s, arguments: asker.connections.call(
                address, secret, verb, timeout_s, **arguments
            ),
            self._on_told,
        )
        started.set()
        await self._stop.wait()
        self._notices.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*rest, return_exceptions=True)
        asker.close()

    def _start(self, operation_id: str, steps: Sequence[Callable[[], Coroutine[Any, Any, Outcome]]]) -> None:
        task = self._loop.create_task(self._follow(operation_id, steps))
        self._followed.add(task)
        task.add_done_callback(self._followed.discard)

    async def _follow(self, operation_id: str, steps: Sequence[Callable[[], Coroutine[Any, Any, Outcome]]]) -> None:
        try:
            await self._write(operation_id, state=OperationState.RUNNING)
            values: dict[str, Any]
            try:
                for number, step in enumerate(steps, 1):
                    outcome = await step()
                    if number < len(steps) and outcome.state is not KvState.DURABLE:
                        raise EngineRefused(f"the KV is {outcome.state}, not durable")
                values = {"state": OperationState.DONE, "result": outcome.as_result()}
            except (EngineError, TimeoutError) as error:
                values = {"state": OperationState.FAILED, "result": {"error": str(error)}}
            await self._write(operation_id, **values, finished_us=now_us())
        except DatabaseError as error:
            logger.error("the outcome of operation %s could not be written: %s", operation_id, error)
        except Exception:
            logger.exception("operation %s stopped", operation_id)

    async def _until_settled(self, question: Question, limit_s: float) -> Outcome:
        deadline = time.monotonic() + limit_s
        missed = 0
        while time.monotonic() < deadline:
            if self._closing.is_set():
                raise TimeoutError(f"the service was stopped before the {question.kind} ended")
            try:
                outcome = await self._asker.ask(question, SLICE_MS)
                missed = 0
            except EngineUnreachable:
                missed += 1
                if missed == MISSED_ANSWERS:
                    raise
                continue
            if outcome.settled:
                return outcome
            # Do not ask an engine in a tight loop that answers at once although it was told to wait.
            await asyncio.sleep(0.05)
        raise TimeoutError(f"the {question.kind} did not end within {limit_s:g} s")

    async def _write(self, operation_id: str, **values: Any) -> None:
        await self._loop.run_in_executor(self._writers, lambda: self._update(operation_id, **values))

    def _update(self, operation_id: str, **values: Any) -> None:
        with self._database.write() as connection:
            connection.execute(sa.update(operations).where(operations.c.id == operation_id).values(**values))
