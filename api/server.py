"""The service as a process: the code behind ``agentstate serve`` and ``agentstate db upgrade``."""

from __future__ import annotations

import errno
import gc
import ipaddress
import logging
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from agentstate.api.app import create_app, owner_of
from agentstate.api.heads import BoundedHeads
from agentstate.api.observation import configure_logging
from agentstate.api.workers import Supervisor, Worker
from agentstate.errors import SchemaOutdated, SettingsError
from agentstate.fleet.operations import fail_abandoned
from agentstate.sessions import tenants
from agentstate.settings import Settings
from agentstate.sql.database import Database

# How long running requests may take after the service is told to stop.
SHUTDOWN_S = 30
# Longer than our clients keep an idle connection (`agentstate.client.transport`), so that no request uses one that is
# being closed.
KEEP_ALIVE_S = 75

logger = logging.getLogger(__name__)


def migrate(settings: Settings) -> None:
    """Upgrade the database's schema to this version's, if it is older.

    Raises SchemaNewer, DatabaseUnreachable, DatabaseError; the schema is then unchanged.
    """
    database = Database(settings.sqlalchemy_url)
    try:
        _migrate(database)
    finally:
        database.close()


def prepare(settings: Settings) -> None:
    """Ensure this version's schema: migrate an embedded SQLite, and only check a PostgreSQL, because others may use it.
    Raises SchemaOutdated, SchemaNewer, DatabaseUnreachable, DatabaseError."""
    database = Database(settings.sqlalchemy_url)
    try:
        if database.is_sqlite:
            _migrate(database)
        else:
            database.check_schema()
    finally:
        database.close()


def run(settings: Settings) -> None:
    """Serve until the process is told to stop (SIGINT, SIGTERM).

    Prepares the database first. Without any API key the service answers whoever reaches it, so it listens on loopback
    only. Raises SettingsError if it cannot listen on the address, SchemaOutdated, SchemaNewer, DatabaseUnreachable;
    each says in one line what to do.
    """
    configure_logging(settings)
    # The libraries' "info" messages are of no use to an operator: one line says that the service listens.
    library_level = {"info": "warning"}.get(settings.log_level, settings.log_level)
    logging.getLogger("alembic").setLevel(library_level.upper())
    # Listen before opening the database: a second service on the same port must not touch the first one's.
    listener = listen(settings.host, settings.port)
    with listener:
        host, port = listener.getsockname()[:2]
        prepare(settings)
        database = Database(settings.sqlalchemy_url)
        try:
            with database.read() as connection:
                guarded = tenants.any_key(connection)
            url = database.url
        finally:
            database.close()
        if not guarded and not ipaddress.ip_address(host).is_loopback:
            raise SettingsError(
                f"AGENTSTATE_HOST {settings.host} can be reached from elsewhere, and there is no API key: make one "
                "with `agentstate keys create`, or listen on 127.0.0.1"
            )
        settings = settings.model_copy(update={"port": port})
        shown = f"[{host}]" if ":" in host else host
        logger.info(
            "AgentState listens on http://%s:%d, database %s, pages in %s, %s%s",
            shown,
            port,
            url,
            settings.pages_path,
            "API keys are required" if guarded else "loopback only, because there is no API key",
            f", {settings.workers} workers" if settings.workers > 1 else "",
        )
        if settings.workers == 1:
            _serve(settings, listener, library_level)
        else:
            # Also of workers that are not started any more.
            fail_abandoned(database, owner_of(settings))
            database.close()
            _freeze()
            Supervisor(
                settings.workers, lambda worker: _serve(settings, listener, library_level, worker), listener
            ).run()


def _serve(settings: Settings, listener: socket.socket, library_level: str, worker: Worker | None = None) -> None:
    app = create_app(settings, worker)
    _freeze()
    Server(app, library_level, None if worker is None else worker.started).run(sockets=[listener])


def _freeze() -> None:
    """What is there by now stays. A full collection that looked through it would stop all requests for 50 ms, and make
    workers copy what they share."""
    gc.collect()
    gc.freeze()
    gc.collect()  # of next to nothing: the next full one waits until a quarter as much is new


class Server(uvicorn.Server):
    """Serves ``app``, and calls ``on_started`` once it does. On shutdown it ends the streams first, so that other
    requests can finish."""

    def __init__(self, app: FastAPI, log_level: str = "warning", on_started: Callable[[], None] | None = None):
        config = uvicorn.Config(
            app,
            http=BoundedHeads,
            log_config=None,
            log_level=log_level,
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_S,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        super().__init__(config)
        self._app = app
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_started is not None:
            self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.service.changes.close()
        self._app.state.console.close()
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket on an address; port 0 takes a free one. Raises SettingsError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(f"AGENTSTATE_HOST {host} is no address of this machine: {error.strerror}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SettingsError(
                f"port {port} on {host} is in use: stop what listens there, or set AGENTSTATE_PORT to another"
            ) from error
        raise SettingsError(
            f"{host}:{port} cannot be listened on: {error.strerror}; set AGENTSTATE_HOST and AGENTSTATE_PORT"
        ) from error
    return listener


def _migrate(database: Database) -> None:
    try:
        database.check_schema()
    except SchemaOutdated:
        database.upgrade()
