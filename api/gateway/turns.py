"""The turn of a request: its lease is taken before the engine is asked, renewed while it answers, and released
afterwards, in the background, with whatever the session is to keep of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool

from agentstate.api.gateway.fleet import REMEMBERED_S
from agentstate.api.service import Service
from agentstate.errors import (
    AgentStateError,
    DatabaseError,
    EngineError,
    InvalidEntry,
    SessionBusy,
    SessionExpired,
    SessionNotFound,
)
from agentstate.fleet.engines import Engine
from agentstate.fleet.handover import Handover
from agentstate.fleet.hints import Hints
from agentstate.fleet.manifests import KvState
from agentstate.fleet.operations import Kind, Question
from agentstate.fleet.pins import PinTier
from agentstate.fleet.placement import KvOutlook
from agentstate.sessions.belonging import Begun, Origin, State, Wanted
from agentstate.sessions.conversations import Conversation
from agentstate.sessions.responses import NewResponse
from agentstate.sessions.tenants import Tenant
from agentstate.sessions.transcript import NewEntry

logger = logging.getLogger(__name__)

RENEWALS_PER_TTL = 3
SALT_S = 5.0  # as long as an API key is trusted without asking again
# A turn ends in the background within this time, here or at another gateway, unless SQL does not answer.
ENDING_S = 1.0
# How long an engine is asked whether a turn's KV is durable. No client waits for the answer.
FLUSH_MS = 1000
# How often an end that SQL does not answer is tried again, each time after twice as long as before.
RETRIES = 6
FIRST_RETRY_S = 0.5


@dataclass(frozen=True)
class Kept:
    """What a session keeps of a turn: where its ``conversation`` stands, ``new`` entries, and a ``response``."""

    conversation: Conversation | None = None
    new: Sequence[NewEntry] = ()
    response: NewResponse | None = None


NOTHING = Kept()


class Turn:
    """A request's part in its session, which may be none: then there is only a salt."""

    def __init__(self, turns: Turns, tenant: Tenant, begun: Begun, salt: str | None, degraded: bool):
        self.begun = begun
        self.degraded = degraded
        self._turns = turns
        self.tenant = tenant
        self._salt = salt
        self._renewing = None if begun.resumed is None else asyncio.create_task(self._renew())
        self._over = begun.resumed is None
        self.hints = Hints()

    def expects(self, hints: Hints) -> bool:
        """Take note of what is expected once the turn has ended. False if nobody can be told."""
        if self.begun.resumed is None or self._turns.service.waits is None:
            return False
        self.hints = hints
        return True

    @property
    def session(self) -> str | None:
        return None if self.begun.resumed is None else self.begun.resumed.session.id

    @property
    def base_url(self) -> str | None:
        """The engine that has most of the session's pages; None if any will do."""
        resumed = self.begun.resumed
        return None if resumed is None or resumed.engine is None else resumed.engine.base_url

    @property
    def kv(self) -> KvOutlook | None:
        return None if self.begun.resumed is None else self.begun.resumed.kv

    def handover(self, request_id: str) -> Handover:
        resumed = self.begun.resumed
        if resumed is None:
            return Handover(None, self._salt, None, request_id)
        return Handover(resumed.engine_session, resumed.cache_salt, resumed.session.extra_key, request_id)

    async def end(self, kept: Kept) -> None:
        """End the turn; the session has ``kept``. Nothing is done if it has ended. Raises AgentStateError if that is
        not kept; the turn goes on then."""
        if not self._over:
            await self._turns.end(self, kept)
            self._over = True
            self.stop_renewing()

    def end_later(self, kept: Kept = NOTHING) -> None:
        """`end` in the background, where nobody waits for it."""
        if not self._over:
            self._over = True
            self._turns.later(self, kept)

    def stop_renewing(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()

    async def _renew(self) -> None:
        resumed = self.begun.resumed
        assert resumed is not None
        sessions = self._turns.service.sessions.of(self.tenant.id)
        ttl_s = self._turns.service.settings.lease_ttl_s
        while True:
            await asyncio.sleep(ttl_s / RENEWALS_PER_TTL)
            try:
                await run_in_threadpool(sessions.renew, resumed.session.id, resumed.lease.key, lease_ttl_s=ttl_s)
            except DatabaseError as error:
                logger.warning("the lease of session %s is not renewed for now: %s", resumed.session.id, error)
            except AgentStateError as error:
                logger.warning("session %s is lost to its request: %s", resumed.session.id, error)
                return


class Turns:
    """The turns of one gateway."""

    def __init__(self, service: Service):
        self.service = service
        self._salts: dict[str, tuple[float, str | None]] = {}
        self._ending: set[asyncio.Task[None]] = set()
        # By tenant, and by what the next request of a session may tell it by: its id, or the digest of its messages.
        self._ending_of: dict[tuple[str, str | bytes], asyncio.Task[None]] = {}
        self._asking: set[asyncio.Task[None]] = set()  # what nobody waits for

    async def begin(self, tenant: Tenant, wanted: Wanted, wait_s: float) -> Turn:
        """The turn of a request. A session that its client named and that is being run is waited for, ``wait_s`` or
        `ENDING_S` at most; one that is guessed for `ENDING_S`, if another gateway seems to be ending its turn. If SQL
        does not answer, the request has no session, unless it goes on from what is kept here. Raises AgentStateError.
        """
        if (wanted.named or wanted.harness or wanted.conversation or wanted.state) is None:
            return await self.without(tenant)
        await self._ended(tenant, wanted)
        settings = self.service.settings
        sessions = self.service.sessions.of(tenant.id)
        began_s = time.monotonic()
        deadline_s = began_s + max(wait_s, ENDING_S)
        while True:
            begin = partial(
                sessions.begin,
                wanted,
                lease_ttl_s=settings.lease_ttl_s,
                expires_in_s=settings.gateway_expires_s,
                patient=time.monotonic() < began_s + ENDING_S,
            )
            beginning = asyncio.wrap_future(self.service.database.submit(begin))
            try:
                begun = await asyncio.shield(beginning)
                if begun.ending is None:
                    break
                await self._changed(tenant, begun.ending, max(0.0, began_s + ENDING_S - time.monotonic()))
            except asyncio.CancelledError:
                # The client has left, and the lease may be taken all the same.
                beginning.add_done_callback(lambda begun: self._give_back(tenant, begun))
                raise
            except SessionBusy as busy:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or wanted.named is None:
                    raise
                await self._changed(tenant, wanted.named, min(left_s, busy.retry_after_s + 0.01))
            except DatabaseError:
                if not settings.gateway_fail_open or wanted.state not in (None, State()):
                    raise
                return await self.without(tenant, degraded=True)
        if begun.resumed is None:
            return await self.without(tenant)
        if time.monotonic() - self._salts.get(tenant.id, (float("-inf"), None))[0] > REMEMBERED_S / 2:
            self.keep(self._remember_salt(tenant))
        return Turn(self, tenant, begun, None, degraded=False)

    def _give_back(self, tenant: Tenant, beginning: asyncio.Future[Begun]) -> None:
        if not beginning.cancelled() and beginning.exception() is None and beginning.result().resumed is not None:
            Turn(self, tenant, beginning.result(), None, degraded=False).end_later()

    async def without(self, tenant: Tenant, *, degraded: bool = False) -> Turn:
        """A request that has no session, but its tenant's salt; ``degraded`` if that is because SQL does not answer.
        Raises DatabaseError if the salt is not known then, or is not to be used."""
        read_s, salt = self._salts.get(tenant.id, (float("-inf"), None))
        if time.monotonic() - read_s > SALT_S:
            try:
                salt = await self._read_salt(tenant)
            except DatabaseError:
                degraded = True
                if not self.service.settings.gateway_fail_open or time.monotonic() - read_s > REMEMBERED_S:
                    raise
        return Turn(self, tenant, Begun(None, Origin.NONE), salt, degraded)

    async def end(self, turn: Turn, kept: Kept) -> None:
        resumed = turn.begun.resumed
        assert resumed is not None
        named = turn.begun.origin is Origin.NAMED
        end = partial(
            self.service.sessions.of(turn.tenant.id).end,
            resumed.session.id,
            resumed.lease.key,
            kept.conversation,
            kept.new,
            response=kept.response,
            expires_in_s=None if named else self.service.settings.gateway_expires_s,
        )
        suspended = await asyncio.wrap_future(self.service.database.submit(end))
        if turn.hints.pin_s is not None:
            # Also without an engine: the next one reads of it.
            self.keep(self._pin(turn, resumed.session.id, turn.hints.pin_s))
        if suspended.ranks:
            self._tell(turn, suspended.ranks[0])
            question = Question(
                Kind.FLUSH,
                resumed.session.uid,
                suspended.ranks,
                beside=suspended.beside,
                decoding=suspended.decoding,
                epoch=suspended.epoch,
            )
            self.keep(self._ask(resumed.session.id, question))

    def _tell(self, turn: Turn, rank: Engine) -> None:
        """Tell what the client expects, after what has been learned."""
        waits, hints, resumed = self.service.waits, turn.hints, turn.begun.resumed
        if waits is None or resumed is None:
            return
        if hints.release:
            waits.released(turn.tenant.id, resumed.session.uid, rank)
        elif hints.forecast is not None:
            waits.expected(turn.tenant.id, resumed.session.uid, hints.forecast, "other", rank)

    async def _pin(self, turn: Turn, session_id: str, for_s: float) -> None:
        """Pin the session, as its client has asked."""
        sessions = self.service.sessions.of(turn.tenant.id)
        try:
            pinned = await run_in_threadpool(sessions.pin, session_id, PinTier.DEVICE, for_s)
            asked = self.service.operations.pin(pinned.uid, pinned.ranks, PinTier.DEVICE, for_s, FLUSH_MS / 1000)
            await asyncio.wrap_future(asked)
        except AgentStateError as error:
            logger.warning("session %s is not pinned for now: %s", session_id, error)

    def keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something in the background, at most until the gateway is closed."""
        _keep(self._asking, work)

    def later(self, turn: Turn, kept: Kept) -> None:
        """End a turn in the background. A request that goes on from there waits for that."""
        task = _keep(self._ending, self._end(turn, kept))
        told = [turn.session, None if kept.conversation is None else kept.conversation.whole()]
        keys = [(turn.tenant.id, by) for by in told if by is not None]
        self._ending_of.update(dict.fromkeys(keys, task))

        def over(task: asyncio.Task[None]) -> None:
            for key in keys:
                if self._ending_of.get(key) is task:
                    del self._ending_of[key]

        task.add_done_callback(over)

    @property
    def ending(self) -> int:
        """How many turns are ending in the background, or are being asked for."""
        return len(self._ending) + len(self._asking)

    async def close(self) -> None:
        """Wait for the turns that are ending."""
        for asking in self._asking:
            asking.cancel()
        while self._ending:
            await asyncio.gather(*self._ending, return_exceptions=True)

    async def _ended(self, tenant: Tenant, wanted: Wanted) -> None:
        """A client that has all of an answer may send the next request before its turn has ended here."""
        if self._ending_of:
            digests = () if wanted.conversation is None else wanted.conversation.prefixes()
            for by in (wanted.named, wanted.harness, *digests):
                if by is not None and (task := self._ending_of.get((tenant.id, by))) is not None:
                    await asyncio.wait((task,), timeout=ENDING_S)

    async def _read_salt(self, tenant: Tenant) -> str | None:
        salt: str | None = await run_in_threadpool(self.service.sessions.of(tenant.id).salt)
        self._salts[tenant.id] = (time.monotonic(), salt)
        return salt

    async def _remember_salt(self, tenant: Tenant) -> None:
        """For the hour in which SQL may not answer."""
        with suppress(DatabaseError):
            await self._read_salt(tenant)

    async def _end(self, turn: Turn, kept: Kept) -> None:
        try:
            for retry in range(RETRIES + 1):
                try:
                    await self.end(turn, kept)
                    return
                except InvalidEntry as error:
                    # An engine may say what fits no transcript. The session goes on from there all the same.
                    logger.warning("what was said in the turn of session %s is not kept: %s", turn.session, error)
                    kept = Kept(kept.conversation)
                except DatabaseError as error:
                    if retry == RETRIES:
                        raise
                    logger.warning("the turn of session %s does not end for now: %s", turn.session, error)
                    await asyncio.sleep(FIRST_RETRY_S * 2**retry)
        except AgentStateError as error:
            logger.error("the turn of session %s is not kept: %s", turn.session, error)
        finally:
            turn.stop_renewing()

    async def _ask(self, session_id: str, question: Question) -> None:
        state = KvState.UNKNOWN
        try:
            state = KvState((await self.service.operations.ask(question, FLUSH_MS)).state)
        except EngineError as error:
            logger.warning("the KV of session %s: %s", session_id, error)
        self.service.metrics.suspends.labels(state).inc()

    async def _changed(self, tenant: Tenant, session_id: str, timeout_s: float) -> None:
        try:
            uid = (await run_in_threadpool(self.service.sessions.of(tenant.id).read, session_id)).uid
        except (SessionNotFound, SessionExpired):
            return  # it has gone, which is a change
        with self.service.changes.watch(uid) as watch:
            await watch.wait(timeout_s)


def _keep(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run ``work`` as one of ``tasks``: the loop alone would not keep it."""
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
