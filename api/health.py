"""``/healthz`` and ``/readyz``: whether the process runs, and whether it can serve."""

from __future__ import annotations

from http import HTTPStatus
from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel

from agentstate.api.service import ServiceDep
from agentstate.errors import DatabaseError, DatabaseFull, DatabaseUnreachable
from agentstate.fleet import engines

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Check(BaseModel):
    ok: bool
    detail: str


class Readiness(BaseModel):
    """``ready`` needs a writable database with this version's schema. Without an engine the service works, and reports
    KV as unknown."""

    status: Literal["ready", "unavailable"]
    database: Check
    migrations: Check
    engine: Check


@router.get("/healthz")
async def healthz() -> Health:
    """Answers while the process runs; checks nothing."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "Not ready"}})
def readyz(response: Response, service: ServiceDep) -> Readiness:
    """Checks the database, whether it is writable, its schema, and the engines."""
    unseen = Check(ok=False, detail="not looked at: the database does not answer")
    readiness = Readiness(
        status="unavailable",
        database=Check(ok=True, detail=service.database.url),
        migrations=Check(ok=True, detail="at this version's head"),
        engine=unseen,
    )
    try:
        service.database.check_schema()
        service.database.check_writable()
        with service.database.read() as connection:
            live = engines.live(connection, service.settings.engine_timeout_s)
        readiness.engine = Check(ok=bool(live), detail=f"{len(live)} live" if live else "none is live")
        readiness.status = "ready"
    except DatabaseUnreachable as error:
        readiness.database = Check(ok=False, detail=str(error))
        readiness.migrations = unseen
    except DatabaseFull as error:
        readiness.database = Check(ok=False, detail=str(error))
    except DatabaseError as error:
        readiness.migrations = Check(ok=False, detail=str(error))
        readiness.engine = Check(ok=False, detail="not looked at: the schema is not this version's")
    if readiness.status == "unavailable":
        response.status_code = HTTPStatus.SERVICE_UNAVAILABLE
    return readiness
