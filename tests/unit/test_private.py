"""Nobody but their user may read what agents said, nor the KV that reveals it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from contents import MARK, MHA, keys, write

from agentstate.cli.launcher import require_page_directory
from agentstate.cli.local import spawn
from agentstate.pages import PageStore
from agentstate.pages.node import node_id
from agentstate.private import close_to_others, make_directory, make_file
from agentstate.sql.database import Database


@pytest.fixture(autouse=True)
def generous_umask() -> Iterator[None]:
    with umask(0):
        yield


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def open_to_others(root: Path) -> list[str]:
    """What below a directory others may do anything with, the directory with it."""
    return sorted(str(path) for path in (root, *root.rglob("*")) if stat.S_IMODE(path.stat().st_mode) & 0o077)


def test_pages_their_index_and_their_lock(tmp_path: Path) -> None:
    root = tmp_path / "pages"
    require_page_directory(root)
    store = PageStore(root / ("0" * 32) / "rank0", MARK, MHA)
    node_id(root)
    write(store, keys(1, 2))
    write(store, keys(3))
    assert list(root.rglob("*.ext"))
    assert list(root.rglob("data.mdb"))
    assert open_to_others(root) == []
    store.close()
    assert open_to_others(root) == []


def test_a_store_of_an_earlier_release_is_closed_to_others(tmp_path: Path) -> None:
    directory = tmp_path / "rank0"
    store = PageStore(directory, MARK, MHA)
    store.close()
    directory.chmod(0o755)
    PageStore(directory, MARK, MHA).close()
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_the_database_and_the_files_beside_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    database = Database(f"sqlite:///{home / 'agentstate.db'}")
    database.upgrade()
    with database.read() as connection:
        connection.exec_driver_sql("SELECT 1")
        assert len(list(home.iterdir())) > 1
        assert open_to_others(home) == []
    database.close()


def test_a_database_of_an_earlier_release_is_closed_to_others(tmp_path: Path) -> None:
    path = tmp_path / "agentstate.db"
    path.touch(0o644)
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_log_of_a_child(tmp_path: Path) -> None:
    assert spawn(["true"], dict(os.environ), tmp_path / "child.log").wait() == 0
    assert stat.S_IMODE((tmp_path / "child.log").stat().st_mode) == 0o600


def test_what_an_operator_shares_stays_shared(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o750)
    make_directory(shared)
    make_directory(shared / "a" / "b")
    assert stat.S_IMODE(shared.stat().st_mode) == 0o750
    assert open_to_others(shared / "a") == []


def test_only_others_lose_what_they_may_do(tmp_path: Path) -> None:
    file = tmp_path / "file"
    make_file(file)
    file.chmod(0o474)
    close_to_others(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o400
