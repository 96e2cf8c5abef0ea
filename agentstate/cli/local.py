"""A service and an engine on this machine, as child processes, for the demo and the acceptance tests."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import httpx

from agentstate.cli import launcher
from agentstate.errors import EngineError
from agentstate.fleet import engines
from agentstate.fleet.control import ControlClient
from agentstate.fleet.engines import Engine
from agentstate.private import make_directory, make_file
from agentstate.sessions.outcomes import Resumed
from agentstate.sessions.verbs import Sessions
from agentstate.settings import Settings
from agentstate.sql.database import Database

# Generous timeouts, for a busy machine. A waiter notices at once when a process ends.
_SERVICE_START_S, _ENGINE_START_S, _REGISTRATION_S, _ENGINE_END_S = 300, 1200, 120, 180
_STAT_S = 10
# For one answer of a health check, which SGLang gives after a second at the earliest.
_ANSWER_S = 60
_FLUSH_S = 300
# Below what Linux and macOS give to outgoing connections.
_PORTS = range(10_000, 20_000)
# Of the ports that were given out: bound, and not listened on.
_held: list[socket.socket] = []


def free_port() -> int:
    """A loopback port that nothing uses now, and that no system gives to a connection of its own accord. On Linux, no
    other call returns it, in whatever process, before this process ends. Raises RuntimeError if there is none."""
    for port in random.sample(_PORTS, len(_PORTS)):
        probe = socket.socket()
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            probe.close()
            continue
        if sys.platform == "linux":
            # Whoever asks for reuse, as servers do, can listen beside it; the next probe does not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _held.append(probe)
        else:
            probe.close()
        return port
    raise RuntimeError("no ports are free")


def flush_device(engine_url: str) -> None:
    """Empty a device's cache, so that the next request has to restore. Retries while a request winds up. Raises
    EngineError if the cache cannot be flushed."""
    deadline = time.monotonic() + _FLUSH_S
    while not httpx.post(f"{engine_url}/flush_cache", timeout=_FLUSH_S, trust_env=False).is_success:
        if time.monotonic() > deadline:
            raise EngineError("the engine's cache could not be flushed")
        time.sleep(0.1)


class Process(Protocol):
    """The part of `subprocess.Popen` that `ChildProcess` uses. The process leads a session."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def terminate(self) -> None: ...


Spawn = Callable[[Sequence[str], Mapping[str, str], Path], Process]
"""Starts a command in an environment, and appends its output to a log."""


def spawn(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    make_file(log)
    with log.open("ab") as output:
        # Its own session: an engine is several processes, which are killed together.
        return subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


class ChildProcess:
    """A command that runs beside this process until it is killed, with its output appended to ``log``."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, start: Spawn = spawn):
        self._log = log
        self._process = start(command, environment, log)

    @property
    def group(self) -> int:
        """The id of the process group of the command and everything it starts."""
        return self._process.pid

    def await_answer(self, url: str, timeout_s: float) -> None:
        """Wait until ``url`` answers with a success. Raises EngineError, with the end of the log, if it does not."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                if httpx.get(url, timeout=_ANSWER_S, trust_env=False).is_success:
                    return
            except httpx.TransportError:
                pass
            if self._process.poll() is not None:
                break
            time.sleep(0.2)
        tail = self._log.read_text(errors="replace").splitlines()[-15:]
        raise EngineError(f"{url} does not answer; the end of {self._log.name}:\n" + "\n".join(tail))

    def terminate(self, timeout_s: float) -> bool:
        """Send SIGTERM, and SIGKILL to what is left after ``timeout_s``. Returns whether it ended by itself."""
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.kill()
        return True

    def kill(self) -> None:
        """Send SIGKILL to the process and everything it has started."""
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class LocalService:
    """`agentstate serve` on a loopback port, with all its files below ``home``.

    Its log goes to ``home``/service.log. `close` ends it. It inherits the settings of the environment, except the
    database and the page directory, which are ``home``'s own, and those that ``settings`` sets: AGENTSTATE_* variables.
    """

    def __init__(self, home: Path, *, service_port: int, settings: Mapping[str, str] | None = None):
        make_directory(home)
        self.home = home
        self.service_url = f"http://127.0.0.1:{service_port}"
        self._service: ChildProcess | None = None
        self._service_port = service_port
        own = {"AGENTSTATE_HOME": str(home), "AGENTSTATE_PORT": str(service_port), **(settings or {})}
        given_url = own.get("AGENTSTATE_DATABASE_URL", "")
        self.database_url: str = Settings(home=home, database_url=given_url).sqlalchemy_url
        inherited = {
            n: v for n, v in os.environ.items() if n not in ("AGENTSTATE_DATABASE_URL", "AGENTSTATE_PAGES_DIR")
        }
        self.environment: Mapping[str, str] = {**inherited, **own}

    @property
    def group(self) -> int:
        """The process group of the service, which runs."""
        assert self._service is not None
        return self._service.group

    def start_service(self) -> None:
        launcher.require_free_port("127.0.0.1", self._service_port)
        command = [sys.executable, "-m", "agentstate.cli", "serve"]
        self._service = ChildProcess(command, self.environment, self.home / "service.log")
        self._service.await_answer(f"{self.service_url}/healthz", _SERVICE_START_S)

    def close(self) -> None:
        if self._service is not None:
            self._service.terminate(timeout_s=10)
            self._service = None


class LocalStack(LocalService):
    """A service, and `agentstate engine` beside it on its own port, whose log goes to ``home``/engine.log.

    An engine that does not store (``stores``) is plain SGLang, for comparison: it needs no service, and has no control
    endpoint. ``spawn_engine`` starts its process. The engine registers in the database of ``beside``, another service,
    instead of one of its own: then it is another node of the same.
    """

    model = "smollm2"

    def __init__(
        self,
        home: Path,
        checkpoint: Path,
        *,
        engine_python: Path | None,
        service_port: int,
        engine_port: int,
        stores: bool = True,
        spawn_engine: Spawn = spawn,
        beside: LocalService | None = None,
    ):
        own = {"AGENTSTATE_DATABASE_URL": beside.database_url} if beside is not None else {}
        super().__init__(home, service_port=service_port, settings={"HF_HUB_OFFLINE": "1", **own})
        self.engine_url = f"http://127.0.0.1:{engine_port}"
        self.engine_arguments: tuple[str, ...] = ()
        self._checkpoint = checkpoint
        self._stores = stores
        self.spawn_engine = spawn_engine
        self._engine_port = engine_port
        self._engine: ChildProcess | None = None
        self._settings = Settings(
            home=home,
            port=service_port,
            engine_python=engine_python,
            database_url=self.database_url,
            pages_dir=None,
        )

    def create_database(self) -> None:
        """Create the tables in which an engine registers: all that it needs of a service."""
        database = Database(self._settings.sqlalchemy_url)
        try:
            database.upgrade()
        finally:
            database.close()

    def start_engine(self, *arguments: str) -> None:
        """Start SGLang and wait until it answers and has registered with the service. The KV pool is small, to leave
        memory for others; ``arguments`` are SGLang's and come last."""
        self.begin_engine(*arguments)
        self.await_engine()

    def begin_engine(self, *arguments: str) -> None:
        """`start_engine` without waiting, so that several start at once."""
        given = ["--model-path", str(self._checkpoint), "--served-model-name", self.model, "--host", "127.0.0.1"]
        given += ["--port", str(self._engine_port), "--max-total-tokens", "32768", *arguments]
        self.engine_arguments = arguments
        command, environment = launcher.engine_command(self._settings, given, self.environment, stores=self._stores)
        self._engine = ChildProcess(command, environment, self.home / "engine.log", self.spawn_engine)

    def await_engine(self) -> None:
        """Wait until the engine that was begun answers and has registered with the service."""
        assert self._engine is not None
        self._engine.await_answer(f"{self.engine_url}/health", _ENGINE_START_S)
        self._await_registration()

    def _await_registration(self) -> None:
        deadline = time.monotonic() + _REGISTRATION_S
        while self._stores and self._stat() is None:
            if time.monotonic() > deadline:
                raise EngineError("the engine runs and did not register itself with the service")
            time.sleep(0.1)

    def kill_engine(self) -> None:
        """Send SIGKILL to the engine and everything it started: nothing is written after that."""
        if self._engine is not None:
            self._engine.kill()
            self._engine = None

    def freeze_engine(self) -> None:
        """Stop the engine and everything it started (SIGSTOP): an idle engine polls for requests all the time."""
        if self._engine is not None:
            os.killpg(self._engine.group, signal.SIGSTOP)

    def continue_engine(self) -> None:
        """Continue a frozen engine."""
        if self._engine is not None:
            os.killpg(self._engine.group, signal.SIGCONT)

    def thaw_engine(self) -> None:
        """Continue a frozen engine, and wait until the service knows it again."""
        self.continue_engine()
        if self._engine is not None:
            self._await_registration()

    def stop_engine(self) -> None:
        """Send SIGTERM: the engine ends its requests and stores its pages."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            if not engine.terminate(_ENGINE_END_S):
                raise EngineError(f"the engine did not end within {_ENGINE_END_S} s of being told to")

    def flush_device(self) -> None:
        flush_device(self.engine_url)

    def stat(self) -> dict[str, Any]:
        """The engine's `stat` from its control endpoint. Raises EngineError if it does not answer."""
        deadline = time.monotonic() + _REGISTRATION_S
        while (stat := self._stat()) is None:
            if time.monotonic() > deadline:
                raise EngineError("the engine does not answer at its control endpoint")
            time.sleep(0.1)
        return stat

    def close(self) -> None:
        self.kill_engine()
        super().close()

    def control(self) -> ControlClient:
        """The control endpoint of the rank with the newest heartbeat. Raises EngineError if none is registered."""
        if not (ranks := self.ranks()):
            raise EngineError("no engine has told the service that it is there")
        return ControlClient(ranks[0].control_address, ranks[0].control_secret)

    def settle(self) -> dict[str, Any]:
        """Wait until every offered page is stored, and return the engine's `stat` then. A request's pages are offered
        before it is answered."""
        while (stat := self.stat())["spill"]["waiting"]:
            time.sleep(0.02)
        return stat

    def begin_turn(self) -> Resumed:
        """Begin a turn of a new session, for callers that send their requests to the engine themselves. Needs no
        service; nobody else can resume the session for a day."""
        database = Database(self._settings.sqlalchemy_url)
        try:
            sessions = Sessions(database, self._settings.engine_timeout_s)
            return sessions.resume(sessions.create(self.model).id, lease_ttl_s=86400, tail=0)
        finally:
            database.close()

    def ranks(self) -> list[Engine]:
        """The registered ranks of the engine, the newest heartbeat first."""
        timeout_s = float(self.environment.get("AGENTSTATE_ENGINE_TIMEOUT_S", self._settings.engine_timeout_s))
        database = Database(self._settings.sqlalchemy_url)
        try:
            with database.read() as connection:
                live = engines.live(connection, timeout_s, self.model)
        finally:
            database.close()
        return [rank for rank in live if rank.base_url == f"{self.engine_url}/v1"]

    def _stat(self) -> dict[str, Any] | None:
        """The registered engine's `stat`; None while none answers, as after a kill."""
        for engine in self.ranks():
            try:
                return ControlClient(engine.control_address, engine.control_secret).call("stat", _STAT_S)
            except EngineError:
                continue
        return None
