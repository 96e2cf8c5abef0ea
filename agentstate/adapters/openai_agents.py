"""The OpenAI Agents SDK's ``Session``, kept in an AgentState session.

::

    async with AsyncClient("http://127.0.0.1:8700") as client:
        async with AgentStateSession("agent-17", client, model="smollm2") as session:   # one turn: resumed, suspended
            await Runner.run(agent, "Hello", session=session, run_config=session.run_config(), hooks=session.hooks())
        print(session.turn.suspended.kv)

In the block the agent holds its session's lease, and the engine knows which session its calls belong to. Outside the
block the object is a ``Session`` like the SDK's others: every change is its own turn, so several writers alternate.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Self, cast

from agents import (
    ModelSettings,
    OpenAIProvider,
    RunConfig,
    RunHooks,
    SessionSettings,
    Tool,
    TResponseInputItem,
)

from agentstate import documents
from agentstate.answers import Entry
from agentstate.client import AsyncClient, AsyncTurn, message, note, tool_call, tool_error, tool_output
from agentstate.client.turn import TurnOptions
from agentstate.errors import AgentStateError, RevisionStale, SessionNotFound
from agentstate.sessions import toolcalls
from agentstate.sql.models import EntryKind

logger = logging.getLogger(__name__)

PAGE = 1000
# Limits of one append: the service takes bodies of 8 MiB, part of which is not entries.
MAX_ENTRIES = 1000
BATCH_BYTES = 7 * 1024 * 1024
# This note clears all items before it.
CLEARED = {"openai_agents": "cleared"}


class AgentStateSession:
    """An agent's conversation, with the SDK's ``Session`` protocol.

    Items are stored unchanged, as messages of the session. The first write creates the session with ``model``, the name
    under which an engine serves it. ``session_settings.limit`` limits reads for which the SDK sets no limit. A change
    outside a block waits up to ``busy_timeout_s`` (30 at most) while another process runs the session, and then raises
    SessionBusy. Every method may raise the errors of a client's methods.
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
        #: The turn of the block, even after it has ended; None before.
        self.turn: AsyncTurn | None = None
        self._client = client
        self._model = model
        self._busy_timeout_s = busy_timeout_s
        self._running: AsyncTurn | None = None
        self._claimed: set[str] = set()  # of its hooks, without an end
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
        left, self._claimed = self._claimed, set()
        if left and (error is None or isinstance(error, Exception)):
            # A tool that raised has no end.
            with suppress(AgentStateError):
                await turn.append(*(tool_error(call_id, "it did not end") for call_id in sorted(left)))
        await turn.__aexit__(kind, error, trace)

    def run_config(self) -> RunConfig:
        """In a block: the configuration with which `Runner.run` reaches the engine, and the engine knows the session.
        Every agent of the run uses the session's model; tracing is off.

        Raises EngineUnreachable if no live engine serves the model, RuntimeError outside a block.
        """
        if self._running is None:
            raise RuntimeError(f"session {self.session_id} is not being run: use it in an async with statement")
        return RunConfig(
            model=self._running.session.model,
            model_provider=OpenAIProvider(base_url=self._running.base_url, api_key="none", use_responses=False),
            model_settings=ModelSettings(extra_body=dict(self._running.extra_body)),
            tracing_disabled=True,
        )

    def hooks(self, expected_s: Mapping[str, float] | None = None) -> RunHooks[Any]:
        """Hooks for `Runner.run` that tell the service when a tool begins and ends, so that the session's KV is there
        for the model's next call. ``expected_s`` is how long tools are expected to take, by their names.

        They claim the tool's call in the session and finish it, without arguments and output, which the items have, but
        for the beginning of a command. A call that cannot be claimed is run all the same. They do nothing outside a
        block.
        """
        return _ToolHooks(self, expected_s or {})

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """The conversation, the oldest item first; with a limit its newest items."""
        if limit is None and self.session_settings is not None:
            limit = self.session_settings.limit
        found = [_item(entry) async for entry in self._newest_first(PAGE if limit is None else limit, at_most=limit)]
        return found[::-1]

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        """Append items, all or none.

        Items that exceed one request are sent in several. If the service refuses one of them, the earlier ones are
        rewound; if the process ends in between, they stay.
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
        """Remove and return the newest item, and remove any notes after it; None if there is no item."""
        if await self._is_empty():
            return None
        async with self._changing, self._writing() as turn:
            while True:
                # Read before the entry: the rewind fails if another entry became the newest since.
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
        """Start a new conversation. The old one stays in the session's history until the session is deleted."""
        if await self._is_empty():
            return
        async with self._changing, self._writing() as turn:
            await turn.append(note(CLEARED))

    async def _is_empty(self) -> bool:
        return not await self.get_items(limit=1)

    async def _newest_first(self, wanted: int, *, at_most: int | None = None) -> AsyncIterator[Entry]:
        """The messages since the conversation was last cleared. Reads about ``wanted`` at once."""
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
        """The block's turn, or a turn of its own, for which it waits while another process runs the session."""
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


class _ToolHooks(RunHooks[Any]):
    """Claims and finishes calls of tools in the session's turn. What goes wrong with that is no concern of the run."""

    def __init__(self, session: AgentStateSession, expected_s: Mapping[str, float]):
        self._session = session
        self._expected_s = expected_s

    async def on_tool_start(self, context: Any, agent: Any, tool: Tool) -> None:
        call_id = getattr(context, "tool_call_id", None)
        if isinstance(call_id, str):
            arguments = toolcalls.beginning(getattr(context, "tool_arguments", None))
            claim = tool_call(call_id, tool.name, arguments, expected_s=self._expected_s.get(tool.name))
            if await self._appended(claim):
                self._session._claimed.add(call_id)

    async def on_tool_end(self, context: Any, agent: Any, tool: Tool, result: Any) -> None:
        call_id = getattr(context, "tool_call_id", None)
        if call_id in self._session._claimed:
            self._session._claimed.remove(call_id)
            await self._appended(tool_output(call_id, None))

    async def _appended(self, entry: dict[str, Any]) -> bool:
        if (turn := self._session._running) is None:
            return False
        try:
            await turn.append(entry)
        except AgentStateError as error:
            logger.info("a tool of session %s is not told of: %s", self._session.session_id, error)
            return False
        return True


def _batches(entries: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Entries in groups that fit one request; an entry that is too large forms its own group."""
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
