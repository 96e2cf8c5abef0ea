"""Copying some pages of an extent into a draft, so that the rest of it can go."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import BinaryIO

import numpy as np

from agentstate.pages.extent import ExtentDraft, ExtentHeader
from agentstate.pages.handles import is_of_drive, patiently


def copy_pages(file: BinaryIO, header: ExtentHeader, slots: Sequence[int], draft: ExtentDraft) -> set[int]:
    """Fill ``draft`` with the pages in ``slots`` of an extent, one after the other: those of ``slots`` whose bytes are
    not those that were written, or that the drive does not give back, twice in a row. If there are any, the draft is of
    no use.

    Raises OSError where the system, and not the drive, refuses to read.
    """
    wrong: set[int] = set()
    for layer in range(header.geometry.layers):
        for row, run in _runs(slots):
            wrong |= _copy(file, header, layer, run, draft, row)
    return wrong


def _copy(file: BinaryIO, header: ExtentHeader, layer: int, run: range, draft: ExtentDraft, row: int) -> set[int]:
    components = range(len(header.geometry.component_bytes))
    parts = [draft.component(layer, component)[row : row + len(run)] for component in components]
    try:
        patiently(partial(read_pages, file, header, layer, run.start, parts))
    except OSError as error:
        if not is_of_drive(error):
            raise
        if len(run) == 1:
            return set(run)
        # Of a run with a bad block only the pages on that block are lost.
        each = enumerate(run, row)
        return set().union(*(_copy(file, header, layer, range(slot, slot + 1), draft, at) for at, slot in each))
    return set(header.wrong_slots(layer, run.start, [[part] for part in parts]))


def read_pages(file: BinaryIO, header: ExtentHeader, layer: int, slot: int, components: Sequence[np.ndarray]) -> None:
    """Fill ``components``, each contiguous, uint8 and of shape (pages, component bytes), with an extent's pages from
    ``slot`` on in one layer. Nothing is verified. Raises OSError like `read_at`."""
    for component, rows in enumerate(components):
        offset, n_bytes = header.component_range(layer, component, slot, len(rows))
        if header.coding is None:
            read_at(file, rows.data.cast("B"), offset)
            continue
        coded = np.empty(n_bytes, dtype=np.uint8)
        read_at(file, coded.data, offset)
        header.coding.decode(layer, component, slot, rows.shape[1], coded, [rows])


def read_at(file: BinaryIO, into: memoryview, offset: int) -> None:
    """Fill ``into`` from ``offset`` on. Raises OSError, also where the file ends before.

    Not through a mapping: there a block that cannot be read would be a signal and not an error.
    """
    done = 0
    while done < len(into):
        got = os.preadv(file.fileno(), [into[done:]], offset + done)
        if got == 0:
            raise OSError(f"{file.name} ends in the middle of a page")
        done += got


def _runs(slots: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Slots that follow each other, as one range, with the position of the first of them in ``slots``."""
    start = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[end - 1] + 1:
            yield start, range(slots[start], slots[end - 1] + 1)
            start = end
