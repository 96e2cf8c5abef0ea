"""`agentstate pages`, as a user calls it: tables for people, JSON for programs, one line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from contents import MARK, MHA, keys, write
from documented import checked
from typer.testing import CliRunner, Result

from agentstate.cli.main import app
from agentstate.errors import PageStoreLocked, SchemaOutdated, SettingsError
from agentstate.fleet import manifests
from agentstate.fleet.manifests import Manifest
from agentstate.pages import PageStore
from agentstate.pages.files import read_header
from agentstate.pages.wear import Wear, file_of
from agentstate.settings import Settings
from agentstate.sql.database import Database


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGENTSTATE_HOME", str(tmp_path))
    monkeypatch.setenv("AGENTSTATE_DATABASE_URL", "")
    monkeypatch.setenv("AGENTSTATE_PAGES_DIR", "")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def store(home: Path) -> Path:
    """Three extents: the pages 1 to 3, 4, and 5 to 6."""
    directory = home / "pages" / MARK.hex()[:32] / "rank1"
    store = PageStore(directory, MARK, MHA)
    for names in ((1, 2, 3), (4,), (5, 6)):
        write(store, keys(*names))
    store.close()
    return directory


@pytest.fixture
def database(home: Path) -> Iterator[Database]:
    database = Database(Settings().sqlalchemy_url)
    database.upgrade()
    yield database
    database.close()


def save(
    database: Database,
    session: str,
    pages: list[bytes],
    *,
    fingerprint: str = MARK.hex(),
    rank: int = 1,
    node: str = "node",
) -> None:
    tokens = MHA.page_size * len(pages)
    with database.write() as connection:
        manifests.save(
            connection,
            Manifest(session, fingerprint, rank, node, "eng", MHA.page_size, tokens, b"".join(pages), 1),
        )


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["pages", *arguments])


def answer(*arguments: str, exit_code: int = 0) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    shared = " --shared" if "--shared" in arguments else ""
    return checked(f"pages {arguments[0]}{shared}", json.loads(result.stdout))


def extents(store: Path) -> list[int]:
    return sorted(int(path.stem, 16) for path in (store / "extents").iterdir())


def flip(store: Path, number: int) -> None:
    path = store / "extents" / f"{number:016x}.ext"
    raw = bytearray(path.read_bytes())
    raw[-500] ^= 1  # the last page in the last layer, before the padding
    path.write_bytes(raw)


def test_ls_counts_what_is_stored(store: Path) -> None:
    (row,) = answer("ls")
    assert (row["fingerprint"], row["rank"]) == (MARK.hex()[:32], "rank1")
    assert (row["extents"], row["pages"], row["tokens"], row["unreadable"]) == (3, 6, 24, 0)
    assert row["bytes"] == sum(path.stat().st_size for path in (store / "extents").iterdir())
    assert f"{row['bytes']:,}" in run("ls").stdout


def test_ls_and_show_say_whose_extents_are(home: Path, store: Path) -> None:
    again = PageStore(store, MARK, MHA)
    write(again, keys(7, 8), owner="tenant a")
    n_bytes = again.draft_bytes(2, "tenant a")
    again.close()
    (row,) = answer("ls")
    assert row["owners"] == {"none": row["bytes"] - n_bytes, "tenant a": n_bytes}
    assert (row["others"], row["others_bytes"]) == (0, 0)
    assert f"tenant a {n_bytes:,}" in run("ls").stdout
    assert [answer("show", number)[0]["owner"] for number in ("1", "4")] == ["none", "tenant a"]


def test_ls_names_the_largest_owners_only(home: Path, store: Path) -> None:
    again = PageStore(store, MARK, MHA)
    for number in range(66):
        write(again, keys((number, 1)), owner=f"tenant {number:02}")
    each = again.draft_bytes(1, "tenant 00")
    again.close()
    (row,) = answer("ls")
    assert list(row["owners"]) == ["none", *(f"tenant {number:02}" for number in range(63))]
    assert (row["others"], row["others_bytes"]) == (3, 3 * each)
    assert f"3 others {3 * each:,}" in run("ls").stdout


def test_du_says_how_much_is_written_a_day(home: Path, store: Path) -> None:
    for rank in range(2):
        wear = Wear(file_of(home / "pages", rank))
        wear.wrote(1_000_000 + rank)
        wear.save()
    assert answer("du")["written_bytes_day"] == 2_000_001
    assert "2,000,001 bytes" in run("du").stdout


def test_an_empty_directory_is_no_error(home: Path) -> None:
    assert answer("ls") == []
    assert answer("du") == {"stores": [], "disk_free_fraction": None, "written_bytes_day": 0}
    assert "no pages" in run("ls").stdout
    assert answer("check")["extents"] == 0


def test_show_an_extent_and_a_page(store: Path) -> None:
    (extent,) = answer("show", "1")
    assert (extent["pages"], extent["page_size"], extent["layers"]) == (3, MHA.page_size, MHA.layers)
    assert extent["component_bytes"] == list(MHA.component_bytes)
    assert extent["keys"] == [key.hex() for key in keys(1, 2, 3)]
    assert extent["bytes"] == extent["data_offset"] + MHA.layers * extent["slab_bytes"]
    assert extent["codec"] == "raw"
    name = keys(6)[0].hex()
    (page,) = answer("show", name[:10].upper())
    assert (page["key"], page["slot"], page["extent"]) == (name, 1, str(store / "extents" / f"{3:016x}.ext"))
    assert name in run("show", name).stdout


def test_show_and_du_of_coded_extents(home: Path) -> None:
    directory = home / "pages" / MARK.hex()[:32] / "rank0"
    store = PageStore(directory, MARK, MHA, codec="lossless")
    write(store, keys(1, 2, 3))
    store.close()
    (page,) = answer("show", keys(2)[0].hex())
    header = read_header(Path(page["extent"]))
    assert (page["codec"], page["slot"], page["bytes"]) == ("lossless", 1, header.file_bytes)
    assert page["offset_in_layer_0"] == header.component_range(0, 0, 1, 1)[0] and "slab_bytes" not in page
    (usage,) = answer("du")["stores"]
    assert usage["live"] + usage["overhead"] == page["bytes"] and usage["live"] < 3 * MHA.page_bytes
    assert answer("check")["broken"] == []


def test_show_says_what_is_wrong_with_an_extent(store: Path) -> None:
    (store / "extents" / f"{2:016x}.ext").write_bytes(b"AGSEXTNT")
    (extent,) = answer("show", "2")
    assert "shorter" in extent["damage"]


def test_show_finds_nothing(store: Path) -> None:
    assert answer("show", "ff", exit_code=1) == []
    assert "8 digits" in run("show", keys(6)[0].hex()[:7]).stdout


def test_du_splits_the_bytes(store: Path) -> None:
    again = PageStore(store, MARK, MHA)
    write(again, keys(2, 3))
    again.close()
    found = answer("du")
    (row,) = found["stores"]
    assert (row["live"], row["superseded"]) == (6 * MHA.page_bytes, 2 * MHA.page_bytes)
    parts = ("live", "superseded", "unreadable", "partial", "index", "overhead")
    assert row["total"] == sum(row[part] for part in parts)
    assert 0 <= found["disk_free_fraction"] <= 1
    assert "of the disk is free" in run("du").stdout


def test_check_and_repair(store: Path) -> None:
    flip(store, 3)
    found = answer("check", exit_code=1)
    assert [item["broken_pages"] for item in found["broken"]] == [[keys(6)[0].hex()]]
    assert found["extents"] == 3
    assert keys(6)[0].hex() in run("check").stdout
    assert answer("check", "--repair")["pages_dropped"] == 1
    assert answer("check")["broken"] == []


def test_gc_keeps_what_a_manifest_needs(store: Path, database: Database) -> None:
    save(database, "a", keys(1))
    save(database, "b", keys(1, 4))
    save(database, "other", keys(5), rank=0)
    planned = answer("gc", "--dry-run")
    assert extents(store) == [1, 2, 3]
    done = answer("gc")
    assert extents(store) == [1, 2]
    assert planned["stores"] == done["stores"]
    assert [(row["extents"], row["pages"]) for row in done["stores"]] == [(1, 2)]
    assert answer("gc")["stores"][0]["extents"] == 0


def test_gc_deletes_the_manifests_of_stores_that_are_gone(home: Path, store: Path, database: Database) -> None:
    (home / "pages" / "node").write_text("pod_01k8\n")
    save(database, "a", keys(1))
    for fingerprint, rank, at in [
        (MARK.hex(), 1, "pod_01k8"),
        (MARK.hex(), 0, "pod_01k8"),
        ("d" * 64, 1, "pod_01k8"),
        ("d" * 64, 1, "another_01k8"),
    ]:
        save(database, "b", keys(1), fingerprint=fingerprint, rank=rank, node=at)
    left = {(MARK.hex(), 1, "node"), (MARK.hex(), 1, "pod_01k8"), ("d" * 64, 1, "another_01k8")}
    assert answer("gc", "--dry-run")["dead_manifests"] == 2
    assert len(saved(database, "b")) == 4
    assert "2 manifests" in run("gc").stdout
    assert saved(database, "a", "b") == left
    assert answer("gc")["dead_manifests"] == 0


def saved(database: Database, *sessions: str) -> set[tuple[str, int, str]]:
    with database.read() as connection:
        found = manifests.coverage(connection, sessions)
    return {(one.fingerprint, one.rank, one.node) for one in found}


def test_gc_leaves_what_it_cannot_read_to_repair(store: Path, database: Database) -> None:
    save(database, "a", keys(1))
    (store / "extents" / f"{2:016x}.ext").write_bytes(b"")
    answer("gc")
    assert extents(store) == [1, 2]


def test_gc_goes_by_no_database_that_knows_none_of_the_stores(store: Path, database: Database) -> None:
    save(database, "a", keys(1), fingerprint="00" * 32)
    result = run("gc")
    assert isinstance(result.exception, SettingsError)
    assert "AGENTSTATE_DATABASE_URL" in str(result.exception)
    assert extents(store) == [1, 2, 3]


def test_gc_goes_by_no_database_that_was_never_made(store: Path) -> None:
    assert isinstance(run("gc").exception, SchemaOutdated)
    assert extents(store) == [1, 2, 3]


def test_gc_is_refused_beside_an_engine_and_a_dry_run_is_not(store: Path, database: Database) -> None:
    save(database, "a", keys(1))
    engine = PageStore(store, MARK, MHA)
    assert answer("gc", "--dry-run")["stores"][0]["extents"] == 2
    result = run("gc", "--json")
    engine.close()
    assert isinstance(result.exception, PageStoreLocked)
    assert str(store) in str(result.exception)
    assert json.loads(result.stdout)["in_use"] == [str(store)]
    assert extents(store) == [1, 2, 3]


@pytest.mark.parametrize("command", [["ls"], ["du"], ["show", "1"], ["check"]], ids=" ".join)
def test_readers_are_never_refused_beside_an_engine(store: Path, command: list[str]) -> None:
    alone = answer(*command)
    engine = PageStore(store, MARK, MHA)
    # A process of its own: the lock is between processes.
    beside = subprocess.run(
        [sys.executable, "-m", "agentstate.cli", "pages", *command, "--json"], capture_output=True, text=True
    )
    engine.close()
    assert beside.returncode == 0, beside.stderr
    found = json.loads(beside.stdout)
    for one in (found, alone):
        # Others write to the disk, too.
        if isinstance(one, dict):
            one.pop("disk_free_fraction", None)
    assert found == alone
    assert extents(store) == [1, 2, 3]
