"""The application: its resources, its errors, and what starts and ends with it."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

import agentstate
from agentstate.database import Database
from agentstate.operations import Flushes
from agentstate.sessions import Sessions
from agentstate.settings import Settings
from api import engines, health, operations, problems, sessions
from api.bodies import BodyLimit
from api.service import Service


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI application. It expects the schema to be there: see `api.server.migrate`.

    Opens nothing before it starts. Several services may share one PostgreSQL; what tells their operations apart is
    their node and port.
    """
    database = Database(settings.sqlalchemy_url)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        flushes = Flushes(database, owner=f"{socket.gethostname()}:{settings.port}")
        flushes.fail_abandoned()
        app.state.service = Service(
            settings=settings,
            database=database,
            sessions=Sessions(database, settings.engine_timeout_s),
            flushes=flushes,
        )
        try:
            yield
        finally:
            flushes.close()
            database.close()

    app = FastAPI(
        title="AgentState",
        version=agentstate.__version__,
        description="Sessions of LLM agents that can be suspended and resumed. Errors are RFC 9457 problems.",
        lifespan=lifespan,
    )
    app.add_middleware(BodyLimit)
    problems.install(app)
    for resource in (sessions, operations, engines, health):
        app.include_router(resource.router)
    return app
