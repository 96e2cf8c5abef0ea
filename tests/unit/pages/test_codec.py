"""Coding without loss, by the extension and by Python, which give the same bytes. `sanitized.py` runs this module
again, with builds that look for errors of memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentstate.pages import codec, native
from agentstate.pages.codec import RAW, Coding

pytestmark = pytest.mark.usefixtures("read_by")

EVERY_NUMBER = np.arange(1 << 16, dtype="<u2")
NOT_A_NUMBER = np.array([0x7F81, 0xFF81, 0x7FC0, 0xFFFF, 0x7F80, 0xFF80], dtype="<u2")  # infinities too
SUBNORMAL = np.array([0x0001, 0x8001, 0x007F, 0x0000, 0x8000], dtype="<u2")


@contextmanager
def python() -> Iterator[None]:
    """Without the extension."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", None)
        yield


def encoded(pages: np.ndarray) -> tuple[bytes, bytes, list[int]]:
    """By whichever there is: the table, the bytes, and how many each page has."""
    into, lengths = np.full(pages.size, 0xA5, dtype=np.uint8), np.zeros(len(pages), dtype="<u4")
    table = codec.encode(pages, into, lengths)
    end = int(lengths.sum())
    assert (into[end:] == 0xA5).all(), "what is behind the coded bytes was written to"
    return table, into[:end].tobytes(), lengths.tolist()


def decoded(table: bytes, coded: bytes, lengths: list[int], page_bytes: int, cuts: list[int] | None = None) -> bytes:
    """To arrays of so many pages each."""
    arrays = [np.full((count, page_bytes), 0x5A, dtype=np.uint8) for count in cuts or [len(lengths)]]
    given_ = np.frombuffer(coded, dtype=np.uint8)
    codec.decode(table, page_bytes, given_, np.array(lengths, dtype="<u4"), arrays)
    return b"".join(array.tobytes() for array in arrays)


def both_ways(pages: np.ndarray) -> tuple[bytes, bytes, list[int]]:
    """Encoded alike by the two, and decoded to what it was by each."""
    found = encoded(pages)
    with python():
        assert encoded(pages) == found
        assert decoded(*found, pages.shape[1]) == pages.tobytes()
    assert decoded(*found, pages.shape[1]) == pages.tobytes()
    return found


def numbers(chance: np.random.Generator, shape: tuple[int, int], spread: float = 1.0) -> np.ndarray:
    """Pages of normally distributed numbers in bfloat16, columns of different widths: what KV is like."""
    widths = np.exp(spread * chance.standard_normal(shape[1])).astype("f")
    wide = chance.standard_normal(shape, dtype=np.float32) * widths
    return (wide.view("<u4") >> 16).astype("<u2").view(np.uint8)


def test_numbers_in_bfloat16_take_three_quarters() -> None:
    pages = numbers(np.random.default_rng(0), (5, 6144))
    table, coded, lengths = both_ways(pages)
    assert table != RAW and len(coded) <= 0.76 * pages.size
    assert all(length >= 0.75 * pages.shape[1] for length in lengths)


def halves(chance: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """The same in float16."""
    return chance.standard_normal(shape).astype("<f2").view(np.uint8)


def test_numbers_in_float16_take_less_too() -> None:
    pages = halves(np.random.default_rng(0), (5, 6145))
    table, coded, lengths = both_ways(pages)
    assert table[0] == 2 and len(coded) <= 0.91 * pages.size
    assert all(length >= 0.875 * pages.shape[1] for length in lengths)
    # Every number there is, among others.
    pages = np.ascontiguousarray(halves(np.random.default_rng(1), (4, 1 << 18)))
    pages.view("<u2").reshape(-1)[: len(EVERY_NUMBER)] = EVERY_NUMBER
    assert both_ways(pages)[0][0] == 2


@pytest.mark.parametrize("special", [NOT_A_NUMBER, SUBNORMAL, EVERY_NUMBER], ids=["nan", "subnormal", "every"])
def test_no_bit_of_any_number_is_lost(special: np.ndarray) -> None:
    """Among others, so that they are written out: and of them alone."""
    chance = np.random.default_rng(1)
    pages = np.ascontiguousarray(numbers(chance, (4, 1 << 18)))
    places = chance.choice(pages.size // 2, len(special), replace=False)
    pages.view("<u2").reshape(-1)[places] = special
    table, _, _ = both_ways(pages)
    assert table != RAW
    alone = np.resize(special, (2, 65536)).view(np.uint8)
    both_ways(np.ascontiguousarray(alone))


@pytest.mark.parametrize(
    "pages",
    [
        np.random.default_rng(2).integers(0, 256, (3, 4096), dtype=np.uint8),
        np.random.default_rng(2).standard_normal((3, 512)).astype("f4").view(np.uint8),
        np.zeros((3, 1001), dtype=np.uint8),
        np.zeros((0, 64), dtype=np.uint8),
        np.zeros((3, 1), dtype=np.uint8),
    ],
    ids=["noise", "float32", "an odd number of bytes", "no pages", "one byte"],
)
def test_what_coding_does_not_make_smaller_is_copied(pages: np.ndarray) -> None:
    assert both_ways(pages) == (RAW, pages.tobytes(), [pages.shape[1]] * len(pages))


@given(
    kind=st.sampled_from(["numbers", "halves", "few", "noise", "mixed", "constant"]),
    pages=st.integers(1, 9),
    of_page=st.integers(1, 300),
    seed=st.integers(0, 1 << 32),
)
def test_anything_comes_back_and_both_write_the_same(kind: str, pages: int, of_page: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    found = numbers(chance, (pages, of_page), spread=float(chance.uniform(0, 6)))
    if kind == "halves":
        found = halves(chance, (pages, of_page))
    elif kind == "few":
        found = chance.choice(EVERY_NUMBER, 20)[chance.integers(0, 20, (pages, of_page))].view(np.uint8)
    elif kind == "noise":
        found = chance.integers(0, 256, (pages, 2 * of_page), dtype=np.uint8)
    elif kind == "mixed":
        noisy = chance.random(found.shape) < 0.03
        found[noisy] = chance.integers(0, 256, int(noisy.sum()), dtype=np.uint8)
    elif kind == "constant":
        found[:] = found[0, 0]
    both_ways(np.ascontiguousarray(found))


@given(seed=st.integers(0, 1 << 32), cuts=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_some_of_the_pages_are_decoded_alone_and_to_any_arrays(seed: int, cuts: list[int]) -> None:
    count = sum(cuts)
    pages = numbers(np.random.default_rng(seed), (count + 3, 78))
    table, coded, lengths = encoded(pages)
    first = sum(lengths[:2])
    part = coded[first : first + sum(lengths[2 : 2 + count])]
    assert decoded(table, part, lengths[2 : 2 + count], 156, cuts) == pages[2 : 2 + count].tobytes()


@given(seed=st.integers(0, 1 << 32), how=st.sampled_from(["flip", "ones", "noise", "escapes"]))
def test_damaged_bytes_make_other_pages_and_nothing_else(seed: int, how: str) -> None:
    """The same ones whoever decodes them: what is read is never outside of what was given."""
    chance = random.Random(seed)
    shape = 3, 2 * chance.randint(2, 90)
    pages = chance.choice([numbers, halves])(np.random.default_rng(seed), shape)
    table, coded, lengths = encoded(pages)
    damaged = bytearray(coded)
    if how == "flip":
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    elif how == "ones":  # every number has an escape, and none is there
        damaged = bytearray(b"\xff" * len(damaged))
    elif how == "noise":
        damaged = bytearray(chance.randbytes(len(damaged)))
    else:
        page_bytes = pages.shape[1]
        damaged = bytearray(chance.randbytes(3 * page_bytes))
        table, lengths = bytes([chance.choice([1, 2])]) + chance.randbytes(15), [page_bytes] * 3
    found = decoded(table, bytes(damaged), lengths, pages.shape[1])
    assert len(found) == pages.size
    with python():
        assert decoded(table, bytes(damaged), lengths, pages.shape[1]) == found


@given(st.data())
def test_lengths_that_no_pages_have_are_refused(data: st.DataObject) -> None:
    pages = numbers(np.random.default_rng(7), (3, 40))
    table, coded, lengths = encoded(pages)
    wrong = list(lengths)
    wrong[data.draw(st.integers(0, 2))] += data.draw(st.sampled_from([-80, -1, 1, 80, 1 << 31]))
    with pytest.raises(ValueError):
        decoded(table, coded, [length % (1 << 32) for length in wrong], 80)
    for cut in (coded[:-1], coded + b"x", b""):
        with pytest.raises(ValueError):
            decoded(table, cut, lengths, 80)
    for some in (lengths[:2], [*lengths, 60]):
        with pytest.raises(ValueError):
            decoded(table, coded, some, 80, [3])


def test_what_does_not_fit_is_refused(read_by: str) -> None:
    pages = numbers(np.random.default_rng(7), (3, 40))
    table, coded, lengths = encoded(pages)
    with pytest.raises(ValueError):
        decoded(bytes([3]) + table[1:], coded, lengths, 80)
    # No whole pages, and pages of an odd number of bytes.
    with pytest.raises(ValueError):
        decoded(table, coded, lengths, 79)
    with pytest.raises(ValueError):
        decoded(RAW, pages.tobytes(), [80, 80, 80], 79)
    if read_by == "native":
        room = np.zeros(240, dtype=np.uint8)
        for arguments in (
            (pages.reshape(-1), 79, room, np.zeros(3, dtype="<u4")),
            (pages.reshape(-1), 0, room, np.zeros(3, dtype="<u4")),
            (pages.reshape(-1), 80, room[1:], np.zeros(3, dtype="<u4")),
            (pages.reshape(-1), 80, room, np.zeros(2, dtype="<u4")),
        ):
            with pytest.raises(ValueError):
                native.library.encode(*arguments)
        given_ = np.frombuffer(coded, dtype=np.uint8), np.array(lengths, dtype="<u4")
        for page_bytes, arrays in ((0, [room]), (-80, [room]), (80, None), (80, [bytes(240)]), (80, [])):
            with pytest.raises((ValueError, TypeError, BufferError)):
                native.library.decode(table, page_bytes, *given_, arrays)
        with pytest.raises(ValueError):
            native.library.decode(table[:15], 80, *given_, [room])


def test_where_coded_pages_lie() -> None:
    coding = Coding.blank(2, 2, 3)
    coding.lengths[:] = np.arange(12).reshape(2, 2, 3)
    assert coding.n_bytes == 66
    assert coding.span(0, 0, 0, 3) == (0, 3)
    assert coding.span(0, 1, 1, 2) == (6, 9)
    assert coding.span(1, 1, 2, 1) == (55, 11)
    assert coding.span(1, 0, 1, 0) == (21, 0)


@pytest.mark.parametrize(
    "kind, component_bytes, length, fits",
    [
        (0, 80, 80, True),
        (0, 80, 79, False),
        (1, 80, 60, True),
        (1, 80, 100, True),
        (1, 80, 59, False),
        (1, 80, 101, False),
        (1, 79, 70, False),
        (2, 80, 70, True),
        (2, 80, 110, True),
        (2, 80, 69, False),
        (2, 80, 111, False),
        (3, 80, 7, True),
    ],
)
def test_lengths_in_a_header_are_those_of_pages(kind: int, component_bytes: int, length: int, fits: bool) -> None:
    tables, lengths = bytes([kind]) + bytes(15), np.array([length] * 2, dtype="<u4").tobytes()
    if fits:
        coding = Coding.read(tables, lengths, 1, (component_bytes,), 2)
        assert coding.known is (kind < 3)
    else:
        with pytest.raises(ValueError):
            Coding.read(tables, lengths, 1, (component_bytes,), 2)
    for bad in (lengths[:-1], lengths * 2):
        with pytest.raises(ValueError):
            Coding.read(tables, bad, 1, (component_bytes,), 2)
