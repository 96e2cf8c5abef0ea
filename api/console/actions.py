"""What a viewer may do to a session. Each action is a page that says what it is about to do, to what, and how the
command line does it, with one form. What an action did already, it does again without an error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from agentstate.api import demotion, prefetch
from agentstate.api.console import commands, reading
from agentstate.api.console.access import ActorDep, Viewer, form_of
from agentstate.api.console.render import ConsoleRoute, page, query, see, segment
from agentstate.api.console.room import Console, ConsoleDep
from agentstate.api.pins import end_pin, pin_for
from agentstate.api.schemas import PathId
from agentstate.api.service import Service, ServiceDep
from agentstate.errors import NotAllowed, SessionNotFound
from agentstate.fleet import operations
from agentstate.fleet.operations import Kind, Tier
from agentstate.fleet.pins import PinTier
from agentstate.sessions.verbs import Sessions

router = APIRouter(prefix="/sessions/{session_id}/do", include_in_schema=False, route_class=ConsoleRoute)

_Choice = TypeVar("_Choice", bound=StrEnum)

_HOUR_S = 3600
PIN_HOURS = (1, 2, 8, 24)


@dataclass(frozen=True)
class Asked:
    """An action that is asked for: of whom, on what, and with which fields of the form."""

    service: Service
    console: Console
    viewer: Viewer
    sessions: Sessions
    session_id: str
    form: dict[str, str]

    def back(self, **values: str) -> Response:
        self.console.forget_placement(self.viewer.tenant.id, self.session_id)
        return see(f"/sessions/{segment(self.session_id)}{query(**values)}")


async def _prefetch(asked: Asked) -> Response:
    tier = _one_of(asked.form.get("tier"), Tier, Tier.HOST)
    pages = await run_in_threadpool(asked.sessions.pages, asked.session_id)
    operation_id = await _announced(asked, Kind.PREFETCH)
    await prefetch.start(asked.service, pages, operation_id, tier, operations.FLUSH_LIMIT_S)
    return asked.back(done="prefetch", operation=operation_id)


async def _demote(asked: Asked) -> Response:
    pages = await run_in_threadpool(asked.sessions.whereabouts, asked.session_id)
    operation_id = await _announced(asked, Kind.DEMOTE)
    await demotion.start(asked.service, pages, operation_id)
    return asked.back(done="demote", operation=operation_id)


async def _announced(asked: Asked, kind: Kind) -> str:
    def announce() -> str:
        with asked.service.database.write() as connection:
            return asked.service.operations.announce(connection, asked.viewer.tenant.id, kind, asked.session_id)

    return await run_in_threadpool(announce)


async def _pin(asked: Asked) -> Response:
    tier = _one_of(asked.form.get("tier"), PinTier, PinTier.DEVICE)
    hours = asked.form.get("hours", "")
    if hours not in map(str, PIN_HOURS):
        raise NotAllowed(f"a pin holds for {', '.join(map(str, PIN_HOURS))} hours")
    await pin_for(asked.service, asked.sessions, asked.session_id, tier, int(hours) * _HOUR_S)
    return asked.back(done="pinned")


async def _unpin(asked: Asked) -> Response:
    await end_pin(asked.service, asked.sessions, asked.session_id)
    return asked.back(done="unpinned")


async def _fork(asked: Asked) -> Response:
    at = asked.form.get("at") or None
    made = await run_in_threadpool(lambda: asked.sessions.fork(asked.session_id, None, at=at))
    return see(f"/sessions/{segment(made.id)}?done=forked")


async def _rewind(asked: Asked) -> Response:
    at = asked.form.get("at") or None
    revision = _revision(asked)
    await run_in_threadpool(lambda: asked.sessions.rewind(asked.session_id, revision, at=at))
    return asked.back(done="rewound")


async def _delete(asked: Asked) -> Response:
    if asked.form.get("typed", "") != asked.session_id:
        raise NotAllowed("what was typed is not the id of the session: nothing was deleted")
    with suppress(SessionNotFound):  # somebody was faster, or it was sent twice
        await run_in_threadpool(asked.sessions.delete, asked.session_id, _revision(asked))
    asked.console.forget_placement(asked.viewer.tenant.id, asked.session_id)
    return see("/sessions?done=deleted")


def _revision(asked: Asked) -> int:
    """What the viewer has seen: what changed since is not rewound or deleted unseen."""
    text = asked.form.get("revision", "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else 0


def _one_of(text: str | None, kinds: type[_Choice], default: _Choice) -> _Choice:
    return kinds(text) if text in set(kinds) else default


@dataclass(frozen=True)
class Action:
    """``title`` and ``meaning`` are what its page says; ``word`` is on the button."""

    title: str
    meaning: str
    word: str
    act: Callable[[Asked], Awaitable[Response]]
    danger: bool = False


ACTIONS = {
    "prefetch": Action(
        "Bring the KV back",
        "The engine reads the session's pages before its next request needs them.",
        "Prefetch",
        _prefetch,
    ),
    "demote": Action(
        "Let the KV leave the device",
        "The session's pages are the first to leave the device. They stay on the drive, and are restored with the next "
        "request.",
        "Demote",
        _demote,
    ),
    "pin": Action(
        "Keep the KV where it is",
        "What is pinned leaves last, and leaves where a request that runs needs all of the room. A pin takes the place "
        "of the one before.",
        "Pin",
        _pin,
    ),
    "unpin": Action("End the pin", "The session's pages leave when others are worth more.", "Unpin", _unpin),
    "fork": Action(
        "Fork the session",
        "A new session is made that shares the history up to an entry. Nothing is copied, and this one stays as it is.",
        "Fork",
        _fork,
    ),
    "rewind": Action(
        "Rewind the session",
        "An earlier entry becomes the head. The entries after it are taken back from this session; its forks keep what "
        "they share.",
        "Rewind",
        _rewind,
        danger=True,
    ),
    "delete": Action(
        "Delete the session",
        "The transcript is deleted, and the KV erased from disk. Its forks keep what they share with it. This cannot "
        "be undone.",
        "Delete",
        _delete,
        danger=True,
    ),
}


@router.get("/{action}")
async def confirm(
    request: Request,
    session_id: PathId,
    action: str,
    viewer: ActorDep,
    service: ServiceDep,
    at: Annotated[str | None, Query(max_length=256)] = None,
) -> Response:
    """What the action would do, and the form that does it."""
    wanted = _action(action)

    def made() -> Response:
        with service.database.read() as connection:
            told = reading.told(connection, viewer.tenant.id, session_id, None)
        return page(
            request,
            viewer,
            "action.html",
            session_id=session_id,
            name=action,
            action=wanted,
            told=told,
            at=at,
            at_entry=next((one for one in told.previews if one.id == at), None),
            hours=PIN_HOURS,
            command=_command(action, session_id, at),
        )

    return await run_in_threadpool(made)


@router.post("/{action}")
async def act(
    request: Request, session_id: PathId, action: str, viewer: ActorDep, console: ConsoleDep, service: ServiceDep
) -> Response:
    form = await form_of(request)
    sessions = service.sessions.of(viewer.tenant.id)
    return await _action(action).act(Asked(service, console, viewer, sessions, session_id, form))


def _action(name: str) -> Action:
    if name not in ACTIONS:
        raise HTTPException(404, f"there is no action {name[:40]!r}")
    return ACTIONS[name]


def _command(name: str, session_id: str, at: str | None) -> str:
    return {
        "prefetch": lambda: commands.prefetch(session_id, "host"),
        "demote": lambda: commands.demote(session_id),
        "pin": lambda: commands.pin(session_id, "device", f"{PIN_HOURS[1]}h"),
        "unpin": lambda: commands.unpin(session_id),
        "fork": lambda: commands.fork(session_id, at),
        "rewind": lambda: commands.rewind(session_id, at),
        "delete": lambda: commands.delete(session_id),
    }[name]()
