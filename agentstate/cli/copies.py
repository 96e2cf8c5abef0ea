"""Backups of the database, and back from them.

SQLite is copied with its own backup API, in one reading transaction: writers go on, and the copy is of one moment. A
backup is written beside its name, checked, synced and then named, so that a file of that name is a whole backup.
PostgreSQL is left to pg_dump and pg_restore.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import time
import urllib.request
from contextlib import closing, suppress
from pathlib import Path

import sqlalchemy as sa

from agentstate.errors import DatabaseError, DatabaseUnreachable, SettingsError
from agentstate.fleet import engines
from agentstate.private import make_directory, make_file
from agentstate.sql import address
from agentstate.sql.database import Database
from agentstate.sql.models import sessions

_BUSY_S = 10.0
_ANSWER_S = 5.0


def backup(url: str, file: Path) -> None:
    """Write a backup of the database at ``url``, which only this user may read. Raises SettingsError if ``file`` is
    there, or if there is no pg_dump, DatabaseUnreachable, and DatabaseError if the copy is not whole."""
    if file.exists():
        raise SettingsError(f"{file} is there already: name a new file")
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    make_file(partial)
    try:
        where = address.parse(url)
        if where.is_sqlite:
            source = Path(str(where.url.database))
            if not source.exists():
                raise DatabaseUnreachable(f"there is no database at {source}")
            _copy(_in_use(source), partial)
            _check(_at_rest(partial), file)
        else:
            _run(where, "pg_dump", ["--format=custom", "--no-owner", f"--file={partial}"])
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        _name(partial, file)
        _sync(file.parent)
    finally:
        partial.unlink(missing_ok=True)


def refuse_while_served(url: str, service_url: str) -> None:
    """Raises SettingsError if a service at ``service_url`` uses the database."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{service_url}/readyz", timeout=_ANSWER_S) as answer:
            used = json.loads(answer.read())["database"]["detail"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # nobody, or nobody of ours whose database answers
    if used == address.parse(url).shown:
        raise SettingsError(f"the service at {service_url} uses {used}: stop services and engines first")


def before_restore(url: str, file: Path, engine_timeout_s: float) -> str | None:
    """What a restore replaces, in words; None where nothing is. Raises SettingsError if ``file`` is no backup of this
    kind of database, or while engines use the database."""
    where = address.parse(url)
    if not file.exists():
        raise SettingsError(f"there is no backup at {file}")
    if where.is_sqlite:
        _check(_at_rest(file), file)
        if not Path(str(where.url.database)).exists():
            return None
    else:
        with file.open("rb") as found:
            if found.read(5) != b"PGDMP":
                raise SettingsError(f"{file} is no backup of PostgreSQL")
    with closing(Database(url)) as database:
        try:
            with database.read() as connection:
                live = engines.live(connection, engine_timeout_s)
                count = connection.execute(sa.select(sa.func.count()).select_from(sessions)).scalar() or 0
        except DatabaseUnreachable:
            raise
        except DatabaseError:
            return f"{database.url} has tables that this release does not know" if _has_tables(database) else None
        if live:
            raise SettingsError(f"engine {live[0].id} uses {database.url}: stop engines and services first")
        return f"{database.url} has {count:,} sessions"


def restore(url: str, file: Path) -> Path | None:
    """Put a backup in the place of the database. Returns where a backup of what was there before is, if there is one.
    The database is either restored or as it was. Raises like `backup`."""
    where = address.parse(url)
    if not where.is_sqlite:
        own = ["--clean", "--if-exists", "--no-owner", "--single-transaction", "--exit-on-error"]
        _run(where, "pg_restore", [*own, f"--dbname={where.url.database}", str(file)])
        return None
    target = Path(str(where.url.database))
    kept = None
    if target.exists():
        kept = target.with_name(f"{target.name}.before-{time.strftime('%Y%m%dT%H%M%S')}")
        backup(url, kept)
    else:
        make_directory(target.parent)
        make_file(target)
    # Through SQLite, under its lock for writing: whoever still has the file open sees all of it or nothing.
    _copy(_at_rest(file), target)
    _check(_in_use(target), target)
    return kept


def _in_use(file: Path) -> str:
    """The URI of a database that others may have open."""
    return f"{file.absolute().as_uri()}?mode=rw"


def _at_rest(file: Path) -> str:
    """The URI of a file that nobody writes to: read without locks, so that nothing is left beside it; unless it is the
    copy of a database with its log, which is read as well."""
    alone = not file.with_name(f"{file.name}-wal").exists()
    return f"{file.absolute().as_uri()}?mode=ro" + ("&immutable=1" if alone else "")


def _copy(source: str, target: Path) -> None:
    try:
        with (
            closing(sqlite3.connect(source, uri=True, timeout=_BUSY_S)) as read,
            closing(sqlite3.connect(target, timeout=_BUSY_S)) as written,
        ):
            # All pages in one step: between two, a writer would make it begin anew.
            read.backup(written, pages=-1)
    except sqlite3.Error as error:
        raise DatabaseError(f"the database cannot be copied to {target}: {error}") from error


def _check(uri: str, file: Path) -> None:
    """Raises SettingsError unless the file is a whole database of AgentState's."""
    try:
        with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_S)) as found:
            said = found.execute("PRAGMA quick_check(1)").fetchone()[0]
            if said != "ok":
                raise SettingsError(f"{file} is damaged: {said}")
            found.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        raise SettingsError(f"{file} is no database of AgentState: {error}") from error


def _has_tables(database: Database) -> bool:
    with database.read() as connection:
        return bool(sa.inspect(connection).get_table_names())


def _run(where: address.Address, tool: str, arguments: list[str]) -> None:
    if shutil.which(tool) is None:
        raise SettingsError(f"{tool} is not on the path: install PostgreSQL's client, of the server's version or newer")
    url = where.url
    # A password goes into the environment, which only this user may read, and not on the command line.
    given = {"PGHOST": where.connect_args.get("host", url.host), "PGPORT": where.connect_args.get("port", url.port)}
    given |= {"PGUSER": url.username, "PGPASSWORD": url.password, "PGDATABASE": url.database}
    given |= {_LIBPQ[name]: value for name, value in url.query.items() if name in _LIBPQ and isinstance(value, str)}
    environment = {**os.environ, **{name: str(value) for name, value in given.items() if value is not None}}
    done = subprocess.run([tool, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise DatabaseError(f"{tool} failed: {where.masked(said) or done.returncode}")


_LIBPQ = {"host": "PGHOST", "port": "PGPORT", "sslmode": "PGSSLMODE", "sslrootcert": "PGSSLROOTCERT"}
_LIBPQ |= {"sslcert": "PGSSLCERT", "sslkey": "PGSSLKEY", "service": "PGSERVICE", "passfile": "PGPASSFILE"}


def _name(partial: Path, file: Path) -> None:
    """Give a file its name, but not over one that came meanwhile."""
    try:
        os.link(partial, file)
    except FileExistsError:
        raise SettingsError(f"{file} is there already: name a new file") from None
    except OSError:
        # A file system without hard links.
        if file.exists():
            raise SettingsError(f"{file} is there already: name a new file") from None
        os.rename(partial, file)


def _sync(directory: Path) -> None:
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
