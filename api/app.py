"""The application: its resources, its errors, and the parts that start and end with it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import agentstate
from agentstate.fleet.decisions import Decisions
from agentstate.fleet.operations import Operations
from agentstate.fleet.waits import Waits
from agentstate.sessions.collection import Collector
from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings
from agentstate.sql.database import Database
from api import (
    activity,
    branches,
    demotion,
    engines,
    entries,
    events,
    health,
    metrics,
    operations,
    pins,
    placement,
    prefetch,
    problems,
    reference,
    sessions,
    toolcalls,
    turns,
)
from api.bodies import BodyLimit
from api.changes import Changes
from api.console import routes as console_routes
from api.console.room import Console
from api.gate import Gate
from api.gateway import described
from api.gateway.app import Gateway, GatewayRoutes
from api.guard import Guard
from api.metrics import Metrics
from api.observation import Observation, tracing
from api.paths import EncodedSlashes
from api.service import Service


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application. It expects an up-to-date schema: see `api.server.migrate`.

    Opens nothing before it starts. Several services may share one PostgreSQL; node and port distinguish their
    operations. Raises SettingsError.
    """
    database = Database(settings.sqlalchemy_url)
    traces = tracing(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        following = Operations(database, owner=f"{socket.gethostname()}:{settings.port}")
        following.fail_abandoned()
        collector = None
        if settings.collect_interval_s > 0:
            collector = Collector(database, settings.collect_interval_s, settings.expired_retention_s)
        waits = Waits(database, following, settings.engine_timeout_s) if settings.foresight else None
        app.state.service = service = Service(
            settings=settings,
            database=database,
            sessions=Sessions(database, settings.engine_timeout_s, waits=waits),
            operations=following,
            changes=Changes(database),
            gate=Gate(database, settings.requests_per_s),
            metrics=Metrics(database, following, waits),
            waits=waits,
            decisions=Decisions(lambda rank, after: following.decisions(rank, after, engines.TIMEOUT_S)),
        )
        app.state.gateway = gateway = Gateway(service)
        app.state.console = console = Console(service)
        try:
            yield
        finally:
            service.changes.close()
            console.close()
            await gateway.close()
            if collector is not None:
                collector.close()
            if waits is not None:
                waits.close()
            following.close()
            if traces is not None:
                traces.shutdown()
            database.close()

    app = FastAPI(
        title="AgentState",
        version=agentstate.__version__,
        description="Sessions of LLM agents that can be suspended and resumed. Errors are RFC 9457 problems.",
        lifespan=lifespan,
        # The framework's pages load their scripts from other hosts.
        docs_url=None,
        redoc_url=None,
    )
    app.add_middleware(EncodedSlashes)
    app.add_middleware(BodyLimit)
    app.add_middleware(GatewayRoutes)
    app.add_middleware(Guard)
    app.add_middleware(Observation, provider=traces)
    for resource in (
        sessions,
        entries,
        turns,
        branches,
        toolcalls,
        placement,
        pins,
        demotion,
        prefetch,
        activity,
        events,
        operations,
        engines,
        health,
        metrics,
        reference,
    ):
        app.include_router(resource.router)
    if settings.console:
        console_routes.install(app)
    problems.install(app)
    described.install(app)
    return app
