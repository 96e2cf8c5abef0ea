from __future__ import annotations

import os
import shutil
import socket
import threading
from pathlib import Path

import pytest
from contents import MARK, MLA, keys, write

from agentstate.pages import PageStore, Space
from agentstate.pages.node import dp_roots, node_id, of_dp_rank


def renamed(patch: pytest.MonkeyPatch, name: str) -> None:
    patch.setattr(socket, "gethostname", lambda: name)


def test_it_stays_whatever_the_machine_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed(monkeypatch, "pod-7f")
    first = node_id(tmp_path / "pages")
    assert first.startswith("pod-7f_")
    renamed(monkeypatch, "pod-8a")
    assert node_id(tmp_path / "pages") == first
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["node"]


def test_two_roots_of_a_machine_have_two(tmp_path: Path) -> None:
    assert node_id(tmp_path / "a") != node_id(tmp_path / "b")


def test_manifests_of_an_earlier_release_are_still_those_of_their_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were saved under the host name."""
    renamed(monkeypatch, "gpu-7")
    PageStore(tmp_path / ("a" * 32) / "rank0", MARK, MLA).close()
    assert node_id(tmp_path) == "gpu-7"
    renamed(monkeypatch, "gpu-8")
    assert node_id(tmp_path) == "gpu-7"


def test_engines_that_start_at_once_agree(tmp_path: Path) -> None:
    start, found = threading.Barrier(8), list[str]()

    def engine() -> None:
        start.wait()
        found.append(node_id(tmp_path))

    threads = [threading.Thread(target=engine) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["node"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"two words", b"x" * 300])
def test_what_is_no_id_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "node").write_bytes(content)
    made = node_id(tmp_path)
    assert made.encode() != content and node_id(tmp_path) == made


def test_a_root_that_can_keep_none_has_the_host_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed(monkeypatch, "gpu/7")
    (tmp_path / "file").write_text("")
    assert node_id(tmp_path / "file" / "pages") == "gpu-7"


def test_it_is_made_again_with_a_directory_that_was_deleted(tmp_path: Path) -> None:
    """What the engine stores from then on is found by its next start."""
    root = tmp_path / "pages"
    space = Space(root=root)
    store = PageStore(root / ("a" * 32) / "rank0", MARK, MLA, space=space)
    shutil.rmtree(root)
    write(store, keys(1))
    assert node_id(root) == space.node
    (root / "node").write_text("that-of-another-engine\n")
    store.attend()
    assert node_id(root) == "that-of-another-engine"
    store.close()
    assert os.listdir(root)


def test_a_dp_rank_has_a_root_in_the_engines(tmp_path: Path) -> None:
    assert of_dp_rank(tmp_path, 0) == tmp_path
    for number in (10, 2):
        node_id(of_dp_rank(tmp_path, number))
    for other in ("dp", "dp0", "dp01", "dpx", "adp1"):
        (tmp_path / other).mkdir()
    (tmp_path / "dp3").write_text("")
    assert list(dp_roots(tmp_path).items()) == [(0, tmp_path), (2, tmp_path / "dp2"), (10, tmp_path / "dp10")]
    assert dp_roots(tmp_path / "none") == {0: tmp_path / "none"}
