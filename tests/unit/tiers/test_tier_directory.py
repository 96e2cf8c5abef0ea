"""What only a directory can suffer."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crashes
import pytest

from agentstate.errors import TierMissing, TierRefused, TierUnavailable
from agentstate.tiers import DirectoryTier, Range, directory
from agentstate.tiers.testing.conformance import (
    PATIENCE_S,
    content,
    file_of,
    name_of,
    names,
    publish,
    read,
)

ROOT = Path(__file__).parents[3]
DATA = content(1, 300_000)
NAME = name_of(DATA)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "share"
    root.mkdir()
    return root


@pytest.fixture
def tier(root: Path) -> Iterator[DirectoryTier]:
    with DirectoryTier(root) as tier:
        yield tier


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob(".*") if path.name != directory.MARK]


def test_a_writer_that_dies_before_any_call_leaves_all_or_nothing(tmp_path: Path) -> None:
    there, left, step = [], [], 0
    while True:
        step += 1
        root = tmp_path / f"{step:02d}"
        root.mkdir()
        calls, died = crashes.die(root, NAME, DATA, step)
        left.append(len(leftovers(root)))
        with DirectoryTier(root) as tier:
            there.append(names(tier) == [NAME])
            assert names(tier) == [NAME] * there[-1]
            if there[-1]:
                assert read(tier, NAME, 0, len(DATA)) == DATA
            # Whoever comes next publishes it, and cleans up what the dead one has left.
            assert publish(tier, DATA) == (NAME, not there[-1])
            assert read(tier, NAME, 0, len(DATA)) == DATA
            assert tier.sweep(-1).result(PATIENCE_S) == left[-1]
            assert leftovers(root) == []
        if not died:
            break
    # It is there from the link on: what comes after is unlinking the other name, and syncing the directory.
    assert there == sorted(there) and there[0] is False and there[-1] is True
    assert set(left) == {0, 1} and left[-1] == 0
    assert calls.index("link") == there.index(True) - 1
    assert calls[calls.index("link") - 2 :] == ["fsync", "close", "link", "unlink", "open", "fsync", "close"]


def test_an_extent_is_synced_before_it_has_its_name_and_its_directories_before_it_is_acknowledged(root: Path) -> None:
    calls, _ = crashes.die(root, NAME, DATA, 10_000)
    # Three directories are made, each is synced in the one above; then the file, and at last its directory.
    assert calls.count("mkdir") == 3 and calls.count("fsync") == 5
    assert calls.index("copy_file_range") < calls.index("link") < len(calls) - 3


def test_one_who_finds_it_there_syncs_the_directory_all_the_same(root: Path) -> None:
    crashes.die(root, NAME, DATA, 10_000)
    calls, _ = crashes.die(root, NAME, DATA, 10_000)
    assert not {"write", "copy_file_range"} & set(calls) and calls[-2:] == ["fsync", "close"]


def test_what_dead_writers_left_is_swept_by_its_age_and_what_live_ones_write_is_written_again(
    root: Path, tier: DirectoryTier
) -> None:
    for step in range(1, 40):
        crashes.die(root, NAME, DATA, step)
        if leftovers(root):
            break
    (left,) = leftovers(root)
    os.utime(left, (time.time() - 7200,) * 2)
    assert tier.sweep(3 * 3600).result(PATIENCE_S) == 0
    assert tier.sweep(3600).result(PATIENCE_S) == 1
    assert leftovers(root) == []


def test_a_writer_whose_file_is_swept_begins_again(
    root: Path, tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, swept = os.link, []

    def link(source: Path, target: Path) -> None:
        if not swept and target.name != directory.MARK:
            swept.append(source)
            os.unlink(source)
        real(source, target)

    monkeypatch.setattr(directory.os, "link", link)
    assert publish(tier, DATA) == (NAME, True)
    assert read(tier, NAME, 0, len(DATA)) == DATA and swept and leftovers(root) == []


def test_without_links_a_file_gets_its_name_by_a_rename(
    root: Path, tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(directory.os, "link", link)
    assert publish(tier, DATA) == (NAME, True)
    assert publish(tier, DATA) == (NAME, False)
    assert read(tier, NAME, 0, len(DATA)) == DATA and leftovers(root) == []


@pytest.mark.parametrize(
    "number, kind, word",
    [
        (errno.ENOSPC, TierRefused, "full"),
        (errno.EDQUOT, TierRefused, "full"),
        (errno.EROFS, TierRefused, "read-only"),
        (errno.EACCES, TierRefused, "access"),
        (errno.EIO, TierUnavailable, "Input/output"),
        (errno.ETIMEDOUT, TierUnavailable, "timed out"),
    ],
)
@pytest.mark.parametrize("call", ["mkdir", "copy_file_range and write", "fsync", "link"])
def test_a_call_that_fails_says_what_to_do_and_leaves_nothing(
    root: Path,
    tier: DirectoryTier,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    number: int,
    kind: type[Exception],
    word: str,
) -> None:
    publish(tier, content(2))

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    data = content(3)
    name = name_of(data, bytes([7]) * 32)
    with monkeypatch.context() as failing, file_of(data) as file:
        for one in call.split(" and "):
            failing.setattr(directory.os, one, fail)
        with pytest.raises(kind, match=word):
            tier.publish(name, file).result(PATIENCE_S)
    assert names(tier) == [name_of(content(2))] and leftovers(root) == []
    assert publish(tier, data, name) == (name, True)


def test_what_the_kernel_does_not_copy_is_written(
    root: Path, tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = os.copy_file_range, []

    def copy_file_range(source: int, target: int, count: int, offset: int) -> int:
        asked.append(offset)
        if len(asked) > 1:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return real(source, target, 1000, offset)

    monkeypatch.setattr(directory.os, "copy_file_range", copy_file_range)
    assert publish(tier, DATA, trailer=b"behind it") == (NAME, True)
    assert asked[:2] == [0, 1000]
    assert read(tier, NAME, 0, len(DATA) + 9) == DATA + b"behind it"


def test_a_file_that_went_stale_is_opened_again_and_missing_if_it_is_gone(
    root: Path, tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tier, DATA)
    real, stale = os.preadv, []

    def preadv(fd: int, into: Any, offset: int) -> int:
        if not stale:
            stale.append(fd)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(fd, into, offset)

    monkeypatch.setattr(directory.os, "preadv", preadv)
    assert read(tier, NAME, 0, len(DATA)) == DATA
    stale.clear()
    (root / NAME).unlink()
    with pytest.raises(TierMissing):
        read(tier, NAME, 0, len(DATA))


def test_a_share_that_is_not_mounted_misses_nothing_and_is_not_written_to(tmp_path: Path) -> None:
    root = tmp_path / "share"
    tier = DirectoryTier(root)
    for attempt in (lambda: read(tier, NAME, 0, 1), lambda: publish(tier, DATA), lambda: names(tier)):
        with pytest.raises(TierUnavailable, match="mounted"):
            attempt()
    root.mkdir()
    assert publish(tier, DATA) == (NAME, True)
    # It may be marked while it is open.
    with DirectoryTier(root) as other:
        other.mark("a mark").result(PATIENCE_S)
    assert names(tier) == [NAME]
    # The mount goes away, and the directory that it was mounted on is seen.
    root.rename(tmp_path / "elsewhere")
    root.mkdir()
    for attempt in (
        lambda: read(tier, NAME, 0, 1),
        lambda: publish(tier, content(2)),
        lambda: names(tier),
        lambda: tier.drop(NAME).result(PATIENCE_S),
    ):
        with pytest.raises(TierUnavailable, match="mounted"):
            attempt()
    assert list(root.iterdir()) == []
    shutil.rmtree(root)
    (tmp_path / "elsewhere").rename(root)
    assert read(tier, NAME, 0, len(DATA)) == DATA
    tier.close()


def test_a_share_that_is_mounted_anew_is_the_same(tmp_path: Path) -> None:
    """Its device may have another number then."""
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system to write to")
    (tmp_path / "first").mkdir()
    root = tmp_path / "share"
    root.symlink_to(tmp_path / "first")
    with DirectoryTier(root) as tier, tempfile.TemporaryDirectory(dir=memory) as other:
        tier.mark("a mark").result(PATIENCE_S)
        publish(tier, DATA)
        shutil.copytree(tmp_path / "first", other, dirs_exist_ok=True)
        root.unlink()
        root.symlink_to(other)
        assert read(tier, NAME, 0, len(DATA)) == DATA
        assert publish(tier, content(2))[1]
        with pytest.raises(TierMissing):
            read(tier, name_of(content(3)), 0, 1)


def test_nothing_is_acknowledged_if_the_share_goes_away_while_it_is_published(
    root: Path, tier: DirectoryTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier.mark("a mark").result(PATIENCE_S)
    publish(tier, content(2))
    real = os.mkdir

    def mkdir(path: Path, mode: int) -> None:
        if root.exists() and not (root.parent / "elsewhere").exists():
            root.rename(root.parent / "elsewhere")
            root.mkdir()
        real(path, mode)

    monkeypatch.setattr(directory.os, "mkdir", mkdir)
    with pytest.raises(TierUnavailable, match="mounted"):
        publish(tier, DATA, name_of(DATA, bytes([7]) * 32))


def test_files_and_directories_are_their_users_alone(root: Path, tier: DirectoryTier) -> None:
    publish(tier, DATA)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*") if path.is_file()}
    assert modes == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*") if path.is_dir()} == {0o700}


def test_reads_that_hang_in_a_dead_mount_write_nowhere_when_it_comes_back(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And neither closing the tier nor ending the process waits for them."""
    data = content(4, 3_000_000)
    tier = DirectoryTier(root, threads=2)
    publish(tier, data)
    real, hanging, back, came_back = os.preadv, threading.Semaphore(0), threading.Event(), threading.Semaphore(0)

    def preadv(fd: int, into: Any, offset: int) -> int:
        hanging.release()
        assert back.wait(PATIENCE_S)
        got = real(fd, into, offset)
        came_back.release()
        return got

    monkeypatch.setattr(directory.os, "preadv", preadv)
    memory = [bytearray(len(data)) for _ in range(4)]
    readings = [tier.read(name_of(data), [Range(0, memoryview(into))]) for into in memory]
    for _ in range(2):
        assert hanging.acquire(timeout=PATIENCE_S)
    assert all(reading.cancel() for reading in readings[:3])
    tier.close()
    assert isinstance(readings[3].exception(PATIENCE_S), TierUnavailable)
    back.set()
    for _ in range(2):
        assert came_back.acquire(timeout=PATIENCE_S)
    for thread in tier._workers._threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert all(into == bytes(len(data)) for into in memory)


def test_a_read_that_is_under_way_when_the_tier_is_closed_writes_nothing_after_it_has_failed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails because part of it was not begun; the part that was comes back later."""
    data = content(4, 20_000_000)
    tier = DirectoryTier(root, threads=1)
    publish(tier, data)
    real, hanging, back = os.preadv, threading.Event(), threading.Event()

    def preadv(fd: int, into: Any, offset: int) -> int:
        hanging.set()
        assert back.wait(PATIENCE_S)
        return real(fd, into, offset)

    monkeypatch.setattr(directory.os, "preadv", preadv)
    into = bytearray(len(data))
    reading = tier.read(name_of(data), [Range(0, memoryview(into))])
    assert hanging.wait(PATIENCE_S)
    tier.close()
    assert isinstance(reading.exception(0), TierUnavailable)
    back.set()
    for thread in tier._workers._threads:
        thread.join(PATIENCE_S)
    assert into == bytes(len(data))
    assert not [link for link in map(_open_file, os.listdir("/proc/self/fd")) if link.startswith(str(root))]


def _open_file(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


PROCESS = """
import sys
from pathlib import Path
from agentstate.tiers import tier
from agentstate.tiers.testing.conformance import content, names, publish, read, name_of
first, last = int(sys.argv[2]), int(sys.argv[3])
with tier(sys.argv[1]) as shared:
    news = [publish(shared, content(number))[1] for number in range(first, last)]
    for name in names(shared):
        read(shared, name, 0, 50_000)
print(sum(news))
"""


def run_two(url: str, environment: dict[str, str]) -> list[int]:
    """Two processes publish an overlapping part of the same extents at once: how many were new to each."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, url, str(first), str(first + 20)],
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in (0, 10)
    ]
    printed = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [int(line) for line in printed]


def test_two_processes_share_a_directory(root: Path, tier: DirectoryTier) -> None:
    assert sum(run_two(f"file://{root}", {})) == 30
    assert names(tier) == sorted(name_of(content(number)) for number in range(30))
    for number in range(30):
        assert read(tier, name_of(content(number)), 0, 50_000) == content(number)
    assert leftovers(root) == []


def test_a_full_mount_refuses_and_keeps_what_it_has(small: Path) -> None:
    with DirectoryTier(small) as tier:
        first, large = content(5, 500_000), content(6, 3_000_000)
        publish(tier, first)
        with pytest.raises(TierRefused, match="full"):
            publish(tier, large)
        assert names(tier) == [name_of(first)] and leftovers(small) == []
        assert read(tier, name_of(first), 0, len(first)) == first
        assert publish(tier, content(7, 500_000))[1]


def test_a_read_only_mount_is_read(small: Path) -> None:
    with DirectoryTier(small) as tier:
        publish(tier, DATA)
    subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
    with DirectoryTier(small) as tier:
        assert read(tier, NAME, 0, len(DATA)) == DATA
        assert publish(tier, DATA) == (NAME, False)
        with pytest.raises(TierRefused, match="read-only"):
            publish(tier, content(8))
        with pytest.raises(TierRefused, match="read-only"):
            tier.drop(NAME).result(PATIENCE_S)


def test_a_mount_that_is_taken_away_is_noticed(small: Path) -> None:
    with DirectoryTier(small) as tier:
        publish(tier, DATA)
        subprocess.run(["umount", "-l", str(small)], check=True)
        try:
            with pytest.raises(TierUnavailable, match="mounted"):
                read(tier, NAME, 0, 1)
            with pytest.raises(TierUnavailable, match="mounted"):
                publish(tier, content(9))
        finally:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(small)], check=True)
