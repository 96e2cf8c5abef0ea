"""All routes of the console."""

from __future__ import annotations

from fastapi import FastAPI

from agentstate.api.console import actions, assets, fleet, overview, session, sessions, signing, stream, tenants

PARTS = (assets, stream, signing, overview, sessions, actions, session, fleet, tenants)


def install(app: FastAPI) -> None:
    """Serve the console at ``/``. The application's state has the ``console``."""
    for part in PARTS:
        app.include_router(part.router)
