"""The service as a process: what ``agentstate serve`` and ``agentstate db upgrade`` run."""

from __future__ import annotations

import errno
import logging
import socket

import uvicorn

from agentstate.database import Database
from agentstate.errors import SchemaOutdated, SettingsError
from agentstate.settings import Settings
from api.app import create_app

logger = logging.getLogger(__name__)


def migrate(settings: Settings) -> None:
    """Bring the schema of the database to this version's, if it is older.

    Raises SchemaNewer, DatabaseUnreachable, DatabaseError; then the schema is as it was.
    """
    database = Database(settings.sqlalchemy_url)
    try:
        _migrate(database)
    finally:
        database.close()


def run(settings: Settings) -> None:
    """Serve until the process is told to stop (SIGINT, SIGTERM).

    An embedded SQLite database is migrated first; a PostgreSQL that needs it is refused, because others may use it.
    Raises SettingsError when the address cannot be listened on, SchemaOutdated, SchemaNewer, DatabaseUnreachable;
    each says in one line what to do.
    """
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # What the libraries tell at "info" is of no use to an operator: one line says that the service is there.
    library_level = {"info": "warning"}.get(settings.log_level, settings.log_level)
    logging.getLogger("alembic").setLevel(library_level.upper())
    # Before the database: a second service on the same port must not touch what belongs to the first.
    listener = listen(settings.host, settings.port)
    with listener:
        host, port = listener.getsockname()[:2]
        database = Database(settings.sqlalchemy_url)
        try:
            if database.is_sqlite:
                _migrate(database)
            else:
                database.check_schema()
            url = database.url
        finally:
            database.close()
        app = create_app(settings.model_copy(update={"port": port}))
        shown = f"[{host}]" if ":" in host else host
        logger.info(
            "AgentState listens on http://%s:%d, database %s, pages in %s", shown, port, url, settings.pages_path
        )
        config = uvicorn.Config(app, log_config=None, log_level=library_level, access_log=False)
        uvicorn.Server(config).run(sockets=[listener])


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
