"""`agentstate doctor`, with what it finds really broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from documented import checked
from typer.testing import CliRunner

from agentstate.cli import doctor, doctor_machine, doctor_parts
from agentstate.cli.findings import Finding, Level, examine, exit_status, show
from agentstate.cli.main import app
from agentstate.errors import ServiceUnreachable
from agentstate.fleet import engines, stores
from agentstate.fleet.engines import Engine
from agentstate.settings import Settings
from agentstate.sql import models
from agentstate.sql.database import Database
from agentstate.tiers import shared_extents

PATIENCE_S = 600.0


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in [name for name in os.environ if name.startswith("AGENTSTATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AGENTSTATE_HOME", str(tmp_path / "home"))
    # How full this machine's disk is says nothing here.
    monkeypatch.setenv("AGENTSTATE_PAGES_FREE_FRACTION", "0")
    (tmp_path / "home").mkdir(mode=0o700)
    return Settings()


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.sqlalchemy_url)
    database.upgrade()
    yield database
    database.close()


def worst(found: Iterable[Finding]) -> Finding:
    (one,) = [one for one in found if one.level in (Level.FIX, Level.KNOW)]
    assert one.consequence or one.command
    return one


def level(found: Iterable[Finding]) -> list[Level]:
    return [one.level for one in found]


def tree(directory: Path) -> dict[str, Any]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in directory.rglob("*")
    }


def test_a_drive_that_is_as_it_should_be(settings: Settings) -> None:
    found = list(doctor_machine.drive(settings))
    assert Level.FIX not in level(found)
    assert "GB/s" in found[0].measured
    assert not settings.pages_path.exists() and tree(settings.home) == {}


def test_a_full_disk(settings: Settings, small: Path) -> None:
    found = worst(doctor_machine.drive(settings.model_copy(update={"pages_dir": small})))
    assert found.level is Level.FIX and "full" in found.what and "2.0 MiB" in found.measured
    assert list(small.iterdir()) == []


def test_a_disk_with_less_free_than_is_to_stay_free(settings: Settings) -> None:
    short = settings.model_copy(update={"pages_free_fraction": 0.999999})
    found = [one for one in doctor_machine.drive(short) if one.level is Level.FIX]
    assert "AGENTSTATE_PAGES_FREE_FRACTION" in found[0].what


def test_a_quota_that_is_more_than_the_disk(settings: Settings) -> None:
    found = doctor_machine.drive(settings.model_copy(update={"pages_quota": 1 << 60}))
    assert "AGENTSTATE_PAGES_QUOTA" in [one for one in found if one.level is Level.KNOW][-1].what


def test_a_read_only_directory(settings: Settings, small: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    found = worst(doctor_machine.drive(settings.model_copy(update={"pages_dir": small / "pages"})))
    assert (found.level, exit_status([found], strict=False)) == (Level.FIX, 4)
    assert "Read-only" in found.what and "no engine starts" in found.consequence


def test_a_page_directory_that_is_a_file(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = worst(doctor_machine.drive(settings.model_copy(update={"pages_dir": tmp_path / "file" / "pages"})))
    assert found.level is Level.FIX and "is no directory" in found.what


def test_few_descriptors(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, expected in ((64, Level.FIX), (1024, Level.KNOW), (65536, Level.OK), (-1, Level.OK)):
        monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda _, soft=soft: (soft, 65536))
        assert level(doctor_machine.descriptors(settings)) == [expected]


def test_more_host_memory_than_there_is(settings: Settings) -> None:
    assert level(doctor_machine.memory(settings)) != [Level.FIX]
    found = worst(doctor_machine.memory(settings.model_copy(update={"host_bytes": 1 << 50})))
    assert found.level is Level.FIX and "AGENTSTATE_HOST_BYTES" in found.command


def test_a_backend_that_needs_a_gpu(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.cli.launcher.has_cuda", lambda: False)
    assert level(doctor_machine.gpu(settings)) == [Level.SKIPPED]
    assert level(doctor_machine.memory_lock(settings)) == [Level.SKIPPED]
    kvikio = settings.model_copy(update={"read_backend": "kvikio"})
    assert worst(doctor_machine.gpu(kvikio)).level is Level.FIX
    monkeypatch.setattr("agentstate.cli.launcher.has_cuda", lambda: True)
    monkeypatch.setattr(doctor_machine, "_has_gds", lambda: False)
    assert worst(doctor_machine.gpu(kvikio)).level is Level.KNOW
    assert level(doctor_machine.gpu(settings)) == [Level.OK]


def test_memory_that_may_not_be_locked(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentstate.cli.launcher.has_cuda", lambda: True)
    monkeypatch.setattr(doctor_machine.resource, "getrlimit", lambda _: (8 << 20, 8 << 20))
    monkeypatch.setattr(doctor_machine, "_capabilities", lambda: 0)
    assert worst(doctor_machine.memory_lock(settings)).measured.startswith("CAP_IPC_LOCK is not in effect")
    monkeypatch.setattr(doctor_machine, "_capabilities", lambda: 1 << 14)
    assert level(doctor_machine.memory_lock(settings)) == [Level.OK]


def test_the_native_extension(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    used = run_in_python(["-m", "agentstate.pages.native"])
    assert level(doctor_parts.native(settings)) == [Level.KNOW if used.returncode else Level.OK]
    monkeypatch.setenv("AGENTSTATE_NATIVE", "off")
    found = worst(doctor_parts.native(settings))
    assert (found.level, found.measured) == (Level.KNOW, "off (AGENTSTATE_NATIVE)")
    assert found.command == "unset AGENTSTATE_NATIVE"
    monkeypatch.setattr(doctor_parts, "_run", lambda _: subprocess.CompletedProcess([], 1, "not built (…)\n", ""))
    found = worst(doctor_parts.native(settings))
    assert found.level is Level.KNOW and "C compiler" in found.command


def run_in_python(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True)


def test_the_rest_of_a_machine_is_looked_at(settings: Settings) -> None:
    for check in (doctor_machine.numa, doctor_machine.shared_memory, doctor_machine.io_uring):
        assert Level.FIX not in level(check(settings))


def test_a_database_that_is_as_it_should_be(settings: Settings, database: Database) -> None:
    before = tree(settings.home)
    assert level(doctor_parts.database(settings)) == [Level.OK]
    assert tree(settings.home).keys() == before.keys()


def test_no_database_yet_is_not_made(settings: Settings) -> None:
    assert worst(doctor_parts.database(settings)).level is Level.KNOW
    assert level(doctor_parts.engines(settings)) == [Level.SKIPPED]
    assert list(settings.home.iterdir()) == []


@pytest.mark.parametrize(
    ("revision", "command"), [("0001", "agentstate db upgrade"), ("9999", "pip install --upgrade agentstate")]
)
def test_a_wrong_schema(settings: Settings, database: Database, revision: str, command: str) -> None:
    with database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :to"), {"to": revision})
    found = worst(doctor_parts.database(settings))
    assert found.level is Level.FIX and found.command.startswith(command)
    assert level(doctor_parts.engines(settings)) == [Level.SKIPPED]


def test_a_database_that_cannot_be_reached(settings: Settings) -> None:
    away = settings.model_copy(update={"database_url": "postgresql://u:hidden-word@127.0.0.1:1/none"})
    (found,) = examine({"database": doctor_parts.database}, away, PATIENCE_S)
    assert exit_status([found], strict=False) == 3
    assert "hidden-word" not in str(found)


def test_a_clock_that_is_off(settings: Settings, database: Database) -> None:
    for by in (3600.0, -3600.0):
        found = worst(doctor_parts.database(settings, lambda by=by: time.time() + by))
        assert "clocks" in found.what and found.measured in ("by 3,600 s", "by 3,599 s", "by 3,598 s")


def engine(database: Database, name: str, *, silent_s: float = 0.0, **more: Any) -> None:
    own = {"node": f"n-{name}", "rank": 0, "control_address": "tcp://127.0.0.1:1", "base_url": "http://x/v1"}
    own |= {"model": "m", "fingerprint": "f", "pages_dir": "/pages", **more}
    with database.write() as connection:
        engines.register(connection, Engine(name, **own))
        if silent_s:
            past = {"heartbeat_us": models.engines.c.heartbeat_us - round(silent_s * 1e6)}
            connection.execute(sa.update(models.engines).where(models.engines.c.id == name).values(past))


def test_a_dead_engine(settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert level(doctor_parts.engines(settings)) == [Level.SKIPPED]
    engine(database, "eng_dead", silent_s=7200)
    found = worst(doctor_parts.engines(settings))
    assert (found.level, exit_status([found], strict=False)) == (Level.FIX, 3)
    assert "eng_dead" in found.what and "7,20" in found.measured and "nobody serves m" in found.consequence


def test_an_engine_that_does_not_answer_and_one_that_is_dead_beside_it(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_parts, "_ANSWER_S", 0.2)
    engine(database, "eng_dead", silent_s=7200)
    engine(database, "eng_mute")
    patient = settings.model_copy(update={"engine_timeout_s": 3600.0})
    found = {one.what.split()[1]: one for one in doctor_parts.engines(patient)}
    assert found["eng_dead"].level is Level.KNOW and "others serve m" in found["eng_dead"].consequence
    assert found["eng_mute"].level is Level.FIX and "AGENTSTATE_CONTROL_ADDRESS" in found["eng_mute"].command


def test_a_store_that_is_ours_new_another_ones_or_gone(settings: Settings, database: Database, tmp_path: Path) -> None:
    assert level(doctor_parts.store(settings)) == [Level.SKIPPED]
    (tmp_path / "bucket").mkdir()
    shared = settings.model_copy(update={"shared_store": f"file://{tmp_path}/bucket"})
    assert "is new" in next(iter(doctor_parts.store(shared))).what
    assert list((tmp_path / "bucket").iterdir()) == []
    extents = shared_extents(shared)
    assert extents is not None
    with extents.tier:
        stores.identify(database, extents.tier, shared.shared_store)
    assert "is ours" in next(iter(doctor_parts.store(shared))).what
    with database.write() as connection:
        connection.execute(sa.update(models.shared_stores).values(id="another"))
    assert "another installation uses it" in worst(doctor_parts.store(shared)).what
    gone = settings.model_copy(update={"shared_store": f"file://{tmp_path}/none"})
    assert worst(doctor_parts.store(gone)).level is Level.FIX


def test_an_sglang_that_is_not_there(settings: Settings, tmp_path: Path) -> None:
    assert level(doctor_parts.sglang(settings, [])) == [Level.SKIPPED]
    assert worst(doctor_parts.sglang(settings, ["--pp-size", "2"])).level is Level.FIX
    none = settings.model_copy(update={"engine_python": Path("/no/such/python")})
    assert "/no/such/python" in worst(doctor_parts.sglang(none, [])).what


@pytest.mark.parametrize(("status", "expected"), [(0, Level.OK), (1, Level.FIX)])
def test_an_sglang_and_flags_say_themselves_whether_they_go(
    settings: Settings, tmp_path: Path, status: int, expected: Level
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "said $@"\nexit {status}\n')
    python.chmod(0o755)
    own = settings.model_copy(update={"engine_python": python})
    contract, flags = doctor_parts.sglang(own, ["--pp-size", "2"])
    assert contract.level is flags.level is expected
    assert contract.measured.endswith("engine_patch.contract") and flags.measured.endswith("--pp-size 2")


def hung(_: Settings) -> list[Finding]:
    # In a pipe into which nobody writes, beside a process of its own.
    subprocess.Popen(["sleep", "100000"])
    os.read(os.pipe()[0], 1)
    return []


def crashed(_: Settings) -> list[Finding]:
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def raised(_: Settings) -> list[Finding]:
    raise ValueError("a mistake")


def away(_: Settings) -> list[Finding]:
    raise ServiceUnreachable("no answer")


def good(_: Settings) -> list[Finding]:
    return [Finding("good", Level.OK, "all is well")]


def test_a_check_that_hangs_or_crashes_is_a_finding_and_the_others_go_on(settings: Settings) -> None:
    (late,) = examine({"hung": hung}, settings, 0.1)
    assert (late.level, late.status) == (Level.FIX, 3) and "no answer within 0.1 s" in late.what
    every = {"crashed": crashed, "raised": raised, "away": away, "good": good}
    found = {one.check: one for one in examine(every, settings, PATIENCE_S)}
    assert [one.level for one in found.values()] == [Level.FIX, Level.FIX, Level.FIX, Level.OK]
    assert "a mistake" in found["raised"].what and found["away"].status == 3


def test_secrets_are_not_printed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-you-1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "all is well")
    keyed = settings.model_copy(update={"store_key": Settings(store_key="k" * 40).store_key})

    def talkative(_: Settings) -> list[Finding]:
        told = f"not-for-you-1 {'k' * 40} postgresql://u:not-for-you-2@h/d password=not-for-you-3"
        return [Finding("talk", Level.FIX, told, told, told, told), *good(settings)]

    said, kept = examine({"talk": talkative}, keyed, PATIENCE_S)
    assert "not-for-you" not in str(said) and "k" * 40 not in str(said)
    assert kept.what == "all is well"


def test_what_is_shown_and_how_it_ends(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        Finding("a", Level.OK, "fine"),
        Finding("b", Level.KNOW, "so\x1b[2J", "m", "c", "d"),
        Finding("c", Level.SKIPPED, "why"),
    ]
    assert show(found, verbose=False) == found
    printed = capsys.readouterr().out
    assert "fine" not in printed and "skipped c: why" in printed and "\x1b" not in printed
    assert printed.splitlines()[-1] == "0 to fix, 1 to know"
    show(found, verbose=True)
    assert "fine" in capsys.readouterr().out
    assert (exit_status(found, strict=False), exit_status(found, strict=True)) == (0, 1)
    fixes = [Finding("x", Level.FIX, "x", status=status) for status in (1, 4, 3)]
    assert [exit_status(fixes[:number], strict=False) for number in (1, 2, 3)] == [1, 4, 3]


def test_the_command(settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTSTATE_URL", "http://127.0.0.1:1")
    before = tree(settings.home)
    said = CliRunner().invoke(app, ["doctor", "--json", "--timeout", "600"])
    rows = checked("doctor", json.loads(said.stdout))
    assert {row["check"] for row in rows} == set(doctor.NAMES)
    assert {row["check"] for row in rows if row["level"] == "fix"} == {"service"} and said.exit_code == 3
    assert tree(settings.home).keys() == before.keys()
    said = CliRunner().invoke(app, ["doctor", "--only", "python,io-uring", "-v", "--timeout", "600"])
    assert said.exit_code == 0 and said.stdout.splitlines()[-1] == "0 to fix, 0 to know"
    assert [line.split()[1] for line in said.stdout.splitlines() if line.startswith("ok")] == ["python:", "io-uring:"]
    assert CliRunner().invoke(app, ["doctor", "--only", "python,nothing"]).exit_code == 2


def test_what_a_hung_check_has_started_ends_with_it(settings: Settings, tmp_path: Path) -> None:
    readable, writable = os.pipe()

    def starts(_: Settings) -> list[Finding]:
        subprocess.Popen(["sleep", "100000"], pass_fds=[writable])
        os.read(os.pipe()[0], 1)
        return []

    list(examine({"starts": starts}, settings, 1.0))
    os.close(writable)
    # Nobody has it open any more.
    assert os.read(readable, 1) == b""
    os.close(readable)
