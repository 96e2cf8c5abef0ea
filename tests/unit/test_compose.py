"""The Compose file in deploy/compose, read as Compose reads it. Docker itself runs it where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from typer.main import get_command

from agentstate.cli.main import app
from agentstate.settings import Settings
from agentstate.sql import address
from agentstate.tiers.opening import OBJECT_STORES

DIRECTORY = Path(__file__).parents[2] / "deploy/compose"
TEXT = (DIRECTORY / "compose.yaml").read_text()
FILE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
OWN = {name: of for name, of in SERVICES.items() if "build" in of}


def variables(service: dict[str, Any]) -> dict[str, str]:
    """Its settings, with a value for what has to be set."""
    return {name: re.sub(r"\$\{.*?\}", "x" * 64, value) for name, value in service["environment"].items()}


def test_its_parts_are_those_that_an_installation_needs() -> None:
    commands = [" ".join(of["command"][:2]) for of in OWN.values()]
    assert sorted(commands) == ["agentstate db", "agentstate engine", "agentstate serve", "agentstate serve"]
    assert {"postgres", "s3"} <= SERVICES.keys()


def test_what_is_run_are_commands_that_there_are() -> None:
    known = get_command(app).commands  # type: ignore[attr-defined]
    assert {of["command"][1] for of in OWN.values()} <= known.keys()


@pytest.mark.parametrize("name", OWN)
def test_its_settings_are_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in variables(OWN[name]).items():
        monkeypatch.setenv(variable, value)
        prefix, _, field = variable.partition("_")
        assert prefix != "AGENTSTATE" or field.lower() in Settings.model_fields
    Settings()


def test_all_use_one_database_which_is_the_one_that_is_started() -> None:
    (url,) = {variables(of)["AGENTSTATE_DATABASE_URL"] for of in OWN.values()}
    parts, made = urlsplit(url), SERVICES["postgres"]["environment"]
    address.parse(Settings(database_url=url).sqlalchemy_url)
    assert (parts.hostname, parts.port, parts.username) == ("postgres", 5432, made["POSTGRES_USER"])
    assert parts.path == f"/{made['POSTGRES_DB']}"


def test_the_engine_shares_a_bucket_of_the_server_that_is_started() -> None:
    given, server = variables(SERVICES["engine"]), SERVICES["s3"]
    assert urlsplit(given["AGENTSTATE_SHARED_STORE"]).scheme in OBJECT_STORES
    endpoint = urlsplit(given["AWS_ENDPOINT_URL"])
    assert endpoint.hostname == "s3" and f"-s3.port={endpoint.port}" in server["command"]
    (config,) = server["configs"]
    assert f"-s3.config={config['target']}" in server["command"]
    identities = yaml.safe_load(FILE["configs"][config["source"]]["content"])["identities"]
    ((credentials,),) = [one["credentials"] for one in identities]
    assert credentials["accessKey"] == given["AWS_ACCESS_KEY_ID"]
    assert credentials["secretKey"] == SERVICES["engine"]["environment"]["AWS_SECRET_ACCESS_KEY"]


def test_services_reach_the_engine_and_only_they_are_reached() -> None:
    engine = SERVICES["engine"]
    url = urlsplit(engine["environment"]["AGENTSTATE_ENGINE_BASE_URL"])
    assert (url.hostname, str(url.port)) == ("engine", engine["command"][engine["command"].index("--port") + 1])
    published = {name: of["ports"] for name, of in SERVICES.items() if "ports" in of}
    assert published.keys() == {"service-1", "service-2"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)


def test_whatever_has_to_be_set_is_in_the_example() -> None:
    wanted = set(re.findall(r"\$\{(\w+)", TEXT))
    example = (DIRECTORY / ".env.example").read_text()
    assert wanted == set(re.findall(r"^(\w+)=$", example, re.MULTILINE))


def test_what_is_mentioned_is_defined() -> None:
    assert {source for of in SERVICES.values() for source in of.get("depends_on", {})} <= SERVICES.keys()
    mounted = {volume.partition(":")[0] for of in SERVICES.values() for volume in of.get("volumes", ())}
    assert mounted == FILE["volumes"].keys()
    stages = re.findall(r"^FROM \S+ AS (\w+)$", (DIRECTORY / "Dockerfile").read_text(), re.MULTILINE)
    assert {of["build"]["target"] for of in OWN.values()} == set(stages)
    (dockerfile,) = {of["build"]["dockerfile"] for of in OWN.values()}
    assert (DIRECTORY.parents[1] / dockerfile).exists()


def test_compose_takes_it() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("no docker compose")
    example = "".join(f"{line}x\n" if line.endswith("=") else "" for line in _example_lines())
    command = [docker, "compose", "--file", str(DIRECTORY / "compose.yaml"), "--env-file", "/dev/stdin", "config"]
    ran = subprocess.run(command, input=example, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def _example_lines() -> list[str]:
    return (DIRECTORY / ".env.example").read_text().splitlines()
