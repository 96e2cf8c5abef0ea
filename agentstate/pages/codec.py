"""Coding pages without loss, for where bytes cost more than the processor: a link, or a slow drive.

Exponents of KV hardly vary. In bfloat16, where they are half of the bits, 15 of them get a code of four bits, and the
others, which are rare, are written out. Signs and mantissas stay as they are. That makes 12 bits of 16, and decoding is
a look-up and a shuffle; an entropy coder would save a twelfth more, and decode several times slower. In float16 seven
exponents of five bits get a code of three, which makes 14 of 16. Which numbers a component consists of is not asked: it
is coded in the way that makes it smallest, if any does, and the bits come back in any case.

Nothing here tells right bytes from wrong ones. Pages have the checksums of their decoded bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from agentstate.pages import native

Codec = Literal["raw", "lossless"]

TABLE_BYTES = 16
RAW = bytes(TABLE_BYTES)
"""The table of a component that is not coded."""

_RAW, _BF16, _FP16 = range(3)
# How many exponents have a code. The code behind the last one is for all others.
_CODES = {_BF16: 15, _FP16: 7}
# A component is coded if that saves one byte in so many.
_LEAST_SAVING = 16


def encode(pages: np.ndarray, into: np.ndarray, lengths: np.ndarray) -> bytes:
    """Code ``pages``, uint8 of shape (pages, page bytes) and contiguous, to the beginning of ``into``, which has room
    for as many bytes, and enter in ``lengths``, uint32 of shape (pages,), how many each takes. Returns the table that
    decodes them: `RAW`, and they are copied, where coding would save less than a sixteenth.

    The same bytes give the same code, on every machine.
    """
    count, page_bytes = pages.shape
    if native.library is not None:
        table: bytes = native.library.encode(pages.reshape(-1), page_bytes, into, lengths)
        return table
    return _encode(pages, into, lengths)


def decode(table: bytes, page_bytes: int, coded: np.ndarray, lengths: np.ndarray, arrays: Sequence[Any]) -> None:
    """Decode pages to ``arrays``, consecutive contiguous ones of shape (pages, ``page_bytes``): ``coded`` are their
    bytes, side by side, and ``lengths`` says how many each has. Raises ValueError for lengths that no pages have.

    Damaged bytes make other pages, and nothing else.
    """
    if native.library is not None:
        native.library.decode(table, page_bytes, coded, lengths, arrays)
        return
    _decode(table, page_bytes, coded, lengths, arrays)


def _fixed_bytes(kind: int, numbers: int) -> int:
    """How many bytes a page of so many numbers has before its escapes."""
    return numbers + (numbers + 1) // 2 + ((numbers + 3) // 4 if kind == _FP16 else 0)


def _chosen(pages: np.ndarray) -> tuple[int, np.ndarray]:
    """The kind by which pages take the fewest bytes, and the exponents that have a code, in order."""
    count, page_bytes = pages.shape
    best, least = (_RAW, np.empty(0, dtype=np.uint8)), pages.size - pages.size // _LEAST_SAVING + 1
    if page_bytes % 2 or not count:
        return best
    numbers = page_bytes // 2
    uppers = np.bincount((pages.view("<u2") >> 7).astype(np.uint8).reshape(-1), minlength=256)
    for kind, counts in ((_BF16, uppers), (_FP16, uppers.reshape(32, 8).sum(axis=1))):
        exponents = np.argsort(-counts, kind="stable")[: _CODES[kind]]
        escapes = count * numbers - int(counts[exponents].sum())
        n_bytes = count * _fixed_bytes(kind, numbers) + escapes
        if n_bytes < least:
            best, least = (kind, exponents.astype(np.uint8)), n_bytes
    return best


def _encode(pages: np.ndarray, into: np.ndarray, lengths: np.ndarray) -> bytes:
    count, page_bytes = pages.shape
    kind, chosen = _chosen(pages)
    if kind == _RAW:
        into[: pages.size] = pages.reshape(-1)
        lengths[:] = page_bytes
        return RAW
    escape, at = _CODES[kind], 0
    code_of = np.full(256, escape, dtype=np.uint8)
    code_of[chosen] = np.arange(len(chosen), dtype=np.uint8)
    for number, page in enumerate(pages.view("<u2")):
        parts = []
        if kind == _BF16:
            exponents = (page >> 7).astype(np.uint8)
            halves = codes = code_of[exponents]
            parts.append((page & 0x7F | page >> 8 & 0x80).astype(np.uint8))
        else:
            exponents = (page >> 10 & 0x1F).astype(np.uint8)
            codes = code_of[exponents]
            halves = codes | (page >> 12 & 8).astype(np.uint8)
            parts.append(page.astype(np.uint8))
        parts.append(_packed(halves, 2))
        if kind == _FP16:
            parts.append(_packed((page >> 8 & 3).astype(np.uint8), 4))
        parts.append(exponents[codes == escape])
        length = sum(map(len, parts))
        np.concatenate(parts, out=into[at : at + length])
        lengths[number] = length
        at += length
    return (bytes([kind]) + chosen.tobytes()).ljust(TABLE_BYTES, b"\0")


def _packed(values: np.ndarray, a_byte: int) -> np.ndarray:
    """So many values a byte, the first one lowest."""
    padded = np.zeros(-(-len(values) // a_byte) * a_byte, dtype=np.uint8)
    padded[: len(values)] = values
    shifts = np.arange(a_byte, dtype=np.uint8) * (8 // a_byte)
    found: np.ndarray = np.bitwise_or.reduce(padded.reshape(-1, a_byte) << shifts, axis=1)
    return found


def _unpacked(packed: np.ndarray, a_byte: int, count: int) -> np.ndarray:
    bits = 8 // a_byte
    shifts = np.arange(a_byte, dtype=np.uint8) * bits
    found: np.ndarray = (packed[:, None] >> shifts & (1 << bits) - 1).reshape(-1)[:count].astype(np.uint16)
    return found


def _decode(table: bytes, page_bytes: int, coded: np.ndarray, lengths: np.ndarray, arrays: Sequence[Any]) -> None:
    kind = table[0]
    rows = [row for array in arrays for row in np.asarray(array).reshape(-1, page_bytes)]
    if len(rows) != len(lengths) or int(lengths.sum(dtype=np.int64)) != len(coded) or kind not in (_RAW, *_CODES):
        raise ValueError("no coded pages of these lengths")
    at = 0
    for row, length in zip(rows, lengths.tolist(), strict=True):
        page = coded[at : at + length]
        at += length
        least = page_bytes if kind == _RAW else _fixed_bytes(kind, page_bytes // 2)
        if length < least or (length > least if kind == _RAW else page_bytes % 2):
            raise ValueError("no coded pages of these lengths")
        row[:] = page if kind == _RAW else _decoded(table, page, page_bytes // 2).view(np.uint8)


def _decoded(table: bytes, page: np.ndarray, numbers: int) -> np.ndarray:
    """A page's numbers, of 16 bits."""
    kind = table[0]
    escape, end = _CODES[kind], numbers + (numbers + 1) // 2
    rest, halves = page[:numbers].astype(np.uint16), _unpacked(page[numbers:end], 2, numbers)
    codes = halves & escape
    exponents = np.frombuffer(table[1 : 1 + escape] + b"\0", dtype=np.uint8)[codes].astype(np.uint16)
    # As many as there are: of damaged bytes there may be fewer or more.
    escaped, given = np.flatnonzero(codes == escape), page[_fixed_bytes(kind, numbers) :]
    some = min(len(escaped), len(given))
    exponents[escaped[:some]] = given[:some]
    if kind == _BF16:
        words = exponents << 7 | rest & 0x7F | (rest & 0x80) << 8
    else:
        twos = _unpacked(page[end : _fixed_bytes(kind, numbers)], 4, numbers)
        words = (halves & 8) << 12 | (exponents & 0x1F) << 10 | twos << 8 | rest
    found: np.ndarray = words.astype("<u2")
    return found


@dataclass(frozen=True)
class Coding:
    """How the pages of an extent are coded, and where they lie: side by side, those of a component in slot order, the
    components of a layer in order, and layer after layer.

    ``tables``, uint8 of shape (layers, components, 16), decode them; ``lengths``, uint32 of shape (layers, components,
    pages), are their bytes.
    """

    tables: np.ndarray
    lengths: np.ndarray

    @classmethod
    def blank(cls, layers: int, components: int, pages: int) -> Coding:
        """One to be filled."""
        tables = np.zeros((layers, components, TABLE_BYTES), dtype=np.uint8)
        return cls(tables, np.zeros((layers, components, pages), dtype="<u4"))

    @classmethod
    def read(cls, tables: bytes, lengths: bytes, layers: int, component_bytes: Sequence[int], pages: int) -> Coding:
        """Raises ValueError for lengths that no pages have; whether a table is known says `known`."""
        shape = layers, len(component_bytes)
        coding = cls(
            np.frombuffer(tables, dtype=np.uint8).reshape(*shape, TABLE_BYTES),
            np.frombuffer(lengths, dtype="<u4").reshape(*shape, pages),
        )
        for component, page_bytes in enumerate(component_bytes):
            kinds, found = coding.tables[:, component, 0], coding.lengths[:, component]
            if (found[kinds == _RAW] != page_bytes).any():
                raise ValueError("pages that are not coded have other lengths")
            for kind in _CODES:
                coded, numbers = found[kinds == kind], page_bytes // 2
                least = _fixed_bytes(kind, numbers)
                if coded.size and (page_bytes % 2 or coded.min() < least or coded.max() > least + numbers):
                    raise ValueError("no coded page has such a length")
        return coding

    @property
    def known(self) -> bool:
        """Whether this release can decode it."""
        return bool((self.tables[:, :, 0] <= max(_CODES)).all())

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each component of each layer starts, and where the last one ends."""
        sums = self.lengths.sum(axis=2, dtype=np.int64).reshape(-1)
        return np.concatenate([[0], np.cumsum(sums)])

    @cached_property
    def n_bytes(self) -> int:
        """All of the pages' bytes."""
        return int(self._starts[-1])

    def span(self, layer: int, component: int, slot: int, count: int) -> tuple[int, int]:
        """Where ``count`` pages from ``slot`` on start, counted from the first page of the extent, and their bytes."""
        lengths = self.lengths[layer, component]
        start = int(self._starts[layer * self.lengths.shape[1] + component])
        before = int(lengths[:slot].sum(dtype=np.int64))
        return start + before, int(lengths[slot : slot + count].sum(dtype=np.int64))

    def decode(
        self, layer: int, component: int, slot: int, page_bytes: int, coded: np.ndarray, arrays: Sequence[Any]
    ) -> None:
        """Decode the pages from ``slot`` on, of which ``coded`` are the bytes, to consecutive ``arrays`` of whole
        pages. Raises ValueError like `decode`."""
        count = sum(len(array) for array in arrays)
        lengths = self.lengths[layer, component, slot : slot + count]
        decode(self.tables[layer, component].tobytes(), page_bytes, coded, lengths, arrays)
