"""Pages with contents that are known from their names, for the tests of everything that stores them."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np

from agentstate.pages import Geometry, LayerwiseReader, PageStore, Pin, fingerprint

MHA = Geometry(layers=3, page_size=4, component_bytes=(1000, 1000))
MLA = Geometry(layers=2, page_size=4, component_bytes=(1156,))
WIDE = Geometry(layers=2, page_size=64, component_bytes=(8192, 8192))
MARK = fingerprint(model="of the tests")


def key(name: object) -> bytes:
    return hashlib.sha256(str(name).encode()).digest()


def keys(*names: object) -> list[bytes]:
    return [key(name) for name in names]


def content(geometry: Geometry, page: bytes, layer: int, component: int, version: int = 0) -> bytes:
    """What a page holds in one component of one layer: numbers in bfloat16, as KV has them, which can be coded."""
    seed, n_bytes = int.from_bytes(page[:8], "little"), geometry.component_bytes[component]
    chance = np.random.default_rng([seed, layer, component, version])
    numbers = chance.standard_normal(-(-n_bytes // 2), dtype=np.float32).view("<u4") >> 16
    return numbers.astype("<u2").tobytes()[:n_bytes]


def write(store: PageStore, pages: Sequence[bytes], version: int = 0, owner: str = "") -> None:
    """Publish one extent of ``pages``."""
    geometry = store.geometry
    buffer = mmap.mmap(-1, store.draft_bytes(len(pages), owner))
    # Whatever the memory held before must not come out again.
    buffer.write(b"\xa5" * len(buffer))
    draft = store.draft(list(pages), buffer, owner)
    for layer in range(geometry.layers):
        for component in range(len(geometry.component_bytes)):
            rows = draft.component(layer, component)
            for slot, page in enumerate(pages):
                rows[slot] = np.frombuffer(content(geometry, page, layer, component, version), dtype=np.uint8)
    store.publish(draft)


def drop(store: PageStore, *pages: bytes) -> int:
    """Drop the copies that serve ``pages`` now, of those that are stored."""
    with store.pin([page for page in pages if page in store]) as pin:
        copies = pin.copies(range(len(pin.keys)))
    return store.drop(copies)


def traces(directory: Path, geometry: Geometry, pages: Sequence[bytes], versions: Sequence[int] = (0,)) -> set[bytes]:
    """Those of ``pages`` of which some file below ``directory`` has bytes, as they are or coded: of any component of
    any layer the first or the last 64, which no two pages have in common."""
    ends: dict[bytes, bytes] = {}
    components = range(len(geometry.component_bytes))
    for page, version, layer, component in product(pages, versions, range(geometry.layers), components):
        data = content(geometry, page, layer, component, version)
        numbers = np.frombuffer(data[: len(data) // 2 * 2], dtype="<u2")
        # What coding leaves as it is: signs and mantissas.
        rest = (numbers & 0x7F | numbers >> 8 & 0x80).astype(np.uint8).tobytes()
        ends |= dict.fromkeys((data[:64], data[-64:], rest[:64], rest[-64:]), page)
    files = [_content(path) for path in directory.rglob("*") if path.is_file()]
    return {page for end, page in ends.items() if any(end in data for data in files)}


def _content(path: Path) -> bytes:
    """Nothing, if the file has been deleted in the meantime."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def reader_for(geometry: Geometry, chunk_bytes: int = 1 << 20) -> LayerwiseReader:
    return LayerwiseReader(geometry, staging_bytes=4 * chunk_bytes, threads=2, chunk_bytes=chunk_bytes)


def _borrowed(pin: Pin) -> Pin:
    """A pin of the same pages that a stream may close without letting go of them."""
    return Pin(pin.fingerprint, pin.keys, pin.segments, lambda: None)


def read(reader: LayerwiseReader, pins: Sequence[Pin]) -> dict[tuple[int, int, int], list[bytes] | None]:
    """The components of every (request, layer, page) that may be used; None for a page that may not. The pins stay."""
    streams = [reader.open(_borrowed(pin)) for pin in pins]
    found: dict[tuple[int, int, int], list[bytes] | None] = {}
    for stream in streams:
        stream.hurry()
    for layer in range(reader.geometry.layers):
        for number, stream in enumerate(streams):
            for chunk in stream.layer(layer):
                unusable = chunk.unusable()
                for page in range(chunk.first, chunk.first + chunk.count):
                    found[number, layer, page] = None
                for segment, arrays in chunk.parts:
                    for i, page in enumerate(range(segment.first, segment.first + segment.pages)):
                        if page not in unusable:
                            found[number, layer, page] = [array[i].tobytes() for array in arrays]
    for stream in streams:
        stream.close()
    return found


def expected(
    geometry: Geometry, requests: Sequence[Pin], version: int = 0
) -> dict[tuple[int, int, int], list[bytes] | None]:
    """What `read` gives for undamaged pages."""
    components = range(len(geometry.component_bytes))
    return {
        (number, layer, page): [content(geometry, name, layer, component, version) for component in components]
        for number, request in enumerate(requests)
        for layer in range(geometry.layers)
        for page, name in enumerate(request.keys)
    }
