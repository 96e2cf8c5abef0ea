"""What is seen of every request: its id, one line of log, its time in the metrics, and a trace if traces are on.

The client sees its id, and in ``Server-Timing`` the milliseconds until the answer was complete.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agentstate import ids
from agentstate.errors import SettingsError
from agentstate.sessions.tenants import PREFIX
from agentstate.settings import Settings
from agentstate.sql.address import HIDDEN, mask, parse

logger = logging.getLogger("agentstate.requests")

REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
# An id as it was sent, with special characters encoded, so that a log line stays one line.
SESSION_PATH = re.compile(rb"/v1/sessions/([A-Za-z0-9_.:@%!$&'()*+,;=-]{1,3072})(?:/|$)")
# Machines poll these all the time.
QUIET = ("/healthz", "/readyz", "/metrics")
TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s%(context)s"
_CREDENTIAL = re.compile(rf"(?i)(\bbearer\s+|\b{PREFIX})[^\s\"',;]+")

_context: ContextVar[dict[str, str] | None] = ContextVar("agentstate_request", default=None)


class RequestContext(logging.Filter):
    """Adds the request and the session to every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        context = _context.get() or {}
        shown = " ".join(f"{name}={value}" for name, value in context.items())
        vars(record).update(request=dict(context), context=f" [{shown}]" if shown else "")
        return True


class TextFormatter(logging.Formatter):
    """Lines of text, with ``secrets`` masked, and anything that looks like a password or an API key."""

    def __init__(self, secrets: Collection[str] = ()):
        super().__init__(TEXT_FORMAT)
        self._secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        return self._masked(super().format(record))

    def _masked(self, text: str) -> str:
        text = mask(text, self._secrets)
        # Most lines have nothing like it, and to see that takes less than the expression.
        folded = text.casefold()
        if "bearer" in folded or PREFIX in folded:
            text = _CREDENTIAL.sub(rf"\g<1>{HIDDEN}", text)
        return text


class JsonFormatter(TextFormatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self._masked(record.getMessage()),
            **getattr(record, "request", {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self._masked(self.formatException(record.exc_info))
        return json.dumps(line, default=str)


def configure_logging(settings: Settings) -> None:
    """Configure the process's logging in the settings' format, with secrets masked. Raises SettingsError."""
    secrets = parse(settings.sqlalchemy_url).secrets
    handler = logging.StreamHandler()
    handler.addFilter(RequestContext())
    handler.setFormatter(JsonFormatter(secrets) if settings.log_format == "json" else TextFormatter(secrets))
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)


def tracing(settings: Settings) -> Any | None:
    """An OpenTelemetry tracer provider that sends to ``otlp_endpoint``; None if that is not set.

    The caller shuts it down at the end, so that it sends what is left. Raises SettingsError if the endpoint is set and
    OpenTelemetry is not installed.
    """
    if not settings.otlp_endpoint:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingsError(
            "AGENTSTATE_OTLP_ENDPOINT is set and OpenTelemetry is not installed: pip install 'agentstate[otel]'"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "agentstate"}))
    exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint.rstrip("/") + "/v1/traces")
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


class Observation:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, provider: Any | None):
        self._app = app
        self._tracer = None if provider is None else provider.get_tracer("agentstate")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else ids.new("req")
        context = {"request_id": request_id}
        if session := SESSION_PATH.match(scope.get("raw_path") or b""):
            context["session_id"] = session[1].decode()
        token = _context.set(context)
        status = 500
        started_s = time.perf_counter()

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [
                    (b"x-request-id", request_id.encode()),
                    (b"server-timing", f"total;dur={(time.perf_counter() - started_s) * 1000:.3f}".encode()),
                ]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        try:
            with self._span(scope, context) as span:
                try:
                    await self._app(scope, receive, observed)
                finally:
                    if span is not None:
                        span.update_name(f"{scope['method']} {_route(scope)}")
                        span.set_attribute("http.response.status_code", status)
        finally:
            seconds = time.perf_counter() - started_s
            route = _route(scope)
            scope["app"].state.service.metrics.took(_method(scope), route, status, seconds)
            level = logging.DEBUG if scope["path"] in QUIET else logging.INFO
            if logger.isEnabledFor(level):
                told = {"method": scope["method"], "route": route, "status": status, "ms": round(seconds * 1000, 2)}
                logger.log(level, "%(method)s %(route)s %(status)d in %(ms).1f ms", told, extra={"fields": told})
            _context.reset(token)

    def _span(self, scope: Scope, context: dict[str, str]) -> AbstractContextManager[Any]:
        if self._tracer is None:
            return nullcontext()
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        span: AbstractContextManager[Any] = self._tracer.start_as_current_span(
            scope["method"],
            context=extract(headers),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "url.path": scope["path"],
                **{f"agentstate.{name}": value for name, value in context.items()},
            },
        )
        return span


def _route(scope: Scope) -> str:
    """The route's template instead of the path: there are as many paths as sessions."""
    return getattr(scope.get("route"), "path_format", "none")


def _method(scope: Scope) -> str:
    # A client may send any method; a label must have few values.
    return (
        scope["method"] if scope["method"] in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS") else "other"
    )
