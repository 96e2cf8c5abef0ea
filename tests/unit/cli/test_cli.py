"""The command line as a user meets it: what is wrong is one line that says what to do, and no traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from documented import checked

import agentstate

SRC = Path(agentstate.__file__).parent.parent


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AGENTSTATE_")}
    return subprocess.run(
        [sys.executable, "-m", "agentstate.cli", *arguments],
        env={**inherited, "PYTHONPATH": str(SRC), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def only_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("agentstate: ")
    return line


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def fake_sglang(tmp_path: Path) -> Path:
    """An interpreter that finds a package called sglang: enough for everything that is checked before it starts."""
    (tmp_path / "site" / "sglang").mkdir(parents=True)
    (tmp_path / "site" / "sglang" / "__init__.py").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


@pytest.fixture
def taken_port() -> int:
    listener = socket.create_server(("127.0.0.1", 0))
    yield listener.getsockname()[1]
    listener.close()


def test_version() -> None:
    assert run("version").stdout.strip() == agentstate.__version__


def test_settings_lists_every_variable(home: Path) -> None:
    shown = run("settings", AGENTSTATE_HOME=str(home), COLUMNS="200").stdout
    assert "AGENTSTATE_PAGES_DIR" in shown
    assert str(home) in shown
    rows = checked("settings", json.loads(run("settings", "--json", AGENTSTATE_HOME=str(home)).stdout))
    assert {row["variable"]: row["value"] for row in rows}["AGENTSTATE_HOME"] == str(home)


def test_the_help_of_an_engine_lists_what_it_reads() -> None:
    shown = run("engine", "--help", COLUMNS="200").stdout
    for name in ("PAGES_DIR", "DATABASE_URL", "PAGES_QUOTA", "STAGING_BYTES", "DRIVE_TIMEOUT_S", "PREFETCH_TTL_S"):
        assert f"AGENTSTATE_{name}: " in shown
    assert "AGENTSTATE_LEASE_TTL_S" not in shown


def test_settings_hides_a_password(home: Path) -> None:
    shown = run("settings", AGENTSTATE_DATABASE_URL="postgresql://user:secret@host/db", COLUMNS="200").stdout
    assert "secret" not in shown


def test_a_missing_engine(home: Path) -> None:
    line = only_line(run("engine", "--model-path", "x", AGENTSTATE_ENGINE_PYTHON="/no/such/python"))
    assert "AGENTSTATE_ENGINE_PYTHON" in line


def test_a_wrong_model_path(home: Path, fake_sglang: Path) -> None:
    environment = {"AGENTSTATE_HOME": str(home), "AGENTSTATE_ENGINE_PYTHON": str(fake_sglang)}
    assert "/no/such/model" in only_line(run("engine", "--model-path", "/no/such/model", **environment))
    assert "--model-path" in only_line(run("engine", **environment))


def test_a_check_of_flags_starts_nothing_and_hands_on_its_exit_code(home: Path, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "$@"\nexit 1\n')
    python.chmod(0o755)
    environment = {"AGENTSTATE_HOME": str(home), "AGENTSTATE_ENGINE_PYTHON": str(python)}
    done = run("engine", "--model-path", "/no/such/model", "--check", "--pp-size", "2", **environment)
    assert done.returncode == 1
    assert done.stdout.split()[-5:] == ["engine_patch.flag_report", "--model-path", "/no/such/model", "--pp-size", "2"]
    assert not home.exists()


def test_an_occupied_engine_port(home: Path, fake_sglang: Path, taken_port: int, tmp_path: Path) -> None:
    environment = {"AGENTSTATE_HOME": str(home), "AGENTSTATE_ENGINE_PYTHON": str(fake_sglang)}
    line = only_line(run("engine", "--model-path", str(tmp_path), "--port", str(taken_port), **environment))
    assert str(taken_port) in line


def test_an_occupied_service_port(home: Path, taken_port: int) -> None:
    line = only_line(run("serve", "--port", str(taken_port), AGENTSTATE_HOME=str(home)))
    assert str(taken_port) in line
    assert not home.exists()


def test_a_page_directory_that_cannot_be_made(home: Path, fake_sglang: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    environment = {
        "AGENTSTATE_PAGES_DIR": str(tmp_path / "file" / "pages"),
        "AGENTSTATE_ENGINE_PYTHON": str(fake_sglang),
    }
    line = only_line(run("engine", "--model-path", str(tmp_path), "--port", "0", **environment))
    assert "AGENTSTATE_PAGES_DIR" in line


def test_a_setting_that_does_not_fit() -> None:
    assert "AGENTSTATE_PORT" in only_line(run("serve", AGENTSTATE_PORT="99999"))


def test_keys_are_made_listed_and_revoked(home: Path) -> None:
    environment = {"AGENTSTATE_HOME": str(home), "COLUMNS": "200"}
    made = run("keys", "create", "--tenant", "acme", "--note", "ci", **environment)
    secret = made.stdout.strip()
    assert secret.startswith("ags_")
    (key,) = checked("keys list", json.loads(run("keys", "list", "--json", **environment).stdout))
    assert (key["tenant"], key["note"], key["revoked"]) == ("acme", "ci", "")
    assert key["id"] in made.stderr
    shown = run("keys", "list", **environment).stdout
    assert key["id"] in shown
    assert secret not in shown
    assert run("keys", "revoke", key["id"], **environment).returncode == 0
    (key,) = json.loads(run("keys", "list", "--json", **environment).stdout)
    assert key["revoked"]
    assert "key_none" in only_line(run("keys", "revoke", "key_none", **environment))


def test_nobody_is_asked_where_there_is_no_terminal(home: Path) -> None:
    refused = run("tenants", "delete", "acme", AGENTSTATE_HOME=str(home))
    assert refused.returncode == 2 and "--yes" in refused.stderr
    assert not home.exists()


def test_a_database_that_is_away_is_a_status_of_its_own_and_an_object(home: Path) -> None:
    url = "postgresql://nobody@127.0.0.1:1/none"
    away = run("keys", "list", "--json", AGENTSTATE_DATABASE_URL=url)
    assert away.returncode == 3 and not away.stdout
    assert json.loads(away.stderr)["error"] == "database-unreachable"


def test_quotas_are_set_kept_cleared_and_listed(home: Path) -> None:
    environment = {"AGENTSTATE_HOME": str(home)}
    run("tenants", "set", "acme", "--requests-per-s", "5", **environment)
    said = run("tenants", "quota", "acme", "--device", "20GiB", "--nvme", "1TiB", "--sessions", "7", **environment)
    assert said.stdout.strip() == "tenant acme: device_bytes: 20.0GiB, nvme_bytes: 1.0TiB, sessions: 7"
    said = run("tenants", "quota", "acme", "--device", "none", "--host", "5MB", "--shared", "2TiB", **environment)
    limits = "host_bytes: 4.8MiB, nvme_bytes: 1.0TiB, shared_bytes: 2.0TiB, sessions: 7"
    assert said.stdout.strip() == f"tenant acme: {limits}"
    assert run("tenants", "quota", "--group", "g", "--host", "1GiB", **environment).stdout.startswith("group g: host")
    assert run("tenants", "quota", "--none", "--device", "0", **environment).stdout.strip() == "none: device_bytes: 0B"
    rows = checked("tenants ls", json.loads(run("tenants", "ls", "--json", **environment).stdout))
    listed = {row["account"]: row for row in rows}
    assert list(listed) == ["none", "group g", "tenant acme"]
    assert (listed["tenant acme"]["requests_per_s"], listed["tenant acme"]["nvme_bytes"]) == (5.0, 2**40)
    assert "5000000" not in run("tenants", "ls", **environment).stdout
    assert run("tenants", "quota", "acme", "--clear", **environment).stdout.strip() == "tenant acme: no limits"
    assert "whose quota" in only_line(run("tenants", "quota", **environment))
    assert "is a tenant's" in only_line(run("tenants", "quota", "--none", "--sessions", "1", **environment))
    assert "is no size" in only_line(run("tenants", "quota", "acme", "--device", "much", **environment))
    assert "no name of a tenant" in only_line(run("tenants", "quota", "a b", **environment))


def test_limits_of_a_tenant_and_a_collection(home: Path) -> None:
    environment = {"AGENTSTATE_HOME": str(home)}
    assert "acme is its own" in run("tenants", "set", "acme", "--expires-in-s", "60", **environment).stderr
    assert "shared with group g" in run("keys", "create", "--tenant", "acme", "--kv-group", "g", **environment).stderr
    assert "no name of a group" in only_line(run("tenants", "set", "acme", "--kv-group", "a b", **environment))
    assert run("tenants", "rotate-kv-secret", **environment).stdout.startswith("0 manifests dropped")
    assert run("tenants", "delete", "acme", "--yes", **environment).stdout.startswith("0 sessions deleted")
    assert "no name of a tenant" in only_line(run("tenants", "set", "a b", **environment))
    assert run("db", "gc", **environment).stdout.strip() == "0 sessions, 0 entries, 0 blobs, 0 records"
