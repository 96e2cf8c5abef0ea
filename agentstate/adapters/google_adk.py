"""Google ADK's sessions, kept in AgentState sessions.

::

    async with AsyncClient("http://127.0.0.1:8700") as client:
        sessions = AgentStateSessionService(client, model="smollm2")
        runner = Runner(app_name="shop", agent=agent, session_service=sessions)

A session of ADK is a session here, and its events are entries. State is a log: the state of a session is what its
events changed; that of an app and of a user is in a session of its own, a note for each change. Metadata has a
checkpoint of that log, so that a read does not begin at the start. The log is the truth: a checkpoint that was not
written, because the writer vanished or because metadata is limited, is made up for by reading the log.
"""

from __future__ import annotations

import copy
import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, TypeGuard
from urllib.parse import quote

from google.adk.agents.callback_context import CallbackContext
from google.adk.errors import StaleSessionError
from google.adk.errors.already_exists_error import AlreadyExistsError
from google.adk.errors.session_not_found_error import SessionNotFoundError
from google.adk.events.event import Event
from google.adk.models.llm_request import LlmRequest
from google.adk.sessions import Session, State
from google.adk.sessions.base_session_service import BaseSessionService, GetSessionConfig, ListSessionsResponse
from google.genai.types import HttpOptions
from pydantic_core import to_jsonable_python

from agentstate import answers, documents, ids
from agentstate.client import AsyncClient, AsyncTurn, message, note, tool_call, tool_output
from agentstate.client.turn import TurnOptions
from agentstate.errors import (
    AgentStateError,
    InvalidEntry,
    InvalidId,
    SessionBusy,
    SessionExists,
    SessionExpired,
    SessionNotFound,
)
from agentstate.sessions import toolcalls
from agentstate.sql.models import EntryKind

PAGE = 1000
FEW = 20  # entries that are read beyond those that are wanted, since others may lie between them
# What an entry of this adapter has its event or its change of state under, and metadata its checkpoint.
KEY = "google_adk"
_HEADER = "X-AgentState-Session"
_NONE = GetSessionConfig(num_recent_events=0)
_NEWEST = GetSessionConfig(num_recent_events=1)


@dataclass
class _Stored:
    """What is stored in a session: its state, its newest event's entry ("" if it has none) and time, and the events
    that were asked for, the oldest first."""

    state: dict[str, Any]
    last: str
    updated_s: float
    events: list[Event] = field(default_factory=list)


class AgentStateSessionService(BaseSessionService):
    """ADK's session service.

    New sessions get ``model``, the name under which an engine serves it. A change waits up to ``busy_timeout_s`` (30
    at most) while another process runs the session, and then raises SessionBusy. An event is stored, with its changes
    of state, once `append_event` returns; if it raises, app and user state may have been changed and the event not be
    stored, and it may be appended again. State is stored as JSON; what has no such form, as its text.

    Every method may raise the errors of a client's methods. A client serves one event loop, so run agents by
    `Runner.run_async`.
    """

    def __init__(self, client: AsyncClient, *, model: str, busy_timeout_s: float = 10.0):
        self._client = client
        self._model = model
        self._busy_timeout_s = busy_timeout_s

    def session_id(self, app_name: str, user_id: str, session_id: str) -> str:
        """The id, in AgentState, of a session of ADK, whose ids are unique for each user only."""
        return _scope(app_name, user_id) + session_id.strip()

    async def name_session(self, callback_context: CallbackContext, llm_request: LlmRequest) -> None:
        """A ``before_model_callback`` for agents whose model is behind AgentState's gateway: it tells the gateway which
        session the call belongs to."""
        session = callback_context.session
        options = llm_request.config.http_options or HttpOptions()
        name = quote(self.session_id(session.app_name, session.user_id, session.id), safe="")
        options.headers = {**(options.headers or {}), _HEADER: name}
        llm_request.config.http_options = options

    async def create_session(
        self,
        *,
        app_name: str,
        user_id: str,
        state: dict[str, Any] | None = None,
        session_id: str | None = None,
    ) -> Session:
        """Raises AlreadyExistsError."""
        session_id = (session_id or "").strip() or str(uuid.uuid4())
        app_state, user_state, own_state = _by_scope(_as_json(state or {}))
        name = self.session_id(app_name, user_id, session_id)
        labels = {"app": app_name, "user": user_id, "session": session_id}
        try:
            try:
                await self._create(name, {**labels, "initial": own_state, "state": own_state})
                own_state = {}
            except InvalidEntry:  # too large for metadata
                await self._create(name, labels)
        except SessionExists:
            raise AlreadyExistsError(f"session {session_id} of user {user_id} exists already") from None
        try:
            if own_state:
                await self._change(name, labels, own_state)
            await self._change_scopes(app_name, user_id, app_state, user_state)
        except AgentStateError:
            with suppress(AgentStateError):
                await self.delete_session(app_name=app_name, user_id=user_id, session_id=session_id)
            raise
        created = await self.get_session(app_name=app_name, user_id=user_id, session_id=session_id, config=_NONE)
        if created is None:
            raise SessionNotFoundError(f"session {session_id} was deleted as soon as it was created")
        return created

    async def get_session(
        self, *, app_name: str, user_id: str, session_id: str, config: GetSessionConfig | None = None
    ) -> Session | None:
        """Events are in the order in which they were appended. Those after a timestamp are the newest ones up to one
        that is older."""
        try:
            found = await self._client.read(self.session_id(app_name, user_id, session_id))
            stored = await self._load(found, config)
        except (SessionNotFound, SessionExpired):
            return None
        app_state = await self._state_of(_scope(app_name))
        user_state = await self._state_of(_scope(app_name, user_id))
        return _session(app_name, user_id, session_id.strip(), stored, app_state, user_state)

    async def list_sessions(self, *, app_name: str, user_id: str | None = None) -> ListSessionsResponse:
        """The sessions without their events, the one that was updated last at the end."""
        app_state = await self._state_of(_scope(app_name))
        user_states: dict[str, dict[str, Any]] = {}
        sessions = []
        async for found in self._below(_scope(app_name) if user_id is None else _scope(app_name, user_id)):
            labels = found.metadata.get(KEY, {})
            if "session" not in labels:
                continue  # a user's state
            owner = labels["user"]
            try:
                stored = await self._load(found, _NONE)
            except (SessionNotFound, SessionExpired):
                continue
            if owner not in user_states:
                user_states[owner] = await self._state_of(_scope(app_name, owner))
            own_id = found.id.removeprefix(_scope(app_name, owner))
            sessions.append(_session(app_name, owner, own_id, stored, app_state, user_states[owner]))
        sessions.sort(key=lambda session: (session.last_update_time, session.user_id, session.id))
        return ListSessionsResponse(sessions=sessions)

    async def delete_session(self, *, app_name: str, user_id: str, session_id: str) -> None:
        """Delete a session, its events and its KV, if there is one. Raises SessionBusy."""
        name = self.session_id(app_name, user_id, session_id)
        with suppress(SessionNotFound, SessionExpired):
            try:
                await self._client.delete(name, revision="*")
            except SessionBusy:
                async with self._turn(name):
                    pass  # waited for it
                await self._client.delete(name, revision="*")

    async def get_user_state(self, *, app_name: str, user_id: str) -> dict[str, Any]:
        return await self._state_of(_scope(app_name, user_id))

    async def append_event(self, session: Session, event: Event) -> Event:
        """Raises StaleSessionError if others have appended events since ``session`` was read, SessionNotFoundError.

        Appending an event again, after an error or not, changes nothing.
        """
        if event.partial or any(event.id == known.id and event == known for known in session.events):
            return event
        self._apply_temp_state(session, event)
        event = self._trim_temp_delta_state(event)
        content = _content(event)
        app_state, user_state, own_state = _by_scope(content["actions"]["stateDelta"])
        try:
            async with self._turn(self.session_id(session.app_name, session.user_id, session.id)) as turn:
                stored = await self._load(turn.session, _NONE)
                last = None
                if session._storage_update_marker != stored.last:
                    last = await self._stored_already(turn, session, event)
                if last is None:
                    await self._change_scopes(session.app_name, session.user_id, app_state, user_state)
                    appended = await self._append(turn, session, event, content)
                    last = appended.data[0].id
                    await self._checkpoint(turn, appended, {**stored.state, **own_state}, event.timestamp)
                session._storage_update_marker = last
                session.last_update_time = event.timestamp
                return self._commit_event_to_session(session, event)
        except (SessionNotFound, SessionExpired):
            raise SessionNotFoundError(f"there is no session {session.id} of user {session.user_id}") from None

    # --- events

    async def _append(
        self, turn: AsyncTurn, session: Session, event: Event, content: dict[str, Any]
    ) -> answers.AppendedEntries:
        """Append an event, then the claims of the tool calls that it makes, and the ends of those that it answers.

        The event has the arguments and results, so these entries do not, but for the beginning of a command.
        """
        pending = set(turn.pending_tool_calls)
        # The gateway may have seen the call before, in the model's answer.
        calls = {
            call.id: call
            for call in event.get_function_calls()
            if call.id is not None and _is_id(call.id) and call.id not in pending
        }
        results = {response.id for response in event.get_function_responses() if response.id in pending}
        if event.author != "user":
            # The first answer of a tool that runs for long says that it has begun.
            results -= {id for earlier in session.events for id in earlier.long_running_tool_ids or ()}
        claims = [tool_call(id, call.name or "", toolcalls.beginning(call.args)) for id, call in calls.items()]
        ends = [tool_output(id, None) for id in sorted(results)]
        own = message({KEY: content})
        try:
            appended = await turn.append(own, *claims, *ends)
        except InvalidEntry:
            if not claims:
                raise
            # Some models number their calls anew in every answer: the first one of an id is the session's.
            claims = []
            appended = await turn.append(own, *ends)
        turn.reason = "tool_wait" if len(pending) + len(claims) > len(ends) else "user_wait"
        return appended

    async def _stored_already(self, turn: AsyncTurn, session: Session, event: Event) -> str | None:
        """The entry of ``event`` if an append stored it whose answer was lost. None if it is not stored and ``session``
        is up to date; otherwise raises StaleSessionError."""
        stored = await self._load(turn.session, _NEWEST)
        newest = stored.events[0] if stored.events else None
        if newest is not None and _content(newest) == _content(event):
            return stored.last
        known = session.events[-1].id if session.events else None
        # One that was not read here has no marker; its events tell as well.
        if session._storage_update_marker is None and (newest and newest.id) == known:
            return None
        raise StaleSessionError(
            f"session {session.id} was modified in storage since it was read: get it again, and append the event then"
        )

    # --- state

    async def _load(self, session: answers.Session, config: GetSessionConfig | None = None) -> _Stored:
        """What is stored in a session, with the newest events that ``config`` asks for, all by default."""
        checkpoint = session.metadata.get(KEY, {})
        at = checkpoint.get("at")
        wanted = None if config is None else config.num_recent_events
        after_s = None if config is None else config.after_timestamp
        filling = wanted != 0
        # Entries that are read now may be newer than the checkpoint; then they tell whether it is reached.
        settled = session.head_id == at and not filling
        events: list[Event] = []
        changes: list[dict[str, Any]] = []
        newest: answers.Entry | None = None
        if filling or not settled:
            async for entry in self._newest_first(session.id, PAGE if wanted is None else min(wanted + FEW, PAGE)):
                settled = settled or entry.id == at
                if KEY in entry.payload:
                    newest = newest or entry
                    if not settled:
                        changes.append(_change_of(entry))
                    if filling and entry.kind is EntryKind.MESSAGE:
                        event = Event.model_validate(entry.payload[KEY])
                        if after_s is None or event.timestamp >= after_s:
                            events.append(event)
                        filling = len(events) != wanted and (after_s is None or event.timestamp >= after_s)
                if settled and not filling:
                    break
        # A checkpoint that the history does not lead to was taken back, by a rewind.
        state = dict(checkpoint.get("state" if settled else "initial", {}))
        for change in reversed(changes):
            state |= change
        last, updated_s = checkpoint.get("last", "") if settled else "", session.created_at.timestamp()
        if newest is not None:
            last = newest.id
            updated_s = newest.payload[KEY].get("timestamp", updated_s)
        elif settled:
            updated_s = checkpoint.get("updated", updated_s)
        return _Stored(state, last, updated_s, events[::-1])

    async def _state_of(self, name: str) -> dict[str, Any]:
        """The state of an app or a user."""
        try:
            return (await self._load(await self._client.read(name), _NONE)).state
        except (SessionNotFound, SessionExpired):
            return {}

    async def _change_scopes(
        self, app_name: str, user_id: str, app_state: dict[str, Any], user_state: dict[str, Any]
    ) -> None:
        if app_state:
            await self._change(_scope(app_name), {"app": app_name}, app_state)
        if user_state:
            await self._change(_scope(app_name, user_id), {"app": app_name, "user": user_id}, user_state)

    async def _change(self, name: str, labels: dict[str, str], change: dict[str, Any]) -> None:
        """Change a state by a note, in a session that is made if there is none."""
        async with AsyncExitStack() as stack:
            try:
                turn = await stack.enter_async_context(self._turn(name))
            except SessionNotFound:
                with suppress(SessionExists):
                    await self._create(name, labels)
                turn = await stack.enter_async_context(self._turn(name))
            if turn.session.expires_at is not None and "session" not in labels:
                await self._client.update(name, revision="*", expires_in_s="never")
            stored = await self._load(turn.session, _NONE)
            appended = await turn.append(note({KEY: {"change": change}}))
            await self._checkpoint(turn, appended, {**stored.state, **change}, stored.updated_s)

    async def _checkpoint(
        self, turn: AsyncTurn, appended: answers.AppendedEntries, state: dict[str, Any], updated_s: float
    ) -> None:
        """Note in the metadata what is stored as of the entries just appended.

        Any revision will do: a checkpoint says which entry it is of, so that one of a writer who was late is only old.
        """
        own, head = appended.data[0].id, appended.data[-1].id
        checkpoint = {"state": state, "at": head, "last": own, "updated": updated_s}
        with suppress(AgentStateError):  # too large, for instance; all of it is in the entries
            metadata = {KEY: {**turn.session.metadata.get(KEY, {}), **checkpoint}}
            await self._client.update(turn.session_id, revision="*", metadata=metadata)

    # --- sessions

    async def _create(self, name: str, metadata: dict[str, Any]) -> answers.Session:
        return await self._client.create_session(self._model, id=name, metadata={KEY: metadata})

    def _turn(self, name: str) -> AsyncTurn:
        options: TurnOptions = {"tail": 0, "durable_timeout_ms": 0, "busy_timeout_s": self._busy_timeout_s}
        return self._client.turn(name, **options)

    async def _newest_first(self, name: str, limit: int) -> AsyncIterator[answers.Entry]:
        after, more = None, True
        while more:
            page = await self._client.entries(name, after=after, limit=limit, order="desc")
            for entry in page.data:
                yield entry
            after, more = page.last_id, page.has_more

    async def _below(self, scope: str) -> AsyncIterator[answers.Session]:
        """The sessions whose id begins with ``scope`` and goes on."""
        after, more = scope, True
        while more:
            page = await self._client.list_sessions(after=after, limit=PAGE)
            for session in page.data:
                if not session.id.startswith(scope):
                    return
                yield session
            after, more = page.last_id or scope, page.has_more


def _scope(*names: str) -> str:
    """What the ids of an app's, or of a user's, sessions begin with; by itself the id of the session with its state.

    Digests, because they sort alike in every language that a database may sort by, and nobody can choose a name that
    passes for another.
    """
    return "adk_" + "".join(hashlib.sha256(name.encode()).hexdigest()[:32] + "_" for name in names)


def _by_scope(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The parts of a state that belong to the app, to the user and to the session, without prefixes."""
    app: dict[str, Any] = {}
    user: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for key, value in state.items():
        if key.startswith(State.APP_PREFIX):
            app[key.removeprefix(State.APP_PREFIX)] = value
        elif key.startswith(State.USER_PREFIX):
            user[key.removeprefix(State.USER_PREFIX)] = value
        elif not key.startswith(State.TEMP_PREFIX):
            own[key] = value
    return app, user, own


def _change_of(entry: answers.Entry) -> dict[str, Any]:
    """How an entry changes the state of the session that it is in."""
    content = entry.payload[KEY]
    change: dict[str, Any] = content["change"] if entry.kind is EntryKind.NOTE else content["actions"]["stateDelta"]
    return change if entry.kind is EntryKind.NOTE else _by_scope(change)[2]


def _is_id(call_id: str | None) -> TypeGuard[str]:
    try:
        return ids.check(call_id or "") == call_id
    except InvalidId:
        return False


def _content(event: Event) -> dict[str, Any]:
    content: dict[str, Any] = event.model_dump(mode="json", by_alias=True, exclude_none=True)
    return content


def _as_json(state: dict[str, Any]) -> dict[str, Any]:
    converted: dict[str, Any] = documents.finite(to_jsonable_python(state, bytes_mode="base64", serialize_unknown=True))
    return converted


def _session(
    app_name: str,
    user_id: str,
    session_id: str,
    stored: _Stored,
    app_state: dict[str, Any],
    user_state: dict[str, Any],
) -> Session:
    scoped = {State.APP_PREFIX + key: value for key, value in app_state.items()}
    scoped |= {State.USER_PREFIX + key: value for key, value in user_state.items()}
    session = Session(
        app_name=app_name,
        user_id=user_id,
        id=session_id,
        state={**stored.state, **copy.deepcopy(scoped)},
        events=stored.events,
        last_update_time=stored.updated_s,
    )
    session._storage_update_marker = stored.last
    return session
