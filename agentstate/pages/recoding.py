"""Making a coded extent of one that is not."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

import numpy as np

from agentstate.pages import codec
from agentstate.pages.codec import Coding
from agentstate.pages.extent import ExtentHeader, Memory, align
from agentstate.pages.rewriting import read_pages

# The bytes of all pages in one layer and component: uint8, contiguous, of shape (pages, component bytes).
Rows = Callable[[int, int], np.ndarray]


def most_bytes(header: ExtentHeader) -> int:
    """How much room `recode` needs."""
    return _blank(header).data_offset + align(len(header.keys) * header.geometry.page_bytes)


def recode(header: ExtentHeader, rows: Rows, memory: Memory) -> ExtentHeader | None:
    """Make the coded extent of the pages that ``header``, of one that is not coded, has the sums of, in ``memory``,
    which has `most_bytes`: its header, whose ``file_bytes`` it then has. None if it would be no smaller, or only for
    want of padding.

    The pages are not verified; they come out of it as they are.
    """
    coded = _blank(header)
    coding = coded.coding
    assert coding is not None
    into = np.frombuffer(memory, dtype=np.uint8)
    at = coded.data_offset
    for layer in range(header.geometry.layers):
        for component in range(len(header.geometry.component_bytes)):
            lengths = coding.lengths[layer, component]
            pages = rows(layer, component)
            table = codec.encode(pages, into[at : at + pages.size], lengths)
            coding.tables[layer, component] = np.frombuffer(table, dtype=np.uint8)
            at += int(lengths.sum(dtype=np.int64))
    # What was looked up of it before was of a blank one.
    coded = replace(coded)
    if coded.file_bytes >= header.file_bytes or not coding.tables.any():
        return None
    encoded = coded.encode()
    into[: len(encoded)] = np.frombuffer(encoded, dtype=np.uint8)
    into[len(encoded) : coded.data_offset] = 0
    into[at : coded.file_bytes] = 0
    return coded


def _blank(header: ExtentHeader) -> ExtentHeader:
    components = len(header.geometry.component_bytes)
    return replace(header, coding=Coding.blank(header.geometry.layers, components, len(header.keys)), rows=False)


def coded_copy(file: BinaryIO, header: ExtentHeader) -> BinaryIO | None:
    """A coded copy of an extent, as a file in memory, which the caller closes. None if it is coded already, or would be
    no smaller. Raises OSError."""
    if header.coding is not None:
        return None
    sizes = header.geometry.component_bytes
    parts = [np.empty((len(header.keys), size), dtype=np.uint8) for size in sizes]

    def rows(layer: int, component: int) -> np.ndarray:
        if component == 0:
            read_pages(file, header, layer, 0, parts)
        return parts[component]

    copy = os.fdopen(os.memfd_create("coded extent"), "r+b")
    try:
        copy.truncate(most_bytes(header))
        coded = recode(header, rows, mmap.mmap(copy.fileno(), 0))
        if coded is not None:
            copy.truncate(coded.file_bytes)
            return copy
    except BaseException:
        copy.close()
        raise
    copy.close()
    return None
