"""Pages: templates, what they are sent with, and errors as pages.

Templates escape all that they are given; nothing that a user wrote is ever marked as safe. A page runs no script and
takes no style but this package's own, and no other site may frame it.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse, Response

import agentstate
from agentstate.api.console.access import NotSignedIn, Viewer, give_cookie
from agentstate.api.console.assets import ASSETS, BUILD, HTMX, ROOM
from agentstate.api.problems import answer_to
from agentstate.errors import AgentStateError
from agentstate.sql.database import instant

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # With less, browsers would not say which page a form was sent from.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_THEMES = ("light", "dark")
# Line breaks and tabs are shown as such; what else moves the cursor or turns the text round is shown by its name.
_KEPT = "\n\t"
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn")


def shown(text: Any) -> str:
    """A text of a user's, with its control and direction characters visible, as ``\\x1b``."""
    return "".join(one if one in _KEPT or unicodedata.category(one) not in _HIDDEN else _code(one) for one in str(text))


def _code(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def size(n_bytes: float | None) -> str:
    """``1.5 GB``, with decimal units."""
    if n_bytes is None:
        return "–"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor:
            return f"{n_bytes / factor:,.1f} {unit}"
    return f"{n_bytes:,.0f} B"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.3g}"


def lasting(seconds: float | None) -> str:
    """``41 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for (big, of_big), (small, of_small) in (
        (("d", 86400), ("h", 3600)),
        (("h", 3600), ("min", 60)),
        (("min", 60), ("s", 1)),
    ):
        if whole >= of_big:
            return f"{whole // of_big} {big} {whole % of_big // of_small} {small}"
    return f"{whole} s"


def time_of(time_us: int | datetime | None) -> Markup:
    """A moment as a ``time`` element, in UTC; a script of the page puts it in the viewer's zone. What is copied is ISO
    8601 either way."""
    if time_us is None:
        return Markup("–")
    moment = time_us if isinstance(time_us, datetime) else instant(time_us)
    iso = moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return Markup('<time datetime="{0}" title="{0}">{1}</time>').format(iso, iso[:19] + "Z")


def json_of(value: Any) -> str:
    """JSON for people. Integers are whole, whatever a browser makes of them."""
    return shown(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def segment(text: str) -> str:
    """A part of a path."""
    return quote(text, safe="")


def query(**values: Any) -> str:
    """A query string of what is not empty."""
    given = {name: value for name, value in values.items() if value not in (None, "")}
    return f"?{urlencode(given)}" if given else ""


def counted(count: int, cap: int) -> str:
    """A count that ended beyond its cap: ``10,000+``."""
    return f"{cap:,}+" if count > cap else f"{count:,}"


_environment = Environment(
    loader=FileSystemLoader(ROOM / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)
_environment.filters |= {
    "shown": shown,
    "size": size,
    "number": number,
    "lasting": lasting,
    "time": time_of,
    "json": json_of,
    "segment": segment,
}
_environment.globals |= {
    "assets": ASSETS,
    "htmx": ASSETS[HTMX],
    "build": BUILD,
    "version": agentstate.__version__,
    "query": query,
    "counted": counted,
}


def page(request: Request, viewer: Viewer | None, template: str, *, status: int = 200, **context: Any) -> Response:
    """A page of the console, with the cookie if the viewer has none yet. Call it on a thread: it takes milliseconds."""
    theme = request.cookies.get("agentstate_theme")
    html = _environment.get_template(template).render(
        viewer=viewer,
        path=request.url.path,
        own_url=own_url(request),
        theme=theme if theme in _THEMES else None,
        now=datetime.now(UTC),
        **context,
    )
    response = HTMLResponse(html, status_code=status, headers=HEADERS)
    if viewer is not None and viewer.fresh:
        give_cookie(request, response, viewer.secret)
    return response


def own_url(request: Request) -> str:
    """The path and query of a request, as they were sent."""
    path = str(request.scope["raw_path"].decode("latin-1"))
    return path + (f"?{request.url.query}" if request.url.query else "")


def see(location: str) -> Response:
    """Go on to another page, once something is done."""
    return RedirectResponse(location, status_code=HTTPStatus.SEE_OTHER, headers=HEADERS)


class ConsoleRoute(APIRoute):
    """A route whose errors are pages, and that sends who is not signed in to do so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except NotSignedIn:
                return _to_sign_in(request)
            except AgentStateError as error:
                told = answer_to(error)
                headers = {name: told.headers[name] for name in ("retry-after",) if name in told.headers}
                return _error(
                    request, told.status_code, (type(error).__doc__ or "").partition("\n")[0], str(error), headers
                )
            except RequestValidationError as error:
                wrong = "; ".join(f"{item['loc'][-1]}: {item['msg']}" for item in error.errors())
                return _error(request, HTTPStatus.UNPROCESSABLE_ENTITY, "The address or the form is wrong.", wrong)
            except HTTPException as error:
                return _error(request, error.status_code, HTTPStatus(error.status_code).phrase, str(error.detail))

        return handled


def _error(request: Request, status: int, title: str, detail: str, headers: dict[str, str] | None = None) -> Response:
    response = page(request, None, "error.html", status=status, title=title, detail=detail)
    response.headers.update(headers or {})
    return response


def _to_sign_in(request: Request) -> Response:
    part = "hx-request" in request.headers or "text/event-stream" in request.headers.get("accept", "")
    if request.method != "GET" or part:
        # A part of a page must not become the page to sign in with, nor a stream.
        return _error(request, HTTPStatus.UNAUTHORIZED, "You are signed out.", "Sign in again to go on.")
    asked = own_url(request)
    return see(f"/sign-in{query(next=None if asked == '/' else asked)}")
