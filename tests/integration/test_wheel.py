"""What is published: the wheel has what the checkout has, under names of its own, and runs without the checkout."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute
from installed import ROOT, built, installed, outside, published, source_tree
from stage import MODEL, PATIENCE_S, register

from agentstate.api.console import assets, routes
from agentstate.cli import reference
from agentstate.cli.local import ChildProcess, free_port
from agentstate.client import Client, message
from agentstate.settings import Settings
from agentstate.sql.database import Database

PACKAGES = {"agentstate", "engine_patch"}
PARTS = ("api", "benchmarks", "migrations")
"""Folders of the checkout that lie in `agentstate` when they are installed."""
RESULTS = "benchmarks/results"
"""What documents are written from, and no program reads."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(wheel, tmp_path_factory.mktemp("installed") / "environment", like=Path(sys.executable))


def names(wheel: Path) -> set[str]:
    """What it installs, but for what says so and for what was compiled, which a machine may be unable to."""
    with zipfile.ZipFile(wheel) as archive:
        named = (name for name in archive.namelist() if not name.endswith(".so"))
        return {name for name in named if not name.partition("/")[0].endswith(".dist-info")}


def test_it_adds_two_packages_to_an_environment(wheel: Path) -> None:
    assert {name.partition("/")[0] for name in names(wheel)} == PACKAGES


def test_it_has_what_the_checkout_has(wheel: Path, tmp_path: Path) -> None:
    paths = [path.relative_to(ROOT) for folder in (*PACKAGES, *PARTS) for path in (ROOT / folder).rglob("*")]
    files = [path for path in paths if (ROOT / path).is_file() and path.suffix not in (".pyc", ".so")]
    assert len(files) > 300
    expected = {
        path.as_posix() if path.parts[0] in PACKAGES else f"agentstate/{path.as_posix()}"
        for path in files
        if not path.is_relative_to(RESULTS)
    }
    assert names(wheel) == expected
    assert names(built("wheel", source_tree(tmp_path / "source"), tmp_path / "straight")) == expected


def test_its_commands_are_those_that_are_documented(bin_dir: Path, tmp_path: Path) -> None:
    page = tmp_path / "cli.md"
    page.write_text(reference.MARK)
    run(bin_dir, tmp_path, "python", "-m", "agentstate.cli.reference", str(page))
    assert page.read_text() == (ROOT / "docs/cli.md").read_text()[-len(page.read_text()) :]
    assert "agentstate serve" in page.read_text()
    assert "serve" in run(bin_dir, tmp_path, "agentstate", "--help")


def test_its_benchmarks_have_their_data(bin_dir: Path, tmp_path: Path) -> None:
    report = tmp_path / "result.json"
    run(bin_dir, tmp_path, "agentstate", "bench", "project", "--json", str(report))
    result = json.loads(report.read_text())
    assert result["commit"] == "release" and result["rows"]


@dataclass
class Installation:
    """What a user has who installed the wheel: its programs and a home. ``url`` is where the service will be."""

    bin_dir: Path
    home: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, *command: str) -> str:
        return run(self.bin_dir, self.home, *command, AGENTSTATE_URL=self.url)

    @contextmanager
    def service(self) -> Iterator[None]:
        environment = outside(AGENTSTATE_HOME=str(self.home), AGENTSTATE_PORT=str(self.port))
        # Started where the user is, since Python would find the checkout in its own directory.
        command = ["env", "-C", str(self.home), str(self.bin_dir / "agentstate"), "serve"]
        service = ChildProcess(command, environment, self.home / "service.log")
        try:
            service.await_answer(f"{self.url}/readyz", PATIENCE_S)
            yield
        finally:
            service.kill()


def run(bin_dir: Path, home: Path, program: str, *arguments: str, **settings: str) -> str:
    """What a program of the installation prints, started in ``home``."""
    ran = subprocess.run(
        [str(bin_dir / program), *arguments],
        cwd=home,
        env=outside(AGENTSTATE_HOME=str(home), **settings),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture
def installation(bin_dir: Path, tmp_path: Path) -> Installation:
    return Installation(bin_dir, tmp_path, free_port())


def test_a_session_is_kept_and_looked_at(installation: Installation) -> None:
    with installation.service(), Client(installation.url, timeout_s=PATIENCE_S) as client:
        client.create_session(MODEL, id="looked-at")
        (listed,) = json.loads(installation.run("agentstate", "sessions", "ls", "--json"))
        assert (listed["id"], listed["model"]) == ("looked-at", MODEL)
        assert "looked-at" in installation.run("agentstate", "sessions", "show", "looked-at")
    installation.run("agentstate", "pages", "ls")


def test_every_page_of_the_console_is_served(installation: Installation) -> None:
    """With all that pages load beside themselves, to an administrator who signs in."""
    installation.run("agentstate", "db", "upgrade")
    secret = installation.run("agentstate", "keys", "create", "--role", "admin").split()[0]
    (key,) = json.loads(installation.run("agentstate", "keys", "list", "--json"))
    database = Database(Settings(home=installation.home).sqlalchemy_url)
    engine = register(database, f"tcp://127.0.0.1:{free_port()}")
    database.close()
    with installation.service():
        with Client(installation.url, api_key=secret, timeout_s=PATIENCE_S) as client:
            session = client.create_session(MODEL, id="shown")
            client.append(session.id, client.resume(session.id).lease, [message({"role": "user", "content": "hello"})])
        values = {"session_id": session.id, "seq": "1", "action": "fork", "kind": "csv", "engine_id": engine.id}
        paths = {path.format(**values, key_id=key["id"]) for path in console_pages()}
        loaded = set()
        with httpx.Client(base_url=installation.url, timeout=PATIENCE_S, follow_redirects=True) as http:
            form = http.get("/sign-in").text
            (token,) = re.findall(r'name="csrf" value="([0-9a-f]+)"', form)
            same = {"Sec-Fetch-Site": "same-origin"}
            assert "(admin)" in http.post("/sign-in", data={"key": secret, "csrf": token}, headers=same).text
            for path in sorted(paths):
                answer = http.get(path)
                assert answer.status_code == 200, f"{path}: {answer.text}"
                if answer.headers["content-type"].startswith("text/html"):
                    assert "</html>" in answer.text, path
                    loaded |= set(re.findall(rf'(?:src|href)="({assets.PATH}[^"]+)"', answer.text))
            assert {path.rpartition(".")[2] for path in loaded} == {"css", "js", "svg"}
            for path in (*loaded, "/docs", "/openapi.json"):
                assert http.get(path).is_success, path
            with http.stream("GET", "/console/stream") as stream:
                assert next(stream.iter_lines())


def console_pages() -> set[str]:
    """The routes of all pages and files, but for what pages load."""
    found = {
        route.path
        for part in routes.PARTS
        for route in part.router.routes
        if isinstance(route, APIRoute) and "GET" in route.methods
    }
    return found - {f"{assets.PATH}{{name}}", "/console/stream"}
