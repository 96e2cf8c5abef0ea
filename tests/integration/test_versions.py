"""This release beside the last one, on one database, one wire and one page directory: they work, or one of them refuses
in one sentence. `tests/releases` has the last release; CONTRIBUTING says when it is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contents import MHA, expected, keys, read, reader_for, write
from last_release_path import last_release
from stage import PATIENCE_S, serving

from agentstate.errors import EngineUnreachable
from agentstate.fleet import engines, manifests
from agentstate.fleet.control import ControlClient
from agentstate.fleet.engines import Engine
from agentstate.pages import PageStore
from agentstate.pages.extent import Geometry
from agentstate.pages.testing import pages
from agentstate.settings import Settings
from agentstate.sql.database import Database
from engine_patch.catalog import Catalog
from engine_patch.control import ControlEndpoint

MARK = b"m" * 32
PLAYER = Path(__file__).with_name("last_release.py")


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return last_release(tmp_path_factory.mktemp("release"))


class Old:
    """A process of the last release that does what it is told."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def __call__(self, verb: str, *arguments: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([verb, *map(str, arguments)]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the last release has ended"
        return json.loads(line)


def environment(release: Path, **settings: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(release), "PYTHONSAFEPATH": "1", **settings}


@contextmanager
def old(release: Path, url: str) -> Iterator[Old]:
    command = [sys.executable, str(PLAYER), url]
    with subprocess.Popen(
        command, env=environment(release), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Old(process)
        finally:
            process.kill()


def test_an_engine_of_the_last_release_goes_on_over_the_migration(
    release: Path, empty_url: str, tmp_path: Path
) -> None:
    with old(release, empty_url) as rank:
        rank("upgrade")
        rank("start")
        assert rank("save", "ses_before")
        database = Database(empty_url)
        database.upgrade()
        with serving(Settings(home=tmp_path, database_url=empty_url)) as service:
            client = service.client
            session = client.create_session("m")
            turn = client.resume(session.id)
            assert turn.engine is not None
            # It would take a token for a part of the id.
            assert turn.engine.extra_body == {"session_id": session.id}
            assert rank("save", session.id)
            suspended = client.suspend(session.id, turn.lease, durable_timeout_ms=60_000)
            assert (suspended.kv.state, suspended.kv.tokens) == ("durable", 128)
            again = client.resume(session.id)
            assert (again.kv.state, again.kv.tokens, again.kv.valid) == ("durable", 128, True)
        with database.read() as connection:
            found = {one.session_id: one.tokens for one in manifests.coverage(connection, ["ses_before", session.id])}
            assert found == {"ses_before": 128, session.id: 128}
        rank("close")
        with database.read() as connection:
            assert engines.registered(connection) == []
        database.close()


def test_an_engine_of_the_last_release_does_not_join_afterwards(release: Path, empty_url: str) -> None:
    database = Database(empty_url)
    database.upgrade()
    with old(release, empty_url) as rank:
        rank("start")
        (line,) = rank("said")
        assert "does not know: upgrade AgentState" in line
        with database.read() as connection:
            assert engines.registered(connection) == []
    database.close()


def test_an_engine_of_this_release_waits_for_the_migration(
    release: Path, empty_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with old(release, empty_url) as rank:
        rank("upgrade")
    database = Database(empty_url)
    failed = threading.Event()
    engine = Engine("eng_new", "n1", 0, "tcp://127.0.0.1:1", "http://127.0.0.1:30000/v1", "m", "f1", "/pages")
    answers: dict[str, Any] = {"saved": list, "refused": list, "needed": list, "stored": len, "held": list}
    catalog = Catalog(database, engine, 0.05, losers=set, dead=list, n_bytes=int, **answers)
    for _ in range(PATIENCE_S * 20):
        if "agentstate db upgrade" in caplog.text:
            break
        failed.wait(0.05)
    catalog.close()
    database.close()
    (line,) = {record.getMessage() for record in caplog.records if record.name == "engine_patch.catalog"}
    assert "run `agentstate db upgrade`" in line


@pytest.mark.parametrize("command", ["serve", "db upgrade", "keys list"])
def test_a_service_of_the_last_release_refuses_in_one_sentence(
    release: Path, empty_url: str, tmp_path: Path, command: str
) -> None:
    database = Database(empty_url)
    database.upgrade()
    database.close()
    found = subprocess.run(
        [sys.executable, "-m", "agentstate.cli", *command.split()],
        env=environment(release, AGENTSTATE_DATABASE_URL=empty_url, AGENTSTATE_HOME=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert found.returncode != 0
    assert "upgrade AgentState" in found.stderr + found.stdout
    assert "Traceback" not in found.stderr


def test_a_service_of_the_last_release_does_not_reach_an_engine_of_this_one(release: Path) -> None:
    class Rank:
        def tick(self) -> None: ...

    endpoint = ControlEndpoint("tcp://127.0.0.1:*", Rank())  # type: ignore[arg-type]
    endpoint.serve()
    # What the last release's client does: no secret.
    with pytest.raises(EngineUnreachable, match="did not answer 'stat'"):
        ControlClient(endpoint.address, None).call("stat", 0.3)
    endpoint.close()


def last_content(geometry: Geometry, page: bytes, layer: int, component: int, version: int = 0) -> bytes:
    """What the pages of the last release's tests hold."""
    seed = int.from_bytes(page[:8], "little")
    return np.random.default_rng([seed, layer, component, version]).bytes(geometry.component_bytes[component])


def test_pages_of_the_last_release_are_restored_and_it_restores_those_of_this_one(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "content", last_content)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    with old(release, f"sqlite:///{tmp_path / 'unused.db'}") as rank:
        rank("write", theirs, "a", "b", "c")
        store, reader = PageStore(theirs, MARK, MHA), reader_for(MHA)
        with store.pin(keys("a", "b", "c")) as pin:
            assert len(pin.keys) == 3
            assert read(reader, [pin]) == expected(MHA, [pin])
        write(store, keys("d"))
        store.close()
        reader.close()
        store = PageStore(ours, MARK, MHA)
        write(store, keys("x", "y"))
        write(store, keys("z"), owner="tenant a")
        # It does not know where the pages of this one are, and leaves it alone.
        many, owner = [f"of {number}" for number in range(55)], "tenant " + "b" * 1000
        assert store.draft_bytes(55, owner) > store.draft_bytes(55)
        write(store, keys(*many), owner=owner)
        store.close()
        assert rank("right", ours, "x", "y", "z")
        assert rank("right", theirs, "a", "b", "c", "d")
        rank("write", ours, "theirs")
        store, reader = PageStore(ours, MARK, MHA), reader_for(MHA)
        with store.pin(keys("x", "y", "z", "theirs", *many)) as pin:
            assert [segment.extent.owner for segment in pin.segments] == ["", "tenant a", "", owner]
            assert read(reader, [pin]) == expected(MHA, [pin])
        store.close()
        reader.close()
