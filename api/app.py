"""The application: its resources, its errors, and the parts that start and end with it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import agentstate
from agentstate.api import (
    activity,
    branches,
    demotion,
    engines,
    entries,
    events,
    health,
    metrics,
    operations,
    overview,
    pins,
    placement,
    prefetch,
    problems,
    reference,
    sessions,
    toolcalls,
    turns,
)
from agentstate.api.bodies import BodyLimit
from agentstate.api.changes import Changes
from agentstate.api.console import routes as console_routes
from agentstate.api.console.room import Console
from agentstate.api.direct import Shortcut
from agentstate.api.gate import Gate
from agentstate.api.gateway import described
from agentstate.api.gateway.app import Gateway, GatewayRoutes
from agentstate.api.guard import Guard
from agentstate.api.limits import Limits
from agentstate.api.metrics import CountedCalibration, Metrics
from agentstate.api.observation import Observation, tracing
from agentstate.api.paths import EncodedSlashes
from agentstate.api.service import Service
from agentstate.api.workers import Worker
from agentstate.fleet.decisions import Decisions
from agentstate.fleet.operations import Operations, fail_abandoned, part_of
from agentstate.fleet.passing import Passed, Passing
from agentstate.fleet.waits import Hearing, Waits
from agentstate.sessions.collection import Collector
from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings
from agentstate.sql.database import Database


def owner_of(settings: Settings) -> str:
    """How SQL knows what this service carries out, also after a restart."""
    return f"{socket.gethostname()}:{settings.port}"


def create_app(settings: Settings, worker: Worker | None = None) -> FastAPI:
    """The service as an ASGI application: all of it, or one ``worker`` of several. It expects an up-to-date schema: see
    `agentstate.api.server.migrate`.

    Opens nothing before it starts. Several services may share one PostgreSQL; node and port distinguish their
    operations. Raises SettingsError.
    """
    database = Database(settings.sqlalchemy_url)
    traces = tracing(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        owner = owner_of(settings) if worker is None else part_of(owner_of(settings), worker.number)
        fail_abandoned(database, owner)
        metrics = Metrics(database, None if worker is None else worker.metrics_dir)
        following = Operations(database, owner, lambda state: metrics.notices.labels(state).inc())
        limits = Limits() if worker is None else worker.limits
        waits = passed = collector = None
        hearing: Hearing | None = None
        if settings.foresight:
            if worker is None or worker.is_first:
                counted = CountedCalibration(metrics)
                hearing = waits = Waits(database, following, settings.engine_timeout_s, calibration=counted)
            if worker is not None:
                hearing = Passing(worker.notes_in)
                passed = None if waits is None else Passed(worker.notes_out, waits)
        if settings.collect_interval_s > 0 and (worker is None or worker.is_first):
            collector = Collector(database, settings.collect_interval_s, settings.expired_retention_s)
        app.state.service = service = Service(
            settings=settings,
            database=database,
            sessions=Sessions(database, settings.engine_timeout_s, waits=hearing),
            operations=following,
            changes=Changes(database),
            gate=Gate(database, limits, settings.requests_per_s),
            limits=limits,
            metrics=metrics,
            waits=hearing,
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
            if passed is not None:
                passed.close()
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
        # The framework would ask for each request whether somebody wants its own. `Observation` has all of it.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.add_middleware(
        Shortcut, routes=[route for resource in (entries, turns, branches) for route in resource.router.routes]
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
        overview,
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
