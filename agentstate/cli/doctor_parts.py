"""What `agentstate doctor` looks at of an installation: interpreters, SGLang, database, engines, store, service."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agentstate import __version__
from agentstate.cli import launcher
from agentstate.cli.findings import Finding, Level
from agentstate.cli.output import DENIED, UNREACHABLE
from agentstate.errors import (
    DatabaseError,
    DatabaseUnreachable,
    EngineError,
    SchemaNewer,
    SchemaOutdated,
    TierError,
    TierForeign,
    TierUnavailable,
)
from agentstate.settings import Settings

if TYPE_CHECKING:
    from agentstate.fleet.engines import Engine
    from agentstate.sql.database import Database

_ANSWER_S = 5.0
_MOST_BYTES = 1 << 20
_CLOCK_S = 2.0
_DENIED = ("authentication failed", "permission denied", "no pg_hba.conf entry", "access denied", "accessdenied")


def python(settings: Settings) -> Iterator[Finding]:
    """Which interpreters there are."""
    measured = f"AgentState {__version__}, Python {platform.python_version()} at {sys.executable}"
    yield Finding("python", Level.OK, "the command line runs", measured)


def sglang(settings: Settings, flags: list[str]) -> Iterator[Finding]:
    """Whether there is an SGLang that goes with AgentState, and whether the ``flags`` do."""
    try:
        python = launcher.engine_python(settings)
    except EngineError as error:
        if settings.engine_python is None and not flags:
            yield Finding("sglang", Level.SKIPPED, "this interpreter has no SGLang: only an engine needs it")
        else:
            command = "AGENTSTATE_ENGINE_PYTHON=/the/python/that/has/SGLang"
            yield Finding("sglang", Level.FIX, str(error), consequence="no engine starts", command=command)
        return
    done = _run([python, "-W", "ignore", "-m", "engine_patch.contract"])
    said = " ".join(done.stdout.split()) or done.stderr.strip().rpartition("\n")[2]
    if done.returncode:
        yield Finding(
            "sglang",
            Level.FIX,
            f"the SGLang of {python} does not go with AgentState",
            said,
            "engines refuse to start, or do without what is missing",
            f"{python} -m pip install 'agentstate[engine]=={__version__}'",
        )
    else:
        yield Finding("sglang", Level.OK, "SGLang has what AgentState needs", said)
    if flags:
        done = _run(launcher.check_command(settings, flags))
        said = " ".join((done.stdout + done.stderr).split())
        if done.returncode:
            command = f"agentstate engine --check {' '.join(flags)}"
            yield Finding("sglang", Level.FIX, "SGLang's flags are refused", said, "no engine starts", command)
        else:
            yield Finding("sglang", Level.OK, "SGLang's flags go with AgentState", said)


def native(settings: Settings) -> Iterator[Finding]:
    """Whether the Python that runs engines reads pages by the native extension."""
    try:
        python = launcher.engine_python(settings)
    except EngineError:
        python = sys.executable
    done = _run([python, "-W", "ignore", "-m", "agentstate.pages.native"])
    said = done.stdout.strip() or done.stderr.strip().rpartition("\n")[2]
    if done.returncode == 0:
        yield Finding("native", Level.OK, "pages are read and verified by the native extension", said)
        return
    options = "--force-reinstall --no-deps --no-binary agentstate"
    built = f"install a C compiler, then: {python} -m pip install {options} agentstate"
    yield Finding(
        "native",
        Level.KNOW,
        "pages are read and verified in Python, without the native extension",
        said,
        "the same pages, for more CPU time, part of it with the interpreter lock that forwards need",
        "unset AGENTSTATE_NATIVE" if said.startswith("off") else built,
    )


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def database(settings: Settings, clock: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Whether the database answers, can be written to, has this version's schema, and what time it has."""
    import sqlalchemy as sa

    from agentstate.sql.database import Database, now_us

    try:
        with closing(Database(settings.sqlalchemy_url)) as found:
            if (file := _missing(settings, found)) is not None:
                command = "agentstate serve makes it; or point AGENTSTATE_DATABASE_URL at the one that there is"
                yield Finding("database", Level.KNOW, f"there is no database yet at {file}", command=command)
                return
            found.check_schema()
            found.check_writable()
            before = clock()
            with found.read() as connection:
                theirs = (connection.execute(sa.select(now_us())).scalar() or 0) / 1e6
            after = clock()
            yield Finding("database", Level.OK, "the database answers, and has this version's schema", found.url)
            # The statement ran somewhere in between.
            off = max(before - theirs, theirs - after, 0.0)
            if off > _CLOCK_S:
                yield Finding(
                    "database",
                    Level.KNOW,
                    "the clocks of this machine and of the database differ",
                    f"by {off:,.0f} s",
                    "leases and expiry go by the database's clock alone; logs and traces are out of order, and object "
                    "stores refuse signatures that are 15 minutes off",
                    "timedatectl set-ntp true, on both",
                )
    except (SchemaOutdated, SchemaNewer) as error:
        newer = isinstance(error, SchemaNewer)
        yield Finding(
            "database",
            Level.FIX,
            "the database has the schema of a newer AgentState" if newer else "the database has an older schema",
            str(error),
            "services and engines do not start",
            f"pip install --upgrade agentstate (this is {__version__})" if newer else "agentstate db upgrade",
        )
    except DatabaseError as error:
        denied = any(said in str(error).lower() for said in _DENIED)
        away = isinstance(error, DatabaseUnreachable)
        yield Finding(
            "database",
            Level.FIX,
            "the database refuses this user" if denied else "the database cannot be " + ("reached" if away else "used"),
            str(error),
            "services answer 503; engines store pages and no manifests, so nobody resumes from them",
            "AGENTSTATE_DATABASE_URL, as services and engines have it",
            DENIED if denied else UNREACHABLE if away else 1,
        )


def _missing(settings: Settings, found: Database) -> Path | None:
    """The file of a SQLite that does not exist: to open it would make it."""
    from agentstate.sql import address

    file = address.parse(settings.sqlalchemy_url).url.database
    return Path(file) if found.is_sqlite and file and not Path(file).exists() else None


def engines(settings: Settings) -> Iterator[Finding]:
    """Whether the engines that the database knows are there, answer, and store."""
    import sqlalchemy as sa

    from agentstate.fleet import engines as fleet
    from agentstate.sql.database import now_us

    try:
        with closing(_usable(settings)) as database, database.read() as connection:
            known = fleet.registered(connection)
            live = {rank.id for rank in fleet.live(connection, settings.engine_timeout_s)}
            now = connection.execute(sa.select(now_us())).scalar() or 0
    except DatabaseError:
        yield Finding("engines", Level.SKIPPED, "the database does not say which there are: see above")
        return
    if not known:
        yield Finding("engines", Level.SKIPPED, "no engine has registered in the database")
    served = {rank.model for rank in known if rank.id in live}
    for rank in known:
        of = f"engine {rank.id} (model {rank.model}, rank {rank.rank}, node {rank.node})"
        if rank.id in live:
            yield from _answers(rank, of)
            continue
        silent_s = (now - rank.heartbeat_us) / 1e6
        yield Finding(
            "engines",
            Level.KNOW if rank.model in served else Level.FIX,
            f"{of} is dead",
            f"no heartbeat for {silent_s:,.0f} s",
            f"others serve {rank.model}; what only this one's drive has is recomputed"
            if rank.model in served
            else f"nobody serves {rank.model}: turns get no engine",
            "start it again with the same page directory: it takes the place of this one",
            UNREACHABLE,
        )


def _answers(rank: Engine, of: str) -> Iterator[Finding]:
    from agentstate.fleet.control import ControlClient

    try:
        stat = ControlClient(rank.control_address, rank.control_secret).call("stat", _ANSWER_S)
    except EngineError as error:
        loopback = "//127." in rank.control_address or "//[::1]" in rank.control_address
        yield Finding(
            "engines",
            Level.FIX,
            f"{of} sends heartbeats and does not answer at its control endpoint",
            f"{rank.control_address}: {error}",
            "suspends report KV as unknown; prefetches, demotions and pins fail",
            "has it just ended? Ask again in 10 s. If it runs elsewhere: AGENTSTATE_CONTROL_ADDRESS=tcp://eth0:* there"
            if loopback
            else "open that port between services and engines",
            UNREACHABLE,
        )
        return
    if stat.get("off"):
        yield Finding(
            "engines",
            Level.FIX,
            f"{of} stores nothing",
            str(stat["off"]),
            "it serves its model; agents that pause are recomputed",
            "start it again once the reason is gone",
        )
    else:
        yield Finding("engines", Level.OK, f"{of} answers, and stores", rank.control_address)


def store(settings: Settings) -> Iterator[Finding]:
    """Whether the shared store answers, and is this installation's."""
    from agentstate.fleet import stores
    from agentstate.tiers import shared_extents

    if not settings.shared_store:
        yield Finding("store", Level.SKIPPED, "AGENTSTATE_SHARED_STORE is not set: engines share no store")
        return
    gone = "nothing is published, and engines restore from their own drives alone"
    try:
        extents = shared_extents(settings)
        assert extents is not None
        with extents.tier, closing(_usable(settings)) as database:
            mark = stores.look(database, extents.tier, settings.shared_store, _ANSWER_S)
    except DatabaseError:
        yield Finding("store", Level.SKIPPED, "the database does not say whose it is: see above")
    except TierForeign as error:
        command = "AGENTSTATE_SHARED_STORE of this installation, or agentstate pages claim"
        yield Finding("store", Level.FIX, str(error), consequence=gone, command=command)
    except (TierError, TimeoutError) as error:
        denied = any(
            said in str(error).lower().replace(" ", "") for said in (*_DENIED, "forbidden", "permissiondenied")
        )
        away = isinstance(error, TierUnavailable | TimeoutError)
        yield Finding(
            "store",
            Level.FIX,
            f"the shared store {'refuses this user' if denied else 'does not answer' if away else 'cannot be used'}",
            str(error) or f"no answer within {_ANSWER_S:g} s",
            gone,
            "credentials from AWS_*, GOOGLE_* or AZURE_*" if denied else "is it there, and mounted?",
            DENIED if denied else UNREACHABLE if away else 1,
        )
    except ImportError as error:
        command = f"{sys.executable} -m pip install 'agentstate[shared]'"
        yield Finding("store", Level.FIX, f"no client for object stores: {error}", consequence=gone, command=command)
    else:
        what = "the shared store answers, and is ours" if mark else "the shared store answers, and is new"
        signed = "signed" if settings.store_key.get_secret_value() else "not signed"
        yield Finding("store", Level.OK, what, f"{settings.shared_store}, extents are {signed}")


def _usable(settings: Settings) -> Database:
    """The database, with this version's schema. Raises DatabaseError; what it says is for the check of the database."""
    from agentstate.sql.database import Database

    database = Database(settings.sqlalchemy_url)
    if (file := _missing(settings, database)) is not None:
        database.close()
        raise DatabaseUnreachable(f"there is no database at {file}")
    try:
        database.check_schema()
    except DatabaseError:
        database.close()
        raise
    return database


def service(settings: Settings, url: str | None, api_key: str | None) -> Iterator[Finding]:
    """Whether the service answers, is ready, and takes the key."""
    at = url or f"http://{launcher.reached(settings.host)}:{settings.port}"
    try:
        status, said = _get(f"{at}/readyz", None)
    except OSError as error:
        why = getattr(error, "reason", error)
        if url is None:
            yield Finding("service", Level.SKIPPED, f"no service answers at {at}: {why}")
        else:
            consequence = "no agent can be resumed through it"
            command = "agentstate serve; AGENTSTATE_URL"
            what = f"the service at {at} cannot be reached"
            yield Finding("service", Level.FIX, what, str(why), consequence, command, UNREACHABLE)
        return
    if said.get("status") not in ("ready", "unavailable"):
        yield Finding(
            "service",
            Level.FIX,
            f"what answers at {at} is no AgentState service",
            f"/readyz answers {status}, and not as a service does",
            "no agent can be resumed through it",
            "AGENTSTATE_URL: where the service is; or agentstate serve, with another AGENTSTATE_PORT",
            UNREACHABLE,
        )
        return
    if status != 200:
        checks = [one for one in said.values() if isinstance(one, dict) and not one.get("ok")]
        yield Finding(
            "service",
            Level.FIX,
            f"the service at {at} is not ready",
            f"/readyz answers {status}: {'; '.join(str(one.get('detail', '')) for one in checks)}",
            "it answers 503",
            "agentstate doctor --only database, where the service runs",
        )
        return
    status, _ = _get(f"{at}/v1/sessions?limit=1", api_key)
    if status in (401, 403):
        yield Finding(
            "service",
            Level.FIX,
            f"the service at {at} does not take this key" if api_key else f"the service at {at} wants a key",
            f"/v1/sessions answers {status}",
            "every call is refused",
            "agentstate keys create, then AGENTSTATE_API_KEY",
            DENIED,
        )
    else:
        yield Finding("service", Level.OK, "the service is ready", at)


def _get(url: str, api_key: str | None) -> tuple[int, dict[str, Any]]:
    """Status and document of an answer, empty if that is no JSON object. Raises OSError if there is no answer."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        try:
            answer = direct.open(request, timeout=_ANSWER_S)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            status, content = answer.status, answer.read(_MOST_BYTES)
    except HTTPException as error:
        raise OSError(f"it speaks no HTTP: {error}") from error
    try:
        said = json.loads(content)
    except ValueError:
        said = None
    return status, said if isinstance(said, dict) else {}
