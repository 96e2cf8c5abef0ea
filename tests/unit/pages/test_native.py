"""The extension, held to what Python does without it. `sanitized.py` runs this module again, with a build that looks
for errors of memory."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from compiler import c_compiler
from contents import MARK, key, keys
from hypothesis import given, settings
from hypothesis import strategies as st
from tools import missing

from agentstate.pages import ExtentHeader, Geometry, PageKeys, native
from agentstate.pages import sectors as sectors_module
from agentstate.pages.extent import SECTOR_BYTES

ROOT = Path(__file__).parents[3]
# Lengths at which the algorithm takes another way, and lengths beside them.
LENGTHS = sorted(
    {n + d for n in (0, 1, 3, 8, 16, 32, 64, 128, 240, 1024, 2048, 5120) for d in range(-2, 3) if n + d >= 0}
)


@pytest.fixture(scope="module", autouse=True)
def library() -> Any:
    if native.library is None:
        missing("the native extension is not built, or off")
    return native.library


def header_of(geometry: Geometry, pages: int, seed: int = 0) -> tuple[ExtentHeader, list[list[np.ndarray]]]:
    """A header and, for each layer, the bytes of each component of all pages that it has the sums of."""
    header = ExtentHeader.blank(MARK, geometry, PageKeys.of(keys(*range(pages))))
    chance = np.random.default_rng(seed)
    layers = []
    for layer in range(geometry.layers):
        rows = [chance.integers(0, 256, (pages, size), dtype=np.uint8) for size in geometry.component_bytes]
        header.sum_up(layer, rows)
        layers.append(rows)
    return header, layers


def in_python(header: ExtentHeader, *where: Any) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", None)
        return list(header.wrong_slots(*where))


@pytest.mark.parametrize("n_bytes", LENGTHS)
def test_a_checksum_is_that_of_xxhash(library: Any, n_bytes: int) -> None:
    data = random.Random(n_bytes).randbytes(n_bytes)
    for seed in (0, 1, 0x0123456789ABCDEF, (1 << 64) - 1):
        assert library.xxh3_64(data, seed) == xxhash.xxh3_64_intdigest(data, seed=seed)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=4000), seed=st.integers(0, (1 << 64) - 1))
def test_any_checksum_is_that_of_xxhash(data: bytes, seed: int) -> None:
    assert native.library.xxh3_64(data, seed) == xxhash.xxh3_64_intdigest(data, seed=seed)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(1, 300), st.integers(1000, 70_000)), min_size=1, max_size=3),
    pages=st.integers(1, 40),
    chance=st.randoms(use_true_random=False),
)
def test_the_wrong_slots_are_those_that_python_finds(sizes: list[int], pages: int, chance: random.Random) -> None:
    """Of any run of pages, also beyond the last one, in arrays that are cut anywhere, with any pages damaged."""
    geometry = Geometry(2, 4, tuple(sizes))
    header, layers = header_of(geometry, pages)
    layer, first = chance.randrange(2), chance.randrange(pages)
    last = chance.randint(first, pages)
    rows = [component[first:last].copy() for component in layers[layer]]
    for _ in range(chance.randrange(4) if first < last else 0):
        damaged = rows[chance.randrange(len(rows))]
        damaged[chance.randrange(len(damaged)), chance.randrange(damaged.shape[1])] ^= 1 << chance.randrange(8)
    if chance.random() < 0.3:
        rows = [np.concatenate([component, component[:1], component[:0]]) for component in rows]
    components = []
    for component in rows:
        cuts = sorted(chance.randint(0, len(component)) for _ in range(chance.randrange(4)))
        components.append(np.split(component, cuts))
    found = header.verifier.wrong_slots(layer, first, components)
    assert found == in_python(header, layer, first, components)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(1, 300), st.integers(1000, 200_000)), min_size=1, max_size=3),
    pages=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_the_sums_of_new_pages_are_those_of_python(sizes: list[int], pages: int, seed: int) -> None:
    geometry = Geometry(2, 4, tuple(sizes))
    header, layers = header_of(geometry, pages, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", None)
        other, _ = header_of(geometry, pages, seed)
    assert (header.checksums == other.checksums).all() and (header.block_checksums == other.block_checksums).all()
    assert all(header.wrong_slots(layer, 0, [[rows] for rows in layers[layer]]) == [] for layer in range(2))


def test_sums_need_all_pages_and_room() -> None:
    header, ((rows,),) = header_of(Geometry(1, 4, (100,)), 3)
    sums, blocks = header.checksums[0], header.block_checksums[0]
    for components, pages, of_blocks in (
        ([[rows[:2]]], sums, blocks),
        ([[rows]], sums[:2], blocks),
        ([[rows]], sums, np.zeros(2, dtype=np.uint64)),
    ):
        with pytest.raises(ValueError, match="not all pages"):
            header.verifier.sum_up(0, components, pages, of_blocks)
    with pytest.raises((TypeError, BufferError)):
        header.verifier.sum_up(0, [[rows]], bytes(24), blocks)


def test_a_block_is_verified_by_its_own_sum() -> None:
    """As in Python, which looks at the sums of pages only where that of their block does not match."""
    geometry = Geometry(1, 4, (1 << 20, 1 << 20))
    header, ((k, v),) = header_of(geometry, 3)
    header.checksums[0, 1] ^= 1
    assert header.verifier.wrong_slots(0, 0, [[k], [v]]) == []
    header.block_checksums[0, 1] ^= 1
    assert header.verifier.wrong_slots(0, 0, [[k], [v]]) == [1]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    """A descriptor, and what is to be read from it."""
    path = tmp_path / "file"
    path.write_bytes(random.Random(0).randbytes(10_000))
    fd = os.open(path, os.O_RDONLY)
    yield fd, path.read_bytes()
    os.close(fd)


def verifier_of(data: bytes, size: int) -> Any:
    """Of pages of ``size`` bytes, one layer and one component, that ``data`` begins with."""
    pages = len(data) // size
    header = ExtentHeader.blank(MARK, Geometry(1, 1, (size,)), PageKeys.of(keys(*range(pages))))
    header.sum_up(0, [np.frombuffer(data[: pages * size], dtype=np.uint8).reshape(pages, size)])
    return header.verifier


def test_ranges_are_read_to_their_arrays_and_verified(file: tuple[int, bytes]) -> None:
    fd, data = file
    verifier, memory = verifier_of(data, 1000), np.zeros((12, 1000), dtype=np.uint8)
    scattered = [memory[5:7], memory[1:2], memory[9:11]]
    ranges = [(scattered[:2], 2000, 3000), (scattered[2:], 5000, 1500)]
    assert verifier.read(fd, ranges, 0, 2, [scattered]) == ([3000, 2000], [])
    assert b"".join(array.tobytes() for array in scattered) == data[2000:7000]
    assert not memory[[0, 2, 3, 4, 7, 8, 11]].any()
    assert verifier.read(fd, ranges, 0, 3, [scattered]) == ([3000, 2000], [3, 4, 5, 6, 7])


def test_reading_ends_with_a_range_that_is_short(file: tuple[int, bytes]) -> None:
    fd, data = file
    verifier, memory = verifier_of(data, 1000), np.zeros((4, 1000), dtype=np.uint8)
    ranges = [([memory[:1]], 0, 1000), ([memory[1:2]], 9500, 501), ([memory[2:]], 0, 2000)]
    assert verifier.read(fd, ranges, 0, 0, [[memory]]) == ([1000, 500], None)
    assert not memory[2:].any(), "the third was not read"
    # Fewer than there is room for, and as many as were wanted.
    ranges[1] = ([memory[1:2]], 9500, 500)
    counts, wrong = verifier.read(fd, ranges, 0, 0, [[memory]])
    assert (counts, wrong) == ([1000, 500, 2000], [1, 2, 3])


def test_a_read_that_fails_raises_as_in_python(file: tuple[int, bytes]) -> None:
    _, data = file
    verifier, memory = verifier_of(data, 1000), np.zeros((1, 1000), dtype=np.uint8)
    closed = os.dup(0)
    os.close(closed)
    with pytest.raises(OSError) as expected:
        os.preadv(closed, [memory], 0)
    with pytest.raises(OSError) as error:
        verifier.read(closed, [([memory], 0, 1000)], 0, 0, [[memory]])
    assert (error.value.errno, str(error.value)) == (errno.EBADF, str(expected.value))


def test_a_function_may_read_in_place_of_the_system(file: tuple[int, bytes]) -> None:
    fd, data = file
    verifier, memory = verifier_of(data, 1000), np.zeros((2, 1000), dtype=np.uint8)
    ranges = [([memory[:1]], 3000, 1000), ([memory[1:]], 4000, 1000)]
    calls = []

    def preadv(fd: int, arrays: list[Any], offset: int) -> int:
        calls.append((fd, len(arrays), offset))
        return os.preadv(fd, arrays, offset) if offset < 4000 else 999

    assert verifier.read(fd, ranges, 0, 3, [[memory]], preadv) == ([1000, 999], None)
    assert calls == [(fd, 1, 3000), (fd, 1, 4000)]

    def failing(fd: int, arrays: list[Any], offset: int) -> int:
        raise OSError(errno.EIO, "of this test")

    with pytest.raises(OSError, match="of this test"):
        verifier.read(fd, ranges, 0, 3, [[memory]], failing)
    with pytest.raises(TypeError):
        verifier.read(fd, ranges, 0, 3, [[memory]], lambda *_: "no number")
    replaced = native.replaced_preadv()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        assert (replaced, native.replaced_preadv()) == (None, failing)


GOOD: list[Any] = [MARK, b"k" * 64, (4,), 1, bytes(16), bytes(16)]


@pytest.mark.parametrize(
    "at, value, error",
    [
        (0, MARK[:-1], ValueError),
        (1, b"k" * 63, ValueError),
        (2, (), ValueError),
        (2, (0,), ValueError),
        (2, (-1,), OverflowError),
        (2, ("4",), TypeError),
        (2, None, TypeError),
        (3, 0, ValueError),
        (3, -1, ValueError),
        (4, bytes(15), ValueError),
        (4, bytes(8), ValueError),
        (5, bytes(24), ValueError),
        (5, "sums", TypeError),
    ],
)
def test_what_is_no_header_is_refused(library: Any, at: int, value: Any, error: type[Exception]) -> None:
    library.Verifier(*GOOD)
    with pytest.raises(error):
        library.Verifier(*GOOD[:at], value, *GOOD[at + 1 :])
    with pytest.raises(TypeError):
        library.Verifier(*GOOD, name=1)


@pytest.mark.parametrize(
    "layer, slot, components",
    [
        (1, 0, [[bytes(4)]]),
        (-1, 0, [[bytes(4)]]),
        (0, -1, [[bytes(4)]]),
        (0, 0, []),
        (0, 0, [[bytes(4)], [bytes(4)]]),
        (0, 0, [[bytes(5)]]),
        (0, 0, [["text"]]),
        (0, 0, [None]),
        (0, 0, [[np.zeros((2, 8), dtype=np.uint8)[:, :4]]]),
    ],
)
def test_what_are_no_pages_is_refused(library: Any, layer: int, slot: int, components: Any) -> None:
    verifier = library.Verifier(*GOOD)
    with pytest.raises((ValueError, TypeError, BufferError)):
        verifier.wrong_slots(layer, slot, components)
    with pytest.raises((ValueError, TypeError, BufferError)):
        verifier.read(0, [], layer, slot, components)


@pytest.mark.parametrize("one", [None, (), ([bytearray(4)], 0), ([bytes(4)], 0, 4), ([bytearray(4)], -1, 4), (4, 0, 4)])
def test_what_is_no_range_is_refused(library: Any, one: Any) -> None:
    with pytest.raises((ValueError, TypeError, BufferError)):
        library.Verifier(*GOOD).read(0, [one], 0, 0, [[bytes(4)]])


def test_memory_is_let_go_when_it_has_been_read(file: tuple[int, bytes]) -> None:
    """A view that is kept would keep an array from being resized."""
    fd, data = file
    verifier, memory = verifier_of(data, 1000), bytearray(1000)
    for wanted in (1000, 1001):
        verifier.read(fd, [([memory], 0, wanted)], 0, 0, [[memory]])
    with pytest.raises(ValueError):
        verifier.read(fd, [([memory], 0, 1000)], 0, -1, [[memory]])
    verifier.wrong_slots(0, 0, [[memory]])
    memory.extend(b"more")
    del verifier
    assert len(memory) == 1004


HANGS = """
import os, sys, threading, time
import numpy as np
from test_native import verifier_of
fd = os.open(sys.argv[1], os.O_RDONLY)
data = os.pread(fd, 10_000, 0)
verifier, memory = verifier_of(data, 1000), np.zeros((10, 1000), dtype=np.uint8)
found = []
def read():
    found.append(verifier.read(fd, [([memory], 0, 10_000)], 0, 0, [[memory]]))
reading = threading.Thread(target=read, daemon=True)
reading.start()
while not os.path.exists(os.environ["SPEED"] + ".held"):
    time.sleep(0.01)
assert not found
with open(os.environ["SPEED"], "w") as speed:
    speed.write("1e12")
reading.join(60)
assert found == [([10_000], [])], found
"""


def test_the_interpreter_goes_on_while_the_drive_does_not_answer(tmp_path: Path) -> None:
    """The drive is one that a preloaded library makes slow: it is between the extension and the system, too."""
    library = tmp_path / "slow_drive.so"
    source = ROOT / "benchmarks" / "slow_drive.c"
    subprocess.run([c_compiler(), "-shared", "-fPIC", "-o", library, source, "-ldl", "-lpthread"], check=True)
    (tmp_path / "speed").write_text("0 extents")
    (tmp_path / "extents").write_bytes(random.Random(0).randbytes(10_000))
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    run = subprocess.run(
        [sys.executable, "-c", HANGS, tmp_path / "extents"],
        env={**os.environ, "LD_PRELOAD": str(library), "SPEED": str(tmp_path / "speed"), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


def test_threads_read_and_verify_at_once(file: tuple[int, bytes]) -> None:
    fd, data = file
    verifier, wrong = verifier_of(data, 1000), []

    def work() -> None:
        memory = np.zeros((10, 1000), dtype=np.uint8)
        for _ in range(200):
            if verifier.read(fd, [([memory], 0, 10_000)], 0, 0, [[memory]]) != ([10_000], []):
                wrong.append(memory.tobytes() == data)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("value, there", [("off", False), ("0", False), ("on", True), ("", True)])
def test_it_can_be_turned_off(value: str, there: bool) -> None:
    program = "from agentstate.pages import native; print(native.library is not None)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "AGENTSTATE_NATIVE": value},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == str(there), run.stderr


def test_a_key_is_no_other_pages() -> None:
    geometry = Geometry(1, 1, (100,))
    header, ((rows,),) = header_of(geometry, 2)
    other = ExtentHeader(
        header.fingerprint, geometry, PageKeys.of([key(0), key("other")]), header.checksums, header.block_checksums
    )
    assert other.verifier.wrong_slots(0, 0, [[rows]]) == [1]


# ---- rows ----


class RowsJob:
    """Rows of a file of sectors, some of whose sums are wrong, in reads of which some go beyond its end."""

    def __init__(self, chance: random.Random, fd: int, data: bytes):
        sectors = len(data) // SECTOR_BYTES
        self.row_bytes = [chance.choice([1, 24, 656, 5000]) for _ in range(chance.choice([1, 1, 2]))]
        reads, base = [], 0
        for _ in self.row_bytes:
            for _ in range(chance.randint(1, 6)):
                count = chance.randint(2, 5)
                reads.append((fd, SECTOR_BYTES * chance.randint(0, sectors), SECTOR_BYTES * count, base))
                base += count
        self.reads = np.array(reads, dtype=np.int64)
        self.memory = np.zeros(SECTOR_BYTES * base, dtype=np.uint8)
        self.seeds = np.array([chance.getrandbits(64) for _ in range(base)], dtype=np.uint64)
        self.sums = np.zeros(base, dtype=np.uint64)
        for _, offset, n_bytes, first in reads:
            for i in range(n_bytes // SECTOR_BYTES):
                sector = data[offset + i * SECTOR_BYTES : offset + (i + 1) * SECTOR_BYTES]
                right = xxhash.xxh3_64_intdigest(sector, seed=int(self.seeds[first + i]))
                self.sums[first + i] = right ^ (chance.random() < 0.1)
        share = base // len(self.row_bytes)
        n_rows = chance.randint(0, 20)
        self.begin = np.zeros((len(self.row_bytes), n_rows), dtype=np.int64)
        for component, size in enumerate(self.row_bytes):
            # Rows that one read brings.
            places = [
                SECTOR_BYTES * first + at
                for _, _, n_bytes, first in reads[:: max(1, share // 8)]
                for at in range(chance.randint(0, 700), n_bytes - size + 1, size + chance.randint(0, 3000))
            ]
            chosen = sorted(chance.sample(places, min(n_rows, len(places))))
            n_rows = len(chosen)
            self.begin = self.begin[:, :n_rows]
            self.begin[component] = chosen
        self.to = np.array(chance.sample(range(30), n_rows), dtype=np.int64)

    def run(self, queue: Any, *, got: np.ndarray | None = None) -> tuple[list[int], list[int], list[bytes]]:
        into = [np.zeros((30, size + 3), dtype=np.uint8)[:, :size] for size in self.row_bytes]
        outcome = np.zeros(len(self.to), dtype=np.uint8)
        count = np.zeros(len(self.reads), dtype=np.int64) if got is None else got
        to = np.ascontiguousarray(np.broadcast_to(self.to, self.begin.shape))
        native.library.read_rows(
            queue,
            self.reads,
            count,
            self.memory,
            self.sums,
            self.seeds,
            np.ascontiguousarray(self.begin),
            to,
            np.array(self.row_bytes, dtype=np.int64),
            into,
            outcome,
        )
        return count.tolist(), outcome.tolist(), self.copied(into, outcome)

    def run_in_python(self) -> tuple[list[int], list[int], list[bytes]]:
        into = [np.zeros((30, size + 3), dtype=np.uint8)[:, :size] for size in self.row_bytes]
        outcome = np.zeros(len(self.to), dtype=np.uint8)
        got = np.array([sectors_module._read_now(self.memory, read) for read in self.reads.tolist()])
        sectors_module._copy_right(
            self.reads, got, self.memory, self.sums, self.seeds, self.begin, self.to, self.row_bytes, into, outcome
        )
        return got.tolist(), outcome.tolist(), self.copied(into, outcome)

    def copied(self, into: list[np.ndarray], outcome: np.ndarray) -> list[bytes]:
        """The rows that are right, and what nothing was copied to."""
        beside = np.setdiff1d(np.arange(30), self.to)
        return [array[np.concatenate([self.to[outcome == 1], beside])].tobytes() for array in into]


@pytest.fixture
def sectors(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    path = tmp_path / "sectors"
    path.write_bytes(random.Random(1).randbytes(20 * SECTOR_BYTES))
    fd = os.open(path, os.O_RDONLY)
    yield fd, path.read_bytes()
    os.close(fd)


def queue_of(library: Any, depth: int) -> Any:
    try:
        return library.Queue(depth)
    except OSError as error:
        missing(f"no queue of the kernel's: {error}")


@pytest.mark.parametrize("depth", [1, 3, 64])
def test_rows_are_those_that_python_reads(library: Any, sectors: tuple[int, bytes], depth: int) -> None:
    queue, seen = queue_of(library, depth), set()
    for seed in range(300):
        job = RowsJob(random.Random(seed), *sectors)
        expected = job.run_in_python()
        got, outcome, _ = expected
        # What has been read already is verified and copied alike.
        assert job.run(None, got=np.array(got, dtype=np.int64)) == expected, seed
        job.memory[:] = 0
        found = job.run(queue)
        assert found == expected, seed
        seen.update(outcome)
    assert seen == {1, 2, 3}


def test_a_read_that_the_kernel_does_not_take_is_one_that_failed(library: Any, sectors: tuple[int, bytes]) -> None:
    job = RowsJob(random.Random(0), *sectors)
    closed = os.dup(0)
    os.close(closed)
    job.reads[:, 0] = closed
    got, outcome, into = job.run(queue_of(library, 4))
    assert set(got) == {-errno.EBADF} and set(outcome) <= {3} and not any(b"".join(into))


def test_a_queue_is_of_some_depth(library: Any) -> None:
    for depth in (0, -1, 257):
        with pytest.raises(ValueError):
            library.Queue(depth)
    with pytest.raises(TypeError):
        library.Queue("deep")


def test_what_lies_where_it_may_not_is_refused(library: Any, sectors: tuple[int, bytes]) -> None:
    fd, _ = sectors
    reads = np.array([(fd, 0, 8192, 0)], dtype=np.int64)
    sums = np.zeros(2, dtype=np.uint64)
    good: list[Any] = [
        None,
        reads,
        np.array([8192], dtype=np.int64),
        bytearray(8192),
        sums,
        sums,
        np.array([[0, 100]], dtype=np.int64),
        np.array([[1, 0]], dtype=np.int64),
        np.array([100], dtype=np.int64),
        [np.zeros((2, 100), dtype=np.uint8)],
        bytearray(2),
    ]
    assert library.read_rows(*good) is None
    assert good[-1] == bytearray([2, 2])
    for at, value in [
        (0, 7),
        (0, "queue"),
        (1, np.array([(fd, 0, 8192, 1)], dtype=np.int64)),
        (1, np.array([(fd, 0, 12288, 0)], dtype=np.int64)),
        (1, np.array([(fd, 0, 100, 0)], dtype=np.int64)),
        (1, np.array([(fd, 0, 0, 0)], dtype=np.int64)),
        (1, np.array([(fd, -4096, 4096, 0)], dtype=np.int64)),
        (1, np.array([fd, 0, 8192], dtype=np.int64)),
        (2, np.zeros(2, dtype=np.int64)),
        (2, bytes(8)),
        (3, bytearray(4096)),
        (4, np.zeros(1, dtype=np.uint64)),
        (5, np.zeros(3, dtype=np.uint64)),
        (6, np.array([[0, 8093]], dtype=np.int64)),
        (6, np.array([[-1, 100]], dtype=np.int64)),
        (6, np.array([[100, 100]], dtype=np.int64)),
        (6, np.array([[0]], dtype=np.int64)),
        (7, np.array([[1, 2]], dtype=np.int64)),
        (7, np.array([[-1, 0]], dtype=np.int64)),
        (8, np.array([0], dtype=np.int64)),
        (8, np.array([101], dtype=np.int64)),
        (8, np.array([100, 100], dtype=np.int64)),
        (9, []),
        (9, [np.zeros(200, dtype=np.uint8)]),
        (9, [np.zeros((2, 99), dtype=np.uint8)]),
        (9, [np.zeros((100, 2), dtype=np.uint8).T]),
        (9, [np.zeros((2, 100), dtype=np.int16)]),
        (9, [b"text"]),
        (10, bytearray(3)),
    ]:
        with pytest.raises((ValueError, TypeError, BufferError)):
            library.read_rows(*good[:at], value, *good[at + 1 :])


def test_a_row_that_no_read_brings_whole_has_not_been_read(library: Any, sectors: tuple[int, bytes]) -> None:
    fd, data = sectors
    reads = np.array([(fd, 0, 4096, 0), (fd, 8192, 4096, 1)], dtype=np.int64)
    into, outcome = np.zeros((3, 100), dtype=np.uint8), bytearray(3)
    seeds = np.arange(2, dtype=np.uint64)
    halves = [data[:4096], data[8192:12288]]
    sums = np.array([xxhash.xxh3_64_intdigest(half, seed=i) for i, half in enumerate(halves)], dtype=np.uint64)
    begin, to = np.array([[0, 4050, 8092]], dtype=np.int64), np.array([[0, 1, 2]], dtype=np.int64)
    library.read_rows(
        queue_of(library, 2),
        reads,
        np.zeros(2, dtype=np.int64),
        np.zeros(8192, dtype=np.uint8),
        sums,
        seeds,
        begin,
        to,
        np.array([100], dtype=np.int64),
        [into],
        outcome,
    )
    assert outcome == bytearray([1, 3, 1])
    assert into[0].tobytes() == data[:100] and not into[1].any() and into[2].tobytes() == data[12188:12288]


def test_sums_of_sectors_are_those_of_python(library: Any, sectors: tuple[int, bytes]) -> None:
    sums = np.zeros(20, dtype=np.uint64)
    seed = (1 << 64) - 3
    library.sector_sums(sectors[1], seed, sums)
    assert sums.tolist() == [
        xxhash.xxh3_64_intdigest(sectors[1][4096 * i : 4096 * (i + 1)], seed=(seed + i) % (1 << 64)) for i in range(20)
    ]
    for data, room in ((sectors[1][:-1], sums), (sectors[1], sums[:-1])):
        with pytest.raises(ValueError):
            library.sector_sums(data, seed, room)


def test_a_slow_drive_of_another_interpreter_sees_every_read(tmp_path: Path) -> None:
    """A library that is preloaded takes the place of `preadv`, and there is no queue that goes around it."""
    slow = tmp_path / "slow_drive.so"
    source = ROOT / "benchmarks" / "slow_drive.c"
    subprocess.run([c_compiler(), "-shared", "-fPIC", "-o", slow, source, "-ldl", "-lpthread"], check=True)
    code = "from agentstate.pages import native; print(native.library.replaced_preadv(), native.new_queue(4))"
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "LD_PRELOAD": str(slow)}, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout.split()) == (0, ["True", "None"]), run.stderr


def test_a_library_in_between_is_seen(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if library.replaced_preadv():
        assert native.new_queue(4) is None
    else:
        assert native.new_queue(4) is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: 0)
        assert native.new_queue(4) is None

    def forbidden(depth: int) -> Any:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "Queue", forbidden)
        assert native.new_queue(4) is None
    monkeypatch.setattr(native, "library", None)
    assert native.new_queue(4) is None
