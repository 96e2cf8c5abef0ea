"""The OpenAI Agents SDK's ``Session``, kept in an AgentState session.

::

    async with AsyncClient("http://127.0.0.1:8700") as client:
        async with AgentStateSession("agent-17", client, model="smollm2") as session:   # one turn: resumed, suspended
            await Runner.run(agent, "Hello", session=session, run_config=session.run_config())
        print(session.turn.suspended.kv)

In the block the agent holds its session's lease, and the engine knows whose KV its calls make. Without the block the
object is a ``Session`` like the SDK's others: every change is a turn of its own, and several writers take turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self, cast

from agents import ModelSettings, OpenAIProvider, RunConfig, SessionSettings, TResponseInputItem

from agentstate import documents
from agentstate.answers import Entry
from agentstate.client import AsyncClient, AsyncTurn, message, note
from agentstate.client.turn import TurnOptions
from agentstate.errors import AgentStateError, RevisionStale, SessionNotFound
from agentstate.sql.models import EntryKind

PAGE = 1000
# What one append may have: the service takes bodies of 8 MiB, of which a part is not entries.
MAX_ENTRIES = 1000
BATCH_BYTES = 7 * 1024 * 1024
# Items before the newest note of this kind were cleared.
CLEARED = {"openai_agents": "cleared"}


class AgentStateSession:
    """An agent's conversation, as the SDK's ``Session`` protocol wants it.

    Items are messages of the session, as they are. The session is created with ``model``, the name under which an
    engine serves it, when something is first written. ``session_settings.limit`` bounds what is read when the SDK does
    not say. A change outside of a block waits up to ``busy_timeout_s`` (30 at most) while another runs the session, and
    then raises SessionBusy. Every method may raise what a client's do.
    """

    def __init__(
        self,
        session_id: str,
        client: AsyncClient,
        *,
        model: str,
        session_settings: SessionSettings | None = None,
        busy_timeout_s: float = 10.0,
    ):
        self.session_id = session_id
        self.session_settings = session_settings
        #: The turn of the block, also after it has ended; None before.
        self.turn: AsyncTurn | None = None
        self._client = client
        self._model = model
        self._busy_timeout_s = busy_timeout_s
        self._running: AsyncTurn | None = None
        self._changing = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self._client.ensure_session(self.session_id, self._model)
        self.turn = self._running = await self._client.turn(self.session_id, tail=0).__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        turn, self._running = self._running, None
        assert turn is not None
        await turn.__aexit__(kind, error, trace)

    def run_config(self) -> RunConfig:
        """In a block: how `Runner.run` reaches the engine, so that the engine knows the session. Every agent of the
        run uses the session's model; traces are not sent anywhere.

        Raises EngineUnreachable when no live engine serves the model, RuntimeError outside of a block.
        """
        if self._running is None:
            raise RuntimeError(f"session {self.session_id} is not being run: use it in an async with statement")
        return RunConfig(
            model=self._running.session.model,
            model_provider=OpenAIProvider(base_url=self._running.base_url, api_key="none", use_responses=False),
            model_settings=ModelSettings(extra_body=dict(self._running.extra_body)),
            tracing_disabled=True,
        )

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """The conversation, the oldest item first; with a limit its newest items."""
        if limit is None and self.session_settings is not None:
            limit = self.session_settings.limit
        found = [_item(entry) async for entry in self._newest_first(PAGE if limit is None else limit, at_most=limit)]
        return found[::-1]

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        """Append items, all or none.

        More than one request may take go in several. Where one of them is refused, those before it are taken back;
        where the process ends between them, they stay.
        """
        if not items:
            return
        first, *others = _batches([message(dict(item)) for item in items])
        async with self._changing, self._writing() as turn:
            appended = await turn.append(*first)
            try:
                for batch in others:
                    await turn.append(*batch)
            except AgentStateError:
                before = appended.data[0].parent_id
                await self._client.rewind(self.session_id, before, revision="*", lease=turn.lease)
                raise

    async def pop_item(self) -> TResponseInputItem | None:
        """Take back the newest item, and what was noted after it; None when there is none."""
        if await self._is_empty():
            return None
        async with self._changing, self._writing() as turn:
            while True:
                # Read before the entry: the rewind fails where another one came to be the newest since.
                current = await self._client.read(self.session_id)
                newest = [entry async for entry in self._newest_first(1, at_most=1)]
                if not newest:
                    return None
                before = newest[0].parent_id
                try:
                    await self._client.rewind(self.session_id, before, revision=current.revision, lease=turn.lease)
                except RevisionStale:
                    continue
                return _item(newest[0])

    async def clear_session(self) -> None:
        """Start a new conversation. The old one stays in the session's history; it goes when the session is deleted."""
        if await self._is_empty():
            return
        async with self._changing, self._writing() as turn:
            await turn.append(note(CLEARED))

    async def _is_empty(self) -> bool:
        return not await self.get_items(limit=1)

    async def _newest_first(self, wanted: int, *, at_most: int | None = None) -> AsyncIterator[Entry]:
        """The messages since the conversation was last cleared. Reads about as many at once as are ``wanted``."""
        after, more, given = None, wanted > 0, 0
        while more:
            try:
                page = await self._client.entries(self.session_id, after=after, limit=min(wanted, PAGE), order="desc")
            except SessionNotFound:
                return
            for entry in page.data:
                if entry.kind is EntryKind.NOTE and entry.payload == CLEARED:
                    return
                if entry.kind is EntryKind.MESSAGE:
                    yield entry
                    given += 1
                    if given == at_most:
                        return
            after, more = page.last_id, page.has_more

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[AsyncTurn]:
        """The block's turn, or one of its own, for which it waits while another one runs the session."""
        if self._running is not None:
            yield self._running
            return
        options: TurnOptions = {"tail": 0, "durable_timeout_ms": 0, "busy_timeout_s": self._busy_timeout_s}
        async with AsyncExitStack() as stack:
            try:
                turn = await stack.enter_async_context(self._client.turn(self.session_id, **options))
            except SessionNotFound:
                await self._client.ensure_session(self.session_id, self._model)
                turn = await stack.enter_async_context(self._client.turn(self.session_id, **options))
            yield turn


def _batches(entries: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Entries in groups that the service takes at once, one that is too large for it by itself."""
    batches: list[list[dict[str, Any]]] = [[]]
    size_bytes = 0
    for entry in entries:
        entry_bytes = len(documents.encode(entry))
        if batches[-1] and (len(batches[-1]) == MAX_ENTRIES or size_bytes + entry_bytes > BATCH_BYTES):
            batches.append([])
            size_bytes = 0
        batches[-1].append(entry)
        size_bytes += entry_bytes + 1
    return batches


def _item(entry: Entry) -> TResponseInputItem:
    item: Any = entry.payload
    return cast(TResponseInputItem, item)
