"""Signing in and out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from agentstate.api.console.access import (
    NotSignedIn,
    cookie_of,
    form_of,
    give_cookie,
    new_secret,
    require_own_form,
    take_cookie,
    token_of,
    viewer_of,
)
from agentstate.api.console.render import ConsoleRoute, page, query, see
from agentstate.api.console.room import ConsoleDep
from agentstate.api.service import ServiceDep
from agentstate.errors import Unauthenticated

_MAX_KEY = 200

router = APIRouter(include_in_schema=False, route_class=ConsoleRoute)


@router.get("/sign-in")
async def ask(request: Request, next: Annotated[str | None, Query(max_length=2000)] = None) -> Response:
    try:
        await viewer_of(request)
    except NotSignedIn:
        return await _form(request, next)
    return see(_own(next))


async def _form(request: Request, next: str | None, wrong: bool = False) -> Response:
    # The cookie before signing in is what the form is bound to. It opens nothing.
    secret = cookie_of(request) or new_secret()
    response = await run_in_threadpool(
        page,
        request,
        None,
        "sign-in.html",
        status=401 if wrong else 200,
        token=token_of(secret),
        next=next,
        wrong=wrong,
    )
    give_cookie(request, response, secret)
    return response


@router.post("/sign-in")
async def sign_in(request: Request, console: ConsoleDep) -> Response:
    await require_own_form(request, cookie_of(request) or "")
    form = await form_of(request)
    key, following = form.get("key", "").strip(), form.get("next")
    secret = await console.signed_in.sign_in(key) if 0 < len(key) <= _MAX_KEY else None
    if secret is None:
        return await _form(request, following, wrong=True)
    response = see(_own(following))
    give_cookie(request, response, secret)
    return response


@router.post("/sign-out")
async def sign_out(request: Request, console: ConsoleDep, service: ServiceDep) -> Response:
    secret = cookie_of(request)
    if secret is None:
        raise Unauthenticated("nobody is signed in")
    await require_own_form(request, secret)
    await console.signed_in.sign_out(secret)
    response = see(f"/sign-in{query()}")
    take_cookie(request, response)
    return response


def _own(asked: str | None) -> str:
    """A path of this service: nobody is sent elsewhere."""
    own = asked is not None and asked.startswith("/") and not asked.startswith(("//", "/\\"))
    clean = own and asked is not None and asked.isascii() and asked.isprintable()
    return asked if clean and asked is not None else "/"
