"""The stores of other engines, which are other processes, read beside one's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from contents import MARK, MLA, drop, expected, keys, read, write
from owning import StoreOwner as Owner

from agentstate.pages import (
    LayerwiseReader,
    PageStore,
    PosixBackend,
    Quota,
    Replicas,
    StoreView,
    fingerprint,
    stores_beside,
)
from agentstate.pages.node import node_id

Own = Callable[[str], Owner]


def directory(root: Path, mark: bytes = MARK) -> Path:
    return root / mark.hex()[:32] / "rank0"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Own]:
    """Starts the engine of a page directory."""
    monkeypatch.setattr("agentstate.pages.view._RETRY_S", 0.0)
    owners: list[Owner] = []

    def start(name: str) -> Owner:
        directory(tmp_path / name).mkdir(parents=True, exist_ok=True)
        owners.append(Owner(directory(tmp_path / name)))
        return owners[-1]

    yield start
    for owner in owners:
        owner.kill()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PageStore]:
    store = PageStore(directory(tmp_path / "ours"), MARK, MLA)
    yield store
    store.close()


@pytest.fixture
def replicas(store: PageStore, tmp_path: Path) -> Iterator[Replicas]:
    replicas = Replicas(store, lambda: stores_beside(f"{tmp_path}/*", tmp_path / "ours", MARK, 0))
    yield replicas
    replicas.close()


@pytest.fixture
def reader(replicas: Replicas) -> Iterator[LayerwiseReader]:
    opening = replicas.opening(PosixBackend())
    reader = LayerwiseReader(MLA, staging_bytes=1 << 22, threads=2, chunk_bytes=1 << 20, open_extent=opening)
    yield reader
    reader.close()


def right(replicas: Replicas, reader: LayerwiseReader, *pages: object) -> bool:
    with replicas.pin(keys(*pages)) as pin:
        return read(reader, [pin]) == expected(MLA, [pin])


def test_what_any_of_them_has_is_found_and_read_where_it_lies(
    own: Own, store: PageStore, replicas: Replicas, reader: LayerwiseReader
) -> None:
    write(store, keys(0, 1))
    write(store, keys(5))
    first, second = own("a"), own("b")
    first("write(store, keys(2, 3))")
    second("write(store, keys(4))")
    second("write(store, keys(6))")
    assert replicas.prefix_length(keys(*range(8))) == 2, "not before they were looked for"
    replicas.look()
    assert replicas.prefix_length(keys(*range(8))) == 7
    assert replicas.prefix_length(keys(6, 2, 0, 9)) == 3 and replicas.prefix_length(keys(9, 0)) == 0
    assert replicas.stored(keys(*range(8), 77)) == [True] * 7 + [False] * 2
    assert right(replicas, reader, *range(7)) and right(replicas, reader, 6, 2, 5, 3)
    assert store.pinned == 0
    with replicas.pin(keys(0, 2)), pytest.raises(KeyError) as missing:
        replicas.pin(keys(0, 2, 77, 5))
    assert missing.value.args == (keys(77)[0],) and store.pinned == 0
    assert store.stored(keys(2)) == [False]


def test_what_was_used_of_theirs_is_our_own_and_not_written_again(
    own: Own, store: PageStore, replicas: Replicas, reader: LayerwiseReader, tmp_path: Path
) -> None:
    write(store, keys(0, 1))
    written = store.stats.bytes_written
    other = own("a")
    other("write(store, keys(2, 3), owner='tenant a')")
    other("write(store, keys(4))")
    replicas.look()
    assert replicas.adopt(keys(0, 1, 2, 3, 4, 5)) == set(keys(2, 3, 4))
    assert replicas.adopt(keys(0, 1, 2, 3, 4, 5)) == set()
    assert (store.stats.pages_linked, store.stats.bytes_written) == (3, written)
    other.kill()
    shutil.rmtree(tmp_path / "a")
    replicas.look()
    assert store.prefix_length(keys(*range(5))) == 5 and right(replicas, reader, *range(5))


def test_an_extent_is_adopted_only_if_all_of_its_pages_are_ones_that_this_engine_was_asked_for(
    own: Own, store: PageStore, replicas: Replicas
) -> None:
    write(store, keys(3))
    other = own("a")
    other("write(store, keys(1, 2))")
    other("write(store, keys(3, 4))")
    other("write(store, keys(5, 6))")
    other("drop(store, *keys(6))")
    other("write(store, keys(7, 8))")
    other("store.remove(keys(8))")
    replicas.look()
    assert replicas.adopt(keys(1)) == set(), "2 is another session's"
    assert replicas.adopt(keys(4)) == set(keys(4)), "3 is here already"
    assert replicas.adopt(keys(5, 6, 7, 8)) == set(), "the file has pages that are wrong, or are being erased"
    assert store.stored(keys(*range(9))) == [page in (3, 4) for page in range(9)]
    assert replicas.stored(keys(5, 6, 7, 8)) == [True, False, True, False]


def test_what_cannot_be_linked_is_read_all_the_same(
    own: Own, store: PageStore, replicas: Replicas, reader: LayerwiseReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    own("a")("write(store, keys(1))")
    replicas.look()
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
        assert replicas.adopt(keys(1)) == set()
    store.quota = Quota(max_bytes=1)
    assert replicas.adopt(keys(1)) == set(), "there is no room for it"
    assert right(replicas, reader, 1)
    store.quota = Quota()
    assert replicas.adopt(keys(1)) == set(keys(1))


def test_a_store_on_another_file_system_is_read_and_that_is_said_once(
    own: Own, store: PageStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system")
    there = memory / f"agentstate-{os.getpid()}"
    (tmp_path / "a").symlink_to(there)
    try:
        there.mkdir()
        own("a")("write(store, keys(1))")
        with caplog.at_level("INFO"):
            replicas = Replicas(store, lambda: stores_beside(str(there), tmp_path / "ours", MARK, 0))
            assert replicas.adopt(keys(1)) == replicas.adopt(keys(1)) == set()
        assert replicas.prefix_length(keys(1)) == 1
        assert sum("another file system" in record.getMessage() for record in caplog.records) == 1
        replicas.close()
    finally:
        shutil.rmtree(there)


def test_copies_that_are_wrong_are_dropped_where_they_lie(own: Own, store: PageStore, replicas: Replicas) -> None:
    write(store, keys(1))
    other = own("a")
    other("write(store, keys(0))")
    other("write(store, keys(1, 2))")
    replicas.look()
    with replicas.pin(keys(1, 2)) as pin:
        copies = pin.copies([0, 1])
    assert replicas.drop(copies) == 1, "of the own store"
    assert replicas.stored(keys(0, 1, 2)) == [True, True, False], "there is another copy of page 1"
    assert replicas.adopt(keys(1, 2)) == set(), "nothing is adopted of what was wrong"
    assert store.stored(keys(1, 2)) == [False, False]
    with replicas.pin(keys(1)) as pin:
        assert replicas.drop(pin.copies([0])) == 0
    assert replicas.stored(keys(0, 1, 2)) == [True, False, False]


@pytest.mark.parametrize("how", ["evict", "kill", "delete", "make anew"])
def test_whatever_becomes_of_the_other_engine_pages_are_right_or_refused(
    own: Own, replicas: Replicas, reader: LayerwiseReader, store: PageStore, tmp_path: Path, how: str
) -> None:
    other = own("a")
    other("write(store, keys(1, 2))")
    replicas.look()
    pin = replicas.pin(keys(1, 2))
    if how == "evict":
        other("setattr(store, 'quota', Quota(store.stats.bytes))")
        other("write(store, keys(3, 4))")
    else:
        other.kill()
    if how in ("delete", "make anew"):
        shutil.rmtree(tmp_path / "a")
    if how == "make anew":
        own("a")("write(store, keys(3, 4))")
    found = read(reader, [pin])
    assert found == expected(MLA, [pin]) if how == "kill" else set(found.values()) == {None}
    pin.close()
    replicas.look()
    assert replicas.stored(keys(1, 2)) == [how == "kill"] * 2
    assert replicas.stored(keys(3)) == [how in ("evict", "make anew")]
    assert replicas.adopt(keys(1, 2)) == (set(keys(1, 2)) if how == "kill" else set())
    write(store, keys(9))
    assert right(replicas, reader, 9)


def test_engines_come_and_go(own: Own, replicas: Replicas, tmp_path: Path) -> None:
    other = own("a")
    other("write(store, keys(1))")
    replicas.look()
    with replicas.pin(keys(1)) as pin:
        copies = pin.copies([0])
    other.kill()
    shutil.rmtree(tmp_path / "a")
    replicas.look()
    assert replicas.stored(keys(1)) == [False]
    own("a")("write(store, keys(1))")
    replicas.look()
    replicas.drop(copies)
    assert replicas.stored(keys(1)) == [True], "a copy in the store before is not one in this"
    replicas.close()
    replicas.look()
    assert replicas.stored(keys(1)) == [False]


def test_whose_pages_can_be_read_is_told(own: Own, replicas: Replicas, tmp_path: Path) -> None:
    ids = {name: node_id(tmp_path / name) for name in ("ours", "a", "b")}
    own("a")
    b = own("b")
    assert replicas.nodes() == frozenset()
    replicas.look()
    assert replicas.nodes() == {ids["a"], ids["b"]}
    b.kill()
    assert replicas.nodes() == {ids["a"], ids["b"]}, "its files are there"
    shutil.rmtree(tmp_path / "b")
    assert replicas.nodes() == {ids["a"]}
    (tmp_path / "a" / "node").unlink()
    assert replicas.nodes() == frozenset(), "nobody knows whose they are"


def test_a_store_that_nobody_has_opened_yet_cannot_be_read(own: Own, replicas: Replicas, tmp_path: Path) -> None:
    node_id(tmp_path / "a")
    own("a").kill()
    replicas.look()
    assert replicas.nodes() == frozenset()


def test_a_store_of_another_process_may_have_others_beside_it(own: Own, tmp_path: Path) -> None:
    """A rank that reads what another rank of its engine writes."""
    own("a")("write(store, keys(1))")
    own("b")("write(store, keys(2))")
    view = StoreView(directory(tmp_path / "a"), MARK, MLA)
    replicas = Replicas(view, lambda: [directory(tmp_path / "b")])
    opening = replicas.opening(PosixBackend())
    reader = LayerwiseReader(MLA, staging_bytes=1 << 22, threads=2, chunk_bytes=1 << 20, open_extent=opening)
    assert replicas.adopt(keys(2)) == set()
    assert right(replicas, reader, 1, 2)
    reader.close()
    replicas.close()
    view.close()


def test_stores_beside_are_those_of_the_same_pages_in_other_directories(tmp_path: Path) -> None:
    for name in ("ours", "a", "b"):
        directory(tmp_path / name).mkdir(parents=True)
    directory(tmp_path / "c", fingerprint(model="another")).mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "again").symlink_to("a")
    ours, a, b = (directory(tmp_path / name) for name in ("ours", "a", "b"))

    def found(patterns: str) -> list[Path]:
        return sorted(stores_beside(patterns, tmp_path / "ours", MARK, 0))

    assert found("") == []
    assert found(f"{tmp_path}/*") == [a, b], "each once, and never the own one: an index is opened once a process"
    assert found(f"{tmp_path}/a:{tmp_path}/b/:{tmp_path}/nowhere") == [a, b]
    assert found(f"{tmp_path}/ours") == []
    assert set(stores_beside(f"{tmp_path}/*", tmp_path / "a", MARK, 0)) == {ours, b}
    assert stores_beside(f"{tmp_path}/*", tmp_path / "ours", MARK, 1) == []


def test_a_lookup_of_what_is_dropped_here_finds_the_other_copy(
    own: Own, store: PageStore, replicas: Replicas, reader: LayerwiseReader
) -> None:
    write(store, keys(1, 2))
    own("a")("write(store, keys(1, 2))")
    replicas.look()
    drop(store, *keys(1))
    assert replicas.prefix_length(keys(1, 2)) == 2 and right(replicas, reader, 1, 2)


def test_the_space_of_an_extent_that_is_being_read_is_not_written_over(
    own: Own, replicas: Replicas, tmp_path: Path
) -> None:
    other = own("a")
    other("write(store, keys(*range(8)))")
    replicas.look()
    # With room for little of it, so that most of the second layer is read later than the first.
    opening = replicas.opening(PosixBackend())
    reader = LayerwiseReader(MLA, staging_bytes=1, threads=1, chunk_bytes=1, open_extent=opening)
    stream = reader.open(replicas.pin(keys(*range(8))))
    stream.hurry()
    assert not any(chunk.unusable() for chunk in stream.layer(0))
    other("setattr(store, 'quota', Quota(store.draft_bytes(8)))")
    other("write(store, keys(*range(10, 18)))")
    assert replicas.stored(keys(0, 10)) == [False, True]
    assert not any(chunk.unusable() for chunk in stream.layer(1))
    stream.close()
    reader.close()


def test_the_dp_ranks_of_an_engine_read_each_others_stores(tmp_path: Path) -> None:
    def store(root: str) -> Path:
        directory = tmp_path / root / MARK.hex()[:32] / "rank0"
        directory.mkdir(parents=True)
        return directory

    first, second, third = (store(f"engine{rank}") for rank in ("", "/dp1", "/dp2"))
    other, of_other = store("other"), store("other/dp1")
    engine = tmp_path / "engine"
    assert set(stores_beside("", engine, MARK, 0, engine=engine)) == {second, third}
    assert set(stores_beside("", engine / "dp1", MARK, 0, engine=engine)) == {first, third}
    # Another engine's as well.
    assert set(stores_beside(str(tmp_path / "other"), engine, MARK, 0)) == {other, of_other}
