"""The schema that the migrations make is the one that the code expects, on both databases."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext

import migrations
from agentstate.adapters.tables import metadata
from agentstate.database import Database
from agentstate.errors import SchemaNewer, SchemaOutdated
from agentstate.settings import Settings
from api.server import migrate, run


@pytest.fixture
def empty(empty_url: str) -> Iterator[Database]:
    database = Database(empty_url)
    yield database
    database.close()


def tables(database: Database) -> set[str]:
    with database.read() as connection:
        return set(sa.inspect(connection).get_table_names())


def downgrade(database: Database, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def set_revision(database: Database, revision: str) -> None:
    with database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})


def test_the_migrations_make_the_schema_of_the_models(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def test_up_down_up(empty: Database) -> None:
    empty.upgrade()
    assert tables(empty) == {*metadata.tables, "alembic_version"}
    downgrade(empty, "base")
    assert tables(empty) == {"alembic_version"}
    with pytest.raises(SchemaOutdated):
        empty.check_schema()
    empty.upgrade()
    empty.check_schema()
    assert tables(empty) == {*metadata.tables, "alembic_version"}


def test_upgrading_again_changes_nothing(database: Database) -> None:
    database.upgrade()
    database.check_schema()


def test_many_processes_may_upgrade_at_once(empty_url: str) -> None:
    start = threading.Barrier(4)
    failures: list[BaseException] = []

    def upgrade() -> None:
        database = Database(empty_url)
        start.wait()
        try:
            database.upgrade()
        except BaseException as error:
            failures.append(error)
        database.close()

    threads = [threading.Thread(target=upgrade) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    database = Database(empty_url)
    database.check_schema()
    database.close()


def test_a_migration_that_fails_leaves_nothing_behind(empty: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Operations.create_table

    def fail_at_leases(self: Operations, name: str, *args: object, **options: object) -> object:
        if name == "leases":
            raise RuntimeError("the power is out")
        return made(self, name, *args, **options)

    monkeypatch.setattr(Operations, "create_table", fail_at_leases)
    with pytest.raises(RuntimeError, match="power"):
        empty.upgrade()
    assert tables(empty) == set()


def test_an_outdated_schema_is_refused_with_the_command_to_run(empty: Database) -> None:
    with pytest.raises(SchemaOutdated, match="revision none.*run `agentstate db upgrade`"):
        empty.check_schema()


def test_a_newer_schema_is_refused_and_left_alone(database: Database, database_url: str) -> None:
    set_revision(database, "9999")
    with pytest.raises(SchemaNewer, match="revision 9999.*upgrade AgentState"):
        database.check_schema()
    with pytest.raises(SchemaNewer):
        migrate(Settings(database_url=database_url))


def test_migrate_is_what_an_outdated_database_needs(empty: Database, empty_url: str) -> None:
    migrate(Settings(database_url=empty_url))
    empty.check_schema()
    migrate(Settings(database_url=empty_url))


def test_a_service_does_not_migrate_a_postgresql_by_itself(postgresql: object) -> None:
    url = postgresql.create_database()  # type: ignore[attr-defined]
    with pytest.raises(SchemaOutdated, match="run `agentstate db upgrade`"):
        run(Settings(database_url=url, port=0))
    database = Database(url)
    assert tables(database) == set()
    database.close()
