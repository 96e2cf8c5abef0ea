"""The gateway's routes. What is none of them goes on to the session API."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from agentstate.api.gateway import conversations, dialects, resources, stored
from agentstate.api.gateway.errors import Refusal, refusal
from agentstate.api.gateway.exchange import Exchange, Gone
from agentstate.api.gateway.fleet import REMEMBERED_S, Fleet
from agentstate.api.gateway.relay import Passage, Relay
from agentstate.api.gateway.stored import StoredRelay
from agentstate.api.gateway.turns import Turns
from agentstate.api.gateway.upstream import Upstream
from agentstate.api.service import Service
from agentstate.errors import AgentStateError
from agentstate.sessions.tenants import Caller

logger = logging.getLogger(__name__)

PREFIXES = (
    "/v1/chat/",
    "/v1/completions",
    "/v1/responses",
    "/v1/conversations",
    "/v1/messages",
    "/v1/models",
    "/v1/embeddings",
    "/v1/rerank",
    "/tokenize",
)


@dataclass(frozen=True)
class Route:
    """What answers a path. ``dialect`` is None where requests only pass through."""

    path: str
    dialect: dialects.Dialect | None = None
    relay: type[Relay] = Relay


class Observed(NamedTuple):
    """What logs and metrics call a route."""

    path_format: str


ROUTES = {
    route.path: route
    for route in (
        Route("/v1/chat/completions", dialects.CHAT),
        Route("/v1/completions", dialects.COMPLETIONS),
        Route("/v1/responses", dialects.RESPONSES, StoredRelay),
        Route("/v1/messages", dialects.MESSAGES),
        Route("/v1/messages/count_tokens"),
        Route("/v1/embeddings"),
        Route("/v1/rerank"),
        Route("/tokenize"),
        Route("/v1/tokenize"),
    )
}
# What answers a path that begins like this, and does not reach an engine.
RESOURCES = {"/v1/responses/": stored.answer, "/v1/conversations/": conversations.answer}


def serves(path: str) -> bool:
    """Whether a path is the gateway's, whatever the method."""
    return path.startswith(PREFIXES)


class Gateway:
    """What the routes share, from the service's start to its end."""

    def __init__(self, service: Service):
        settings = service.settings
        self.service = service
        self.settings = settings
        self.fleet = Fleet(service.database, settings.engine_timeout_s)
        self.turns = Turns(service)
        self.upstream = Upstream(settings.engine_api_key.get_secret_value(), settings.gateway_silence_s)

    def abort(self, base_url: str, request_id: str) -> None:
        """End a request at an engine, in the background."""
        self.turns.keep(self.upstream.abort(base_url, request_id))

    async def admit(self, headers: Mapping[bytes, str]) -> tuple[Caller, bool]:
        """`Gate.admit` for a client of OpenAI's or Anthropic's API, whose key may be in ``x-api-key``."""
        authorization = headers.get(b"authorization")
        if authorization is None and (key := headers.get(b"x-api-key")):
            authorization = f"Bearer {key}"
        remembered_s = REMEMBERED_S if self.settings.gateway_fail_open else 0
        return await self.service.gate.admit(authorization, remembered_s=remembered_s)

    async def close(self) -> None:
        await self.turns.close()
        await self.fleet.close()
        await self.upstream.close()

    async def answer(self, exchange: Exchange) -> None:
        path, method = exchange.scope["path"].rstrip("/"), exchange.scope["method"]
        if path == "/v1/models" or path.startswith("/v1/models/"):
            exchange.scope["route"] = Observed("/v1/models/{model}" if path != "/v1/models" else path)
            resources.require(method, {"GET": None})
            await self._models(exchange, path.removeprefix("/v1/models").removeprefix("/"))
            return
        for prefix, resource in RESOURCES.items():
            if f"{path}/".startswith(prefix) and path not in ROUTES:
                await resource(self, exchange)
                return
        route = ROUTES.get(path)
        if route is None:
            raise Refusal(404, "not_found", f"there is no {path} here")
        exchange.scope["route"] = Observed(path)
        resources.require(method, {"POST": None})
        if route.dialect is None:
            await Passage(self, exchange, path).run()
            return
        limit = self.settings.gateway_streams
        if (running := self.service.limits.begin(exchange.tenant.id, limit)) is None:
            raise Refusal(
                429,
                "too_many_streams",
                f"tenant {exchange.tenant.id} has {limit} requests running here, as many as it may",
                retryable=True,
                headers=[(b"retry-after", b"1")],
            )
        with self._until_over(exchange, running):
            await route.relay(self, exchange, path, route.dialect).run()

    @contextmanager
    def _until_over(self, exchange: Exchange, running: int) -> Iterator[None]:
        """A request counts as running until its answer ends."""
        counted = {running}

        def over() -> None:
            while counted:
                self.service.limits.end(counted.pop())

        exchange.before_end = over
        try:
            yield
        finally:
            over()

    async def _models(self, exchange: Exchange, name: str) -> None:
        started_us: dict[str, int] = {}
        for server in await self.fleet.live():
            started_us.setdefault(server.model, server.ranks[0].started_us)
        models = [
            {"id": model, "object": "model", "created": started_us[model] // 1_000_000, "owned_by": "agentstate"}
            for model in sorted(started_us)
        ]
        if not name:
            await exchange.answer_document({"object": "list", "data": models})
            return
        found = [model for model in models if model["id"] == name]
        if not found:
            there = ", ".join(map(repr, sorted(started_us))) or "none"
            raise Refusal(404, "model_not_found", f"no live engine serves {name!r}, only {there}", "model")
        await exchange.answer_document(found[0])


def answer_to(error: Refusal | AgentStateError, path: str) -> JSONResponse:
    """The answer to a request that is refused before its body is read."""
    refused = error if isinstance(error, Refusal) else refusal(error)
    headers = {name.decode(): value.decode() for name, value in refused.told()}
    return JSONResponse(refused.body(_is_anthropic(path)), refused.status, headers)


def _is_anthropic(path: str) -> bool:
    return path.startswith("/v1/messages")


class GatewayRoutes:
    """ASGI middleware: answers the gateway's routes. The application's state has the ``gateway``."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not serves(scope["path"]):
            await self._app(scope, receive, send)
            return
        gateway: Gateway = scope["app"].state.gateway
        tenant = scope["state"]["tenant"]
        exchange = Exchange(scope, receive, send, tenant, anthropic=_is_anthropic(scope["path"]))
        try:
            await gateway.answer(exchange)
        except Gone:
            pass
        except Refusal as refused:
            if exchange.begun:
                # The server closes a connection whose answer is not complete: the client sees that it is not.
                logger.warning("an answer to %s breaks off: %s", scope["path"], refused.message)
                return
            await exchange.refuse(refused)
        except AgentStateError as error:
            await exchange.refuse(refusal(error))
        except Exception:
            if exchange.begun:
                raise
            logger.exception("a request to %s fails", scope["path"])
            await exchange.refuse(Refusal(500, "internal_error", "the gateway failed: its log says why"))
