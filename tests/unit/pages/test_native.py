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
