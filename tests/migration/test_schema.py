"""The schema that the migrations make is the one that the code expects, on both databases."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from agentstate import migrations
from agentstate.adapters.tables import metadata
from agentstate.api.server import migrate, run
from agentstate.errors import NotABranchPoint, SchemaNewer, SchemaOutdated
from agentstate.fleet import engines, erasures, manifests
from agentstate.fleet.engines import Engine
from agentstate.fleet.erasures import StoreName
from agentstate.fleet.manifests import Manifest
from agentstate.sessions import tenants
from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings
from agentstate.sql.database import Database

ENGINE = Engine("eng_1", "n", 0, "tcp://127.0.0.1:5000", "http://127.0.0.1:30000/v1", "m", "f", "/pages")


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


def test_the_newest_migration_is_the_head() -> None:
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert scripts.get_current_head() == migrations.HEAD


def test_what_is_told_of_a_manifest_lies_before_its_keys(database: Database) -> None:
    """SQLite walks through a long value to reach what comes after it, in every resume."""
    if not database.is_sqlite:
        pytest.skip("PostgreSQL stores long values apart")
    with database.read() as connection:
        columns = [column["name"] for column in sa.inspect(connection).get_columns("manifests")]
    assert columns == list(metadata.tables["manifests"].c.keys())
    assert columns[-1] == "keys"


def test_manifests_survive_the_new_order(empty: Database) -> None:
    empty.upgrade()
    manifest = Manifest("s", "f", 0, "n", "e", 64, 128, b"k" * 64, 1000, lost_tokens=64)
    with empty.write() as connection:
        manifests.save(connection, manifest)
    for earlier in ("0004", "0008", "0014"):
        downgrade(empty, earlier)
        empty.upgrade()
        with empty.read() as connection:
            assert manifests.load(connection, "s", "f", 0, "n") == manifest


def test_a_manifest_of_before_says_that_nothing_is_shared(empty: Database) -> None:
    empty.upgrade()
    with empty.write() as connection:
        manifests.save(connection, Manifest("s", "f", 0, "n", "e", 64, 128, b"k" * 64, 1000, shared_tokens=128))
        engines.register(connection, replace(ENGINE, shared_store="file:///share"))
    downgrade(empty, "0014")
    empty.upgrade()
    with empty.read() as connection:
        (found,), (engine,) = manifests.coverage(connection, ["s"]), engines.registered(connection)
    assert (found.tokens, found.shared_tokens, engine.shared_store) == (128, 0, "")


def test_an_engine_of_before_has_one_dp_rank(empty: Database) -> None:
    empty.upgrade()
    with empty.write() as connection:
        engines.register(connection, replace(ENGINE, dp_rank=1, dp_size=2))
    downgrade(empty, "0017")
    empty.upgrade()
    with empty.read() as connection:
        (engine,) = engines.registered(connection)
    assert (engine.dp_rank, engine.dp_size) == (0, 1)


def test_manifests_that_are_there_get_their_heads(empty: Database) -> None:
    empty.upgrade()
    saved = [
        Manifest(f"s{number}", "f", rank, "n", "e", 64, 64 * pages, bytes(range(32)) * pages, 1000)
        for number, pages in enumerate([0, 1, 5, 128, 700] * 110)
        for rank in (0, 1)
    ]
    with empty.write() as connection:
        for manifest in saved:
            manifests.save(connection, manifest)
    downgrade(empty, "0008")
    assert not tables(empty) & {"manifest_heads", "erasures", "abandoned_pages"}
    empty.upgrade()
    for rank in (0, 1):
        after: str | None = ""
        while after is not None:
            with empty.write() as connection:
                after = manifests.renew_heads(connection, StoreName("f", rank, "n"), after, 100)
    with empty.read() as connection:
        heads = metadata.tables["manifest_heads"]
        found = {(row.session_id, row.rank): bytes(row.head) for row in connection.execute(sa.select(heads))}
    assert found == {(one.session_id, one.rank): erasures.head_of(one.keys) for one in saved}


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


def test_what_is_stored_survives_the_way_up_and_down(empty: Database) -> None:
    upgrade_to(empty, "0001")
    with empty.write() as connection:
        for statement in (
            "INSERT INTO sessions "
            "(id, model, metadata, status, head_entry, next_seq, revision, created_us, updated_us) "
            "VALUES ('s', 'm', '{}', 'suspended', 'e3', 4, 7, 1, 1)",
            "INSERT INTO entries (id, session_id, seq, kind, payload, call_id, created_us) VALUES "
            "('e1', 's', 1, 'tool_call', '{\"name\": \"t\"}', 'a', 1), "
            "('e2', 's', 2, 'tool_result', '{\"output\": 1}', 'a', 1), "
            "('e3', 's', 3, 'tool_call', '{\"name\": \"t\"}', 'b', 1)",
            "INSERT INTO tool_calls (session_id, call_id, name, state, call_seq, result_seq, claimed_us) VALUES "
            "('s', 'a', 't', 'done', 1, 2, 1), ('s', 'b', 't', 'claimed', 3, NULL, 1)",
            "INSERT INTO leases (session_id, epoch, expires_us) VALUES ('s', 3, 0)",
        ):
            connection.execute(sa.text(statement))
    empty.upgrade()
    sessions = Sessions(empty, 10)
    assert [entry.seq for entry in sessions.entries("s").entries] == [1, 2, 3]
    with pytest.raises(NotABranchPoint):
        sessions.fork("s", None, at="e1")
    fork = sessions.fork("s", None, at="e2")
    resumed = sessions.resume("s", lease_ttl_s=1, tail=1)
    assert (resumed.lease.key.epoch, resumed.pending_tool_calls) == (4, ["b"])
    downgrade(empty, "0001")
    with empty.read() as connection:
        assert connection.execute(sa.text("SELECT id, next_seq FROM sessions")).all() == [("s", 4)]
        assert connection.execute(sa.text("SELECT count(*) FROM entries")).scalar() == 3
        assert connection.execute(sa.text("SELECT count(*) FROM tool_calls")).scalar() == 2
    assert fork.id != "s"


def test_turns_that_have_ended_and_keys_that_are_there_keep_what_they_had(empty: Database) -> None:
    upgrade_to(empty, "0017")
    with empty.write() as connection:
        for statement in (
            "INSERT INTO sessions (id, tenant, name, model, metadata, status, next_seq, revision, created_us, "
            "updated_us, deleted_us) VALUES ('turned', 'a', 'x', 'm', '{}', 'suspended', 1, 1, 1, 9, NULL), "
            "('made', 'a', 'y', 'm', '{}', 'idle', 1, 1, 1, 8, NULL), "
            "('gone', 'a', 'z', 'm', '{}', 'idle', 1, 1, 1, 7, 7)",
            "INSERT INTO leases (session_id, epoch, expires_us, released_us) VALUES ('turned', 1, 0, 5)",
            "INSERT INTO tenants (id, created_us) VALUES ('a', 1)",
        ):
            connection.execute(sa.text(statement))
        insert = sa.text(
            "INSERT INTO api_keys (id, tenant, note, secret_hash, created_us) VALUES ('k', 'a', '', :hash, 1)"
        )
        connection.execute(insert, {"hash": b"x"})
    empty.upgrade()
    with empty.read() as connection:
        turns = connection.execute(sa.text("SELECT * FROM session_turns ORDER BY turned_us")).all()
        assert [tuple(turn) for turn in turns] == [("turned", "a", 5), ("made", "a", 8)]
        assert [(key.id, key.role) for key in tenants.list_keys(connection)] == [("k", tenants.Role.OPERATOR)]
    downgrade(empty, "0017")
    empty.upgrade()
    with empty.read() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM api_keys")).scalar() == 1


def test_later_migrations_lock_no_big_table(postgresql: object) -> None:
    """After 0002, a table that was there before is only given what PostgreSQL does at once: a column that is null or
    has a constant default. Whatever else would read or write all of it while nobody else may write."""
    database = Database(postgresql.create_database())  # type: ignore[attr-defined]
    upgrade_to(database, "0002")
    before = tables(database)
    statements: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        statements.append(" ".join(statement.split()))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        database.upgrade()
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
        database.close()
    at_once = re.compile(r"ALTER TABLE \w+ (ADD COLUMN (?!.*REFERENCES)|DROP COLUMN|ALTER COLUMN \w+ DROP)")
    slow = re.compile(rf"(ALTER TABLE|UPDATE|DELETE FROM|CREATE( UNIQUE)? INDEX .* ON) ({'|'.join(before)})\b")
    known = "alembic_version"
    assert [one for one in statements if slow.match(one) and known not in one and not at_once.match(one)] == []


def upgrade_to(database: Database, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    with database.write() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
