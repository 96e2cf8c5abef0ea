"""What the endpoints work with, one instance an application."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from agentstate.database import Database
from agentstate.operations import Flushes
from agentstate.sessions import Sessions
from agentstate.settings import Settings


@dataclass(frozen=True)
class Service:
    settings: Settings
    database: Database
    sessions: Sessions
    flushes: Flushes


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]
