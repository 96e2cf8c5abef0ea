"""The extent: one file that holds a run of pages, layer by layer.

::

    0         magic, version, length and xxh3 of the header        PREFIX, little-endian
    24        header, one msgpack map                              see `ExtentHeader`
    A         slab of layer 0                                      A = the header's end, rounded up to 4 KiB
    A + S     slab of layer 1                                      S = bytes of a slab, rounded up to 4 KiB
    ...

A slab holds its layer of every page, component by component (K of all pages, then V of all pages; MLA has one
component), so that one range of the file is a whole layer of the run. Numbers are little-endian. A reader that does
not know the version refuses the file; it never guesses.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgpack
import numpy as np
import xxhash

from agentstate.errors import BadExtent, UnknownFormat

ALIGNMENT = 4096
FORMAT_VERSION = 1
KEY_BYTES = 32
MAGIC = b"AGSEXTNT"
PREFIX = struct.Struct("<8sIIQ")

# Writable bytes that begin at a page of 4 KiB.
Memory = mmap.mmap | np.ndarray

_MASK = (1 << 64) - 1


def align(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Geometry:
    """What a page is made of on one rank: ``layers`` layers, each with ``component_bytes`` (K and V, or the one
    latent of MLA) bytes for the ``page_size`` tokens of a page."""

    layers: int
    page_size: int
    component_bytes: tuple[int, ...]

    @property
    def layer_bytes(self) -> int:
        """Bytes of one page in one layer."""
        return sum(self.component_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.layers * self.layer_bytes

    def slab_bytes(self, pages: int) -> int:
        """Bytes of one layer's slab in an extent of ``pages`` pages, padding included."""
        return align(pages * self.layer_bytes)


def checksum(seed: int, layer: int, components: list[Any]) -> int:
    """xxh3 of one page's bytes in one layer.

    ``seed`` comes from `page_seed`: the sum covers which page and which layer the bytes are, so that intact bytes in
    the wrong place (an index gone wrong, a block that the device misplaced) fail as surely as a flipped bit.
    """
    value = (seed + layer) & _MASK
    for component in components:
        value = xxhash.xxh3_64_intdigest(component, seed=value)
    return value


def page_seed(fingerprint: bytes, key: bytes) -> int:
    return xxhash.xxh3_64_intdigest(fingerprint + key)


@dataclass(frozen=True)
class ExtentLayout:
    """Where everything lies in an extent of ``pages`` pages: it follows from their number and geometry alone."""

    geometry: Geometry
    pages: int

    @property
    def data_offset(self) -> int:
        """Where the first slab starts: what the prefix and the header take, rounded up to 4 KiB."""
        return _data_offset(self.geometry, self.pages)

    @property
    def slab_bytes(self) -> int:
        return self.geometry.slab_bytes(self.pages)

    @property
    def file_bytes(self) -> int:
        return self.data_offset + self.geometry.layers * self.slab_bytes

    def component_range(self, layer: int, component: int, slot: int, count: int) -> tuple[int, int]:
        """Offset in the file and length, in bytes, of ``count`` pages from ``slot`` on."""
        sizes = self.geometry.component_bytes
        start = self.data_offset + layer * self.slab_bytes + self.pages * sum(sizes[:component])
        return start + slot * sizes[component], count * sizes[component]


@lru_cache(maxsize=1024)
def _data_offset(geometry: Geometry, pages: int) -> int:
    # The length of the msgpack map depends on the number of pages alone, for its blobs have fixed widths.
    blank = np.zeros((geometry.layers, pages), dtype="<u8")
    header = ExtentHeader(bytes(KEY_BYTES), geometry, (bytes(KEY_BYTES),) * pages, blank)
    return align(PREFIX.size + len(header.packed()))


@dataclass(frozen=True)
class ExtentHeader:
    """What an extent says of itself.

    ``keys`` are the pages' 32-byte keys in slot order; ``checksums`` has shape (layers, pages), uint64.
    """

    fingerprint: bytes
    geometry: Geometry
    keys: tuple[bytes, ...]
    checksums: np.ndarray

    @property
    def layout(self) -> ExtentLayout:
        return ExtentLayout(self.geometry, len(self.keys))

    def packed(self) -> bytes:
        """The header's msgpack map."""
        packed: bytes = msgpack.packb(
            {
                "fingerprint": self.fingerprint,
                "page_size": self.geometry.page_size,
                "layers": self.geometry.layers,
                "planes": [{"codec": "raw", "components": list(self.geometry.component_bytes)}],
                "keys": b"".join(self.keys),
                "checksum": "xxh3-64",
                "checksums": self.checksums.astype("<u8", copy=False).tobytes(),
            },
            use_bin_type=True,
        )
        return packed

    def encode(self) -> bytes:
        """The first bytes of the file, all but the zeros that pad them to ``layout.data_offset``."""
        packed = self.packed()
        return PREFIX.pack(MAGIC, FORMAT_VERSION, len(packed), xxhash.xxh3_64_intdigest(packed)) + packed

    @classmethod
    def decode(cls, raw: bytes | memoryview, name: str) -> ExtentHeader:
        """Read a header back. ``name`` is for the message of the BadExtent that is raised for anything that this
        version did not write: wrong magic, a damaged header, blobs of the wrong length; UnknownFormat for another
        version, codec or checksum."""
        raw = memoryview(raw)
        if len(raw) < PREFIX.size:
            raise BadExtent(f"{name}: shorter than an extent's prefix")
        magic, version, length, digest = PREFIX.unpack_from(raw)
        if magic != MAGIC:
            raise BadExtent(f"{name}: not an extent file")
        packed = raw[PREFIX.size : PREFIX.size + length]
        if len(packed) != length or xxhash.xxh3_64_intdigest(packed) != digest:
            raise BadExtent(f"{name}: the header is damaged")
        if version != FORMAT_VERSION:
            raise UnknownFormat(f"{name}: format version {version}; this release reads version {FORMAT_VERSION}")
        try:
            fields = msgpack.unpackb(packed, raw=False)
            (plane,) = fields["planes"]
            if plane["codec"] != "raw" or fields["checksum"] != "xxh3-64":
                raise UnknownFormat(f"{name}: unknown codec {plane['codec']!r} or checksum {fields['checksum']!r}")
            geometry = Geometry(fields["layers"], fields["page_size"], tuple(plane["components"]))
            blob = fields["keys"]
            if len(blob) % KEY_BYTES:
                raise BadExtent(f"{name}: {len(blob)} bytes of keys are no whole keys of {KEY_BYTES}")
            keys = tuple(blob[i : i + KEY_BYTES] for i in range(0, len(blob), KEY_BYTES))
            sums = np.frombuffer(fields["checksums"], dtype="<u8").reshape(geometry.layers, len(keys))
            header = cls(fields["fingerprint"], geometry, keys, sums)
            if align(PREFIX.size + length) != header.layout.data_offset:
                raise BadExtent(f"{name}: the header has {length} bytes, which its fields do not add up to")
            return header
        except (KeyError, TypeError, ValueError) as error:
            raise BadExtent(f"{name}: the header misses or misstates a field: {error!r}") from error


class ExtentDraft:
    """An extent under construction in page-aligned memory: the caller fills `component` for every layer, then hands
    the draft to `PageStore.publish`. The memory is ``buffer``'s and may be reused after that."""

    def __init__(self, fingerprint: bytes, geometry: Geometry, keys: list[bytes], buffer: Memory):
        if any(len(key) != KEY_BYTES for key in [fingerprint, *keys]):
            raise ValueError(f"keys and fingerprints have {KEY_BYTES} bytes")
        self.keys = tuple(keys)
        self.geometry = geometry
        self.fingerprint = fingerprint
        self.layout = ExtentLayout(geometry, len(keys))
        self.n_bytes = self.layout.file_bytes
        if self.n_bytes > len(buffer):
            raise ValueError(f"a draft of {self.n_bytes} bytes does not fit a buffer of {len(buffer)}")
        self._bytes = np.frombuffer(buffer, dtype=np.uint8, count=self.n_bytes)
        self._sealed: tuple[ExtentHeader, memoryview] | None = None

    def component(self, layer: int, component: int) -> np.ndarray:
        """Where the caller puts all pages' bytes of one component: uint8, shape (pages, component bytes)."""
        start, length = self.layout.component_range(layer, component, 0, len(self.keys))
        return self._bytes[start : start + length].reshape(len(self.keys), self.geometry.component_bytes[component])

    def seal(self) -> tuple[ExtentHeader, memoryview]:
        """Checksum every page and write the header, after which nothing is filled any more: the header, and the whole
        file's bytes. `PageStore.publish` does it where it has not been done."""
        if self._sealed is not None:
            return self._sealed
        pages, layers = len(self.keys), self.geometry.layers
        sums = np.empty((layers, pages), dtype="<u8")
        seeds = [page_seed(self.fingerprint, key) for key in self.keys]
        for layer in range(layers):
            parts = [self.component(layer, c) for c in range(len(self.geometry.component_bytes))]
            for slot, seed in enumerate(seeds):
                sums[layer, slot] = checksum(seed, layer, [part[slot] for part in parts])
            start = self.layout.data_offset + layer * self.layout.slab_bytes
            self._bytes[start + pages * self.geometry.layer_bytes : start + self.layout.slab_bytes] = 0
        header = ExtentHeader(self.fingerprint, self.geometry, self.keys, sums)
        encoded = header.encode()
        self._bytes[: len(encoded)] = np.frombuffer(encoded, dtype=np.uint8)
        self._bytes[len(encoded) : self.layout.data_offset] = 0
        self._sealed = header, memoryview(self._bytes.data)
        return self._sealed
