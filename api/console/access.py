"""Who looks at the console: signing in with an API key, and what a browser has to show with each request.

Signing in makes a row in SQL and a cookie whose SHA-256 the row has, so that signing out, a revoked key, a changed role
and the end of ``SESSION_S`` hold on all services, at most ``gate.TRUST_S`` later. A service without API keys serves
this machine alone, like the API, and asks nobody to sign in.

Whatever changes something is a POST with a token that is derived from the cookie, from a page of the same origin.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

import sqlalchemy as sa
from fastapi import Depends, Request
from sqlalchemy.engine import Connection
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from agentstate.api import gate
from agentstate.api.guard import READING, require_local
from agentstate.api.service import service_of
from agentstate.errors import NotAllowed, Unauthenticated
from agentstate.sessions import tenants
from agentstate.sessions.tenants import Caller, Role, Tenant
from agentstate.sql.database import Database, now_us
from agentstate.sql.models import console_sessions

SESSION_S = 12 * 3600
_COOKIE = "agentstate_console"
_TOKEN = "csrf"
_MAX_REMEMBERED = 10_000
_MAX_FIELDS = 20


class NotSignedIn(Exception):
    """Sign in with an API key."""


@dataclass(frozen=True)
class Viewer:
    """Who looks. ``secret`` is the browser's cookie; ``fresh`` if it does not have it yet. Nobody has to sign in where
    the service has no key: then ``key_id`` is None."""

    tenant: Tenant
    role: Role
    key_id: str | None
    secret: str = field(repr=False)
    fresh: bool = False

    @property
    def token(self) -> str:
        """What forms carry."""
        return token_of(self.secret)

    @property
    def acts(self) -> bool:
        return self.role.writes

    @property
    def administers(self) -> bool:
        return self.role is Role.ADMIN


def token_of(secret: str) -> str:
    return hmac.digest(secret.encode("utf-8", "surrogateescape"), b"agentstate console form", "sha256").hex()


def new_secret() -> str:
    return secrets.token_urlsafe(32)


class SignedIn:
    """Who is signed in, as one service knows it. Used on one event loop."""

    def __init__(self, database: Database):
        self._database = database
        self._known: dict[bytes, tuple[float, Caller | None]] = {}

    async def caller(self, secret: str) -> Caller | None:
        """Who has this cookie; None if nobody, any more. Raises DatabaseError."""
        known_by = _hash(secret)
        until_s, caller = self._known.get(known_by, (0.0, None))
        if until_s < time.monotonic():
            caller = await run_in_threadpool(self._look_up, known_by)
            if len(self._known) >= _MAX_REMEMBERED:
                self._known.clear()
            self._known[known_by] = (time.monotonic() + gate.TRUST_S, caller)
        return caller

    async def sign_in(self, key: str) -> str | None:
        """A new cookie for whoever has this API key; None if it is not valid."""
        return await run_in_threadpool(self._sign_in, key)

    async def sign_out(self, secret: str) -> None:
        self._known.pop(_hash(secret), None)
        await run_in_threadpool(self._sign_out, _hash(secret))

    def _look_up(self, secret_hash: bytes) -> Caller | None:
        with self._database.read() as connection:
            key_id = connection.execute(
                sa.select(console_sessions.c.key_id).where(
                    console_sessions.c.secret_hash == secret_hash, console_sessions.c.expires_us > now_us()
                )
            ).scalar()
            return None if key_id is None else tenants.caller_of(connection, key_id)

    def _sign_in(self, key: str) -> str | None:
        with self._database.read() as connection:
            caller = tenants.authenticate(connection, key)
        if caller is None:
            return None
        secret = new_secret()
        with self._database.write() as connection:
            _forget_expired(connection)
            connection.execute(
                sa.insert(console_sessions).values(
                    secret_hash=_hash(secret),
                    key_id=caller.key_id,
                    created_us=now_us(),
                    expires_us=now_us() + SESSION_S * 1_000_000,
                )
            )
        return secret

    def _sign_out(self, secret_hash: bytes) -> None:
        with self._database.write() as connection:
            connection.execute(sa.delete(console_sessions).where(console_sessions.c.secret_hash == secret_hash))


def _forget_expired(connection: Connection) -> None:
    connection.execute(sa.delete(console_sessions).where(console_sessions.c.expires_us <= now_us()))


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def cookie_of(request: Request) -> str | None:
    return request.cookies.get(_cookie_name(request))


def give_cookie(request: Request, response: Response, secret: str) -> None:
    response.set_cookie(
        _cookie_name(request),
        secret,
        max_age=SESSION_S,
        path="/",
        secure=_is_secure(request),
        httponly=True,
        samesite="strict",
    )


def take_cookie(request: Request, response: Response) -> None:
    response.delete_cookie(
        _cookie_name(request), path="/", secure=_is_secure(request), httponly=True, samesite="strict"
    )


def _is_secure(request: Request) -> bool:
    return request.url.scheme == "https"


def _cookie_name(request: Request) -> str:
    # Browsers take a name that begins like this over TLS alone, and from this host alone.
    return f"__Host-{_COOKIE}" if _is_secure(request) else _COOKIE


async def viewer_of(request: Request) -> Viewer:
    """Who looks, and whether it is this page that asks. Raises NotSignedIn, NotAllowed, HostRefused, RateLimited,
    DatabaseError."""
    viewer = await _viewer_of(request)
    if request.method not in READING:
        await require_own_form(request, viewer.secret)
    service = await service_of(request)
    service.gate.take_hint(viewer.tenant)
    return viewer


async def _viewer_of(request: Request) -> Viewer:
    secret = cookie_of(request)
    if secret is not None and (caller := await request.app.state.console.signed_in.caller(secret)) is not None:
        return Viewer(caller.tenant, caller.role, caller.key_id, secret)
    try:
        caller, _ = await (await service_of(request)).gate.admit(None)
    except Unauthenticated as error:
        raise NotSignedIn from error
    headers = dict(request.scope["headers"])
    require_local(_text(headers.get(b"host")), _text(headers.get(b"origin")))
    return Viewer(caller.tenant, caller.role, None, secret or new_secret(), fresh=secret is None)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


async def require_own_form(request: Request, secret: str) -> None:
    """Raises NotAllowed unless a form of this console, in the browser that has the cookie, was sent."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site is not None:
        own = site == "same-origin"
    else:
        # Browsers leave the former out without TLS, unless the host is this machine.
        own = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    if not own:
        raise NotAllowed("the form is not of this console: another site sent it, or a proxy changed the Host header")
    token = (await form_of(request)).get(_TOKEN, "")
    if not hmac.compare_digest(token.encode("utf-8", "surrogateescape"), token_of(secret).encode()):
        raise NotAllowed("the form is out of date: open the page again")


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a form that was sent; of several with one name, the last. Raises NotAllowed for what is none."""
    try:
        sent = (await request.body()).decode()
        return dict(parse_qsl(sent, keep_blank_values=True, max_num_fields=_MAX_FIELDS, errors="strict"))
    except ValueError as error:
        raise NotAllowed("this is no form of the console") from error


async def _actor(request: Request) -> Viewer:
    viewer = await viewer_of(request)
    if not viewer.acts:
        raise NotAllowed("this API key is a viewer's: it changes nothing")
    return viewer


async def _administrator(request: Request) -> Viewer:
    viewer = await viewer_of(request)
    if not viewer.administers:
        raise NotAllowed("this page is for API keys with the role admin")
    return viewer


ViewerDep = Annotated[Viewer, Depends(viewer_of)]
ActorDep = Annotated[Viewer, Depends(_actor)]
AdministratorDep = Annotated[Viewer, Depends(_administrator)]
