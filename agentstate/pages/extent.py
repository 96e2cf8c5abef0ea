"""The extent: one file that holds a run of pages, layer by layer.

::

    0         magic, version, length and xxh3 of the header        PREFIX, little-endian
    24        header, one msgpack map                              see `ExtentHeader`
    A         slab of layer 0                                      A = the header's end, rounded up to 4 KiB
    A + S     slab of layer 1                                      S = bytes of a slab, rounded up to 4 KiB
    ...
    B         sums of every sector of 4 KiB of every slab           only where rows can be read alone

A slab holds its layer of every page, component by component (K of all pages, then V of all pages; MLA has one
component), so that one range of the file is a whole layer of the run. Numbers are little-endian. A reader that does
not know the version refuses the file; it never guesses.

An extent has one owner, whom its bytes are charged to; none is "". The owner's name is in the header, where releases
that do not know of owners pass over it. They compute where the slabs begin from the other fields, and the name mostly
fits into the padding before that. Where it does not, the slabs begin 4 KiB later, and the extent is of version 3, which
those releases leave alone.

Pages may be coded (`codec`): the extent is of version 4, they lie side by side without padding between the layers, and
the header says how many bytes each has in each component.

Every page has a checksum a layer, and so has every block of pages: a block is verified in one call instead of one a
page, and that call releases Python's interpreter lock. Beside a forward, holding the lock is the largest cost of
verifying.

Where asked for, the extent also has a checksum a sector, 4 KiB, of every slab, so that a token's row can be read and
verified without its page. They lie behind the slabs, layer by layer: a layer's sums can be read alone, and nothing that
is read before the first layer grows by them. Such an extent is of version 5.
"""

from __future__ import annotations

import mmap
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain
from typing import Any, NamedTuple

import msgpack
import numpy as np
import xxhash

from agentstate.errors import BadExtent, UnknownFormat
from agentstate.pages import native
from agentstate.pages.codec import Coding
from agentstate.pages.keys import KEY_BYTES, PageKeys

ALIGNMENT = 4096
FORMAT_VERSION = 2
# An extent whose slabs begin later than those of version 2, because of its owner's name.
_SHIFTED_VERSION = 3
# An extent whose pages are coded.
_CODED_VERSION = 4
# An extent with a checksum a sector.
_ROWS_VERSION = 5
MAGIC = b"AGSEXTNT"
PREFIX = struct.Struct("<8sIIQ")

# Writable bytes that begin at a page of 4 KiB.
Memory = mmap.mmap | np.ndarray

# The longest name of an owner, in UTF-8.
MOST_OWNER_BYTES = 1024

# What is read and verified of a page alone: the unit in which drives read.
SECTOR_BYTES = ALIGNMENT

_MASK = (1 << 64) - 1
_BLOCK_BYTES = 1 << 20


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

    @cached_property
    def block_pages(self) -> int:
        """How many pages a block has: as many as 1 MiB of the smallest component takes."""
        return -(-_BLOCK_BYTES // min(self.component_bytes))

    def blocks(self, pages: int) -> int:
        """How many blocks an extent of ``pages`` pages has; the last one may be smaller."""
        return -(-pages // self.block_pages)

    def slab_bytes(self, pages: int) -> int:
        """Bytes of one layer's slab in an extent of ``pages`` pages, padding included."""
        return align(pages * self.layer_bytes)


def checksum(seed: int, layer: int, components: Sequence[Sequence[Any]]) -> int:
    """xxh3 of the bytes of a page, or of a block of them, in one layer: of each component the arrays that follow each
    other.

    ``seed`` comes from `page_seed` or `block_seed`: the sum covers which pages and which layer the bytes are, so that
    intact bytes in the wrong place (an index gone wrong, a block that the device misplaced) fail as surely as a flipped
    bit.
    """
    value = (seed + layer) & _MASK
    for arrays in components:
        if len(arrays) == 1:
            value = xxhash.xxh3_64_intdigest(arrays[0], seed=value)
            continue
        hasher = xxhash.xxh3_64(seed=value)
        for array in arrays:
            hasher.update(array)
        value = hasher.intdigest()
    return value


def page_seed(fingerprint: bytes, key: bytes) -> int:
    return xxhash.xxh3_64_intdigest(fingerprint + key)


def block_seed(fingerprint: bytes, keys: Sequence[bytes]) -> int:
    return page_seed(fingerprint, PageKeys.of(keys).packed)


class Range(NamedTuple):
    """Bytes ``[start, end)`` of a slab, and in them the offset in the slab and the length of each component."""

    start: int
    end: int
    components: list[tuple[int, int]]


@dataclass(frozen=True)
class ExtentLayout:
    """Where everything lies in an extent of ``pages`` pages: it follows from their number, their geometry, the owner's
    name and whether ``rows`` can be read alone."""

    geometry: Geometry
    pages: int
    owner: str = ""
    rows: bool = False

    @classmethod
    def of_file(cls, geometry: Geometry, pages: int, owner: str, file_bytes: int) -> ExtentLayout:
        """That of a file of ``file_bytes``, which tells whether rows can be read alone. Less than 4 KiB may be behind
        the extent."""
        # The sums alone take 4 KiB or more.
        layout = cls(geometry, pages, owner, rows=True)
        return layout if file_bytes >= layout.file_bytes else cls(geometry, pages, owner)

    @cached_property
    def data_offset(self) -> int:
        """Where the first slab starts: what the prefix and the header take, rounded up to 4 KiB."""
        return align(_head_bytes(self.geometry, self.pages, self.rows) + len(_packed_owner(self.owner)))

    def agrees(self, other: ExtentLayout) -> bool:
        """Whether everything lies in the same places, whoever the owners are."""
        here = (self.geometry, self.pages, self.data_offset, self.rows)
        return here == (other.geometry, other.pages, other.data_offset, other.rows)

    @property
    def shifted(self) -> bool:
        """Whether the slabs start later than they would without an owner."""
        return bool(self.owner) and self.data_offset > align(_head_bytes(self.geometry, self.pages, self.rows))

    @cached_property
    def slab_bytes(self) -> int:
        return self.geometry.slab_bytes(self.pages)

    @property
    def sectors(self) -> int:
        """How many sectors a slab has."""
        return self.slab_bytes // SECTOR_BYTES

    @cached_property
    def file_bytes(self) -> int:
        slabs = self.data_offset + self.geometry.layers * self.slab_bytes
        return slabs + align(8 * self.geometry.layers * self.sectors) if self.rows else slabs

    def sector_sums(self, layer: int, layers: int) -> tuple[int, int]:
        """Offset in the file and length, in bytes, of the sums of the sectors of some layers, from ``layer`` on."""
        sums = 8 * self.sectors
        return self.layer_offset(self.geometry.layers) + layer * sums, layers * sums

    def layer_offset(self, layer: int) -> int:
        """Where a layer's slab starts in the file: a multiple of 4 KiB."""
        return self.data_offset + layer * self.slab_bytes

    def component_range(self, layer: int, component: int, slot: int, count: int) -> tuple[int, int]:
        """Offset in the file and length, in bytes, of ``count`` pages from ``slot`` on."""
        offset, length = self._in_slab(component, slot, count)
        return self.layer_offset(layer) + offset, length

    def ranges(self, slot: int, count: int) -> list[Range]:
        """The ranges of every layer's slab that hold ``count`` pages from ``slot`` on; adjacent components are one."""
        found = self._ranges.get((slot, count))
        if found is None:
            members: list[tuple[int, int]] = []
            found = []
            for component in range(len(self.geometry.component_bytes)):
                offset, length = self._in_slab(component, slot, count)
                if members and sum(members[-1]) != offset:
                    found.append(Range(members[0][0], sum(members[-1]), members))
                    members = []
                members.append((offset, length))
            found.append(Range(members[0][0], sum(members[-1]), members))
            self._ranges[slot, count] = found
        return found

    @cached_property
    def _ranges(self) -> dict[tuple[int, int], list[Range]]:
        return {}

    def _in_slab(self, component: int, slot: int, count: int) -> tuple[int, int]:
        sizes = self.geometry.component_bytes
        return self.pages * sum(sizes[:component]) + slot * sizes[component], count * sizes[component]


@lru_cache(maxsize=1024)
def _head_bytes(geometry: Geometry, pages: int, rows: bool) -> int:
    """Bytes of the prefix and of a header without an owner."""
    # The length of the msgpack map depends on the number of pages alone, since its blobs have fixed widths.
    header = ExtentHeader.blank(bytes(KEY_BYTES), geometry, PageKeys(bytes(KEY_BYTES * pages)), rows=rows)
    return PREFIX.size + len(header.packed())


def _packed_owner(owner: str) -> bytes:
    """What an owner adds to the header's map."""
    return msgpack.packb("owner") + msgpack.packb(owner) if owner else b""


@dataclass(frozen=True)
class ExtentHeader:
    """What an extent says of itself.

    ``keys`` are the pages' 32-byte keys in slot order; ``checksums`` has shape (layers, pages), uint64, and
    ``block_checksums`` (layers, blocks): those of the pages' own bytes, coded or not. ``owner`` is whom the extent's
    bytes are charged to. ``coding`` says how the pages are coded; None: they lie as the ``layout`` says. With ``rows``
    the extent has a sum a sector too, which the header has not; then it is not coded.
    """

    fingerprint: bytes
    geometry: Geometry
    keys: PageKeys
    checksums: np.ndarray
    block_checksums: np.ndarray
    owner: str = ""
    coding: Coding | None = None
    rows: bool = False

    @cached_property
    def layout(self) -> ExtentLayout:
        """Where everything lies if the pages are not coded."""
        return ExtentLayout(self.geometry, len(self.keys), self.owner, self.rows)

    @cached_property
    def data_offset(self) -> int:
        """Where the first layer starts in the file."""
        return self.layout.data_offset if self.coding is None else align(PREFIX.size + len(self.packed()))

    @property
    def file_bytes(self) -> int:
        if self.coding is None:
            return self.layout.file_bytes
        return align(self.data_offset + self.coding.n_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in the file: of coded pages the mean."""
        return self.geometry.page_bytes if self.coding is None else self.coding.n_bytes // max(1, len(self.keys))

    def component_range(self, layer: int, component: int, slot: int, count: int) -> tuple[int, int]:
        """Offset in the file and length, in bytes, of ``count`` pages from ``slot`` on, coded or not."""
        if self.coding is None:
            return self.layout.component_range(layer, component, slot, count)
        offset, length = self.coding.span(layer, component, slot, count)
        return self.data_offset + offset, length

    @classmethod
    def blank(
        cls, fingerprint: bytes, geometry: Geometry, keys: PageKeys, owner: str = "", *, rows: bool = False
    ) -> ExtentHeader:
        """A header whose checksums are zero until `sum_up` enters them."""
        pages, blocks = (
            np.zeros((geometry.layers, count), dtype="<u8") for count in (len(keys), geometry.blocks(len(keys)))
        )
        return cls(fingerprint, geometry, keys, pages, blocks, owner, rows=rows)

    def sector_seed(self, layer: int) -> int:
        """The seed of the sum of a layer's first sector; that of each next one is larger by 1, modulo 2**64. So a sum
        covers of which pages, in which layer and where in the slab a sector is."""
        return (self._sector_seed + layer * self.layout.sectors) & _MASK

    @cached_property
    def _sector_seed(self) -> int:
        return block_seed(self.fingerprint, self.keys)

    def sum_up_sectors(self, layer: int, slab: np.ndarray) -> np.ndarray:
        """The sums of a layer's sectors, little-endian uint64: ``slab`` is all of its bytes."""
        sums = np.empty(self.layout.sectors, dtype="<u8")
        seed = self.sector_seed(layer)
        if native.library is not None:
            native.library.sector_sums(slab, seed, sums)
        else:
            sums[:] = [
                xxhash.xxh3_64_intdigest(sector.data, seed=(seed + number) & _MASK)
                for number, sector in enumerate(slab.reshape(-1, SECTOR_BYTES))
            ]
        return sums

    @cached_property
    def _page_seeds(self) -> list[int]:
        return [xxhash.xxh3_64_intdigest(self.fingerprint + key) for key in self.keys]

    @cached_property
    def _block_seeds(self) -> list[int]:
        return [block_seed(self.fingerprint, self.keys[block.start : block.stop]) for block in self.blocks()]

    @cached_property
    def _block_sums(self) -> list[list[int]]:
        sums: list[list[int]] = self.block_checksums.tolist()
        return sums

    @cached_property
    def verifier(self) -> Any:
        """The header's `native.Verifier`, where there are any."""
        return native.library.Verifier(
            self.fingerprint,
            self.keys.packed,
            self.geometry.component_bytes,
            self.geometry.block_pages,
            self.checksums,
            self.block_checksums,
        )

    def blocks(self) -> list[range]:
        """The slots of each block: all have the same number of them, except the last."""
        pages, most = len(self.keys), self.geometry.block_pages
        return [range(first, min(first + most, pages)) for first in range(0, pages, most)]

    def sum_up(self, layer: int, components: Sequence[np.ndarray]) -> None:
        """Enter the checksums of a layer. ``components`` are the bytes of all pages, each of shape (pages, bytes)."""
        if native.library is not None:
            arrays = [[rows] for rows in components]
            self.verifier.sum_up(layer, arrays, self.checksums[layer], self.block_checksums[layer])
            return
        # `checksum` of all pages at once: with small pages, calls take longer than bytes.
        sums = [(seed + layer) & _MASK for seed in self._page_seeds]
        for rows in components:
            sums = list(map(xxhash.xxh3_64_intdigest, _each(rows), sums))
        self.checksums[layer] = sums
        for number, (seed, block) in enumerate(zip(self._block_seeds, self.blocks(), strict=True)):
            parts = [[rows[block.start : block.stop]] for rows in components]
            self.block_checksums[layer, number] = checksum(seed, layer, parts)

    def wrong_slots(self, layer: int, slot: int, components: Sequence[Sequence[Any]]) -> list[int]:
        """The slots, from ``slot`` on, whose bytes in ``layer`` are not those that were written. Slots that the extent
        does not have are wrong too.

        ``components`` are the bytes found: for each component, consecutive arrays of shape (pages, component bytes).
        """
        wrong: list[int]
        if native.library is not None:
            wrong = self.verifier.wrong_slots(layer, slot, components)
            return wrong
        wrong = []
        pages, size = len(self.keys), self.geometry.block_pages
        rows = [_Rows(arrays) for arrays in components]
        seeds, sums = self._block_seeds, self._block_sums[layer]
        at, end = slot, slot + len(rows[0])
        while at < end:
            block, last = at // size, min((at // size + 1) * size, pages)
            if at % size == 0 and at < last <= end:
                parts = [of_component.part(at - slot, last - slot) for of_component in rows]
                if checksum(seeds[block], layer, parts) == sums[block]:
                    at = last
                    continue
            # Part of a block, or one in which not every page is right.
            parts = [of_component.part(at - slot, at - slot + 1) for of_component in rows]
            if at >= pages or checksum(self._page_seeds[at], layer, parts) != int(self.checksums[layer, at]):
                wrong.append(at)
            at += 1
        return wrong

    def packed(self) -> bytes:
        """The header's msgpack map."""
        fields: dict[str, Any] = {"owner": self.owner} if self.owner else {}
        plane: dict[str, Any] = {"codec": "raw", "components": list(self.geometry.component_bytes)}
        if self.coding is not None:
            lengths = self.coding.lengths.astype("<u4", copy=False).tobytes()
            plane |= {"codec": "lossless", "tables": self.coding.tables.tobytes(), "lengths": lengths}
        if self.rows:
            plane["sector_bytes"] = SECTOR_BYTES
        packed: bytes = msgpack.packb(
            fields
            | {
                "fingerprint": self.fingerprint,
                "page_size": self.geometry.page_size,
                "layers": self.geometry.layers,
                "planes": [plane],
                "keys": self.keys.packed,
                "checksum": "xxh3-64",
                "checksums": self.checksums.astype("<u8", copy=False).tobytes(),
                "block_checksums": self.block_checksums.astype("<u8", copy=False).tobytes(),
            },
            use_bin_type=True,
        )
        return packed

    def encode(self) -> bytes:
        """The first bytes of the file, all but the zeros that pad them to ``layout.data_offset``."""
        packed = self.packed()
        version = _SHIFTED_VERSION if self.layout.shifted else FORMAT_VERSION
        if self.rows:
            version = _ROWS_VERSION
        if self.coding is not None:
            version = _CODED_VERSION
        return PREFIX.pack(MAGIC, version, len(packed), xxhash.xxh3_64_intdigest(packed)) + packed

    @classmethod
    def decode(cls, raw: bytes | memoryview, name: str) -> ExtentHeader:
        """Read a header back. Raises BadExtent, with ``name`` in its message, for anything that this version did not
        write: wrong magic, a damaged header, blobs of the wrong length. Raises UnknownFormat for another version, codec
        or checksum."""
        raw = memoryview(raw)
        if len(raw) < PREFIX.size:
            raise BadExtent(f"{name}: shorter than an extent's prefix")
        magic, version, length, digest = PREFIX.unpack_from(raw)
        if magic != MAGIC:
            raise BadExtent(f"{name}: not an extent file")
        packed = raw[PREFIX.size : PREFIX.size + length]
        if len(packed) != length or xxhash.xxh3_64_intdigest(packed) != digest:
            raise BadExtent(f"{name}: the header is damaged")
        if version not in (FORMAT_VERSION, _SHIFTED_VERSION, _CODED_VERSION, _ROWS_VERSION):
            raise UnknownFormat(f"{name}: format version {version}; this release reads 2 to 5")
        try:
            fields = msgpack.unpackb(packed, raw=False)
            (plane,) = fields["planes"]
            known = "lossless" if version == _CODED_VERSION else "raw"
            if plane["codec"] != known or fields["checksum"] != "xxh3-64":
                raise UnknownFormat(f"{name}: unknown codec {plane['codec']!r} or checksum {fields['checksum']!r}")
            rows = version == _ROWS_VERSION
            if rows and plane["sector_bytes"] != SECTOR_BYTES:
                raise UnknownFormat(f"{name}: sums of sectors of {plane['sector_bytes']!r} bytes")
            geometry = Geometry(fields["layers"], fields["page_size"], tuple(plane["components"]))
            keys = PageKeys(fields["keys"])
            sums, block_sums = (
                np.frombuffer(fields[name], dtype="<u8").reshape(geometry.layers, count)
                for name, count in (("checksums", len(keys)), ("block_checksums", geometry.blocks(len(keys))))
            )
            fingerprint = fields["fingerprint"]
            if not isinstance(fingerprint, bytes) or len(fingerprint) != KEY_BYTES:
                raise ValueError(fingerprint)
            owner = fields.get("owner", "")
            if not isinstance(owner, str) or len(owner.encode()) > MOST_OWNER_BYTES:
                raise ValueError(owner)
            if version == _CODED_VERSION:
                sizes = geometry.component_bytes
                coding = Coding.read(plane["tables"], plane["lengths"], geometry.layers, sizes, len(keys))
                if not coding.known:
                    raise UnknownFormat(f"{name}: pages are coded in a way that this release does not know")
                header = cls(fingerprint, geometry, keys, sums, block_sums, owner, coding)
            else:
                header = cls(fingerprint, geometry, keys, sums, block_sums, owner, rows=rows)
            as_shifted = version >= _CODED_VERSION or (version == _SHIFTED_VERSION) == header.layout.shifted
            if align(PREFIX.size + length) != header.data_offset or not as_shifted:
                raise BadExtent(f"{name}: the header has {length} bytes, which its fields do not add up to")
            return header
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise BadExtent(f"{name}: the header misses or misstates a field: {error!r}") from error


class ExtentDraft:
    """An extent under construction in page-aligned memory: the caller fills `component` for every layer, then hands
    the draft to `PageStore.publish`. The memory is ``buffer``'s and may be reused after that."""

    def __init__(
        self,
        fingerprint: bytes,
        geometry: Geometry,
        keys: Sequence[bytes],
        buffer: Memory,
        owner: str = "",
        *,
        rows: bool = False,
    ):
        if len(fingerprint) != KEY_BYTES:
            raise ValueError(f"fingerprints have {KEY_BYTES} bytes")
        if len(owner.encode()) > MOST_OWNER_BYTES:
            raise ValueError(f"names of owners have {MOST_OWNER_BYTES} bytes at most")
        self.keys = PageKeys.of(keys)
        self.geometry = geometry
        self.fingerprint = fingerprint
        self.owner = owner
        self.layout = ExtentLayout(geometry, len(keys), owner, rows)
        self.n_bytes = self.layout.file_bytes
        if self.n_bytes > len(buffer):
            raise ValueError(f"a draft of {self.n_bytes} bytes does not fit a buffer of {len(buffer)}")
        self._bytes = np.frombuffer(buffer, dtype=np.uint8, count=self.n_bytes)
        self._header = ExtentHeader.blank(fingerprint, geometry, self.keys, owner, rows=rows)
        self._to_sum = set(range(geometry.layers))
        self._sealed: tuple[ExtentHeader, memoryview] | None = None

    def component(self, layer: int, component: int) -> np.ndarray:
        """Where the caller writes all pages' bytes of one component: uint8, shape (pages, component bytes)."""
        start, length = self.layout.component_range(layer, component, 0, len(self.keys))
        return self._bytes[start : start + length].reshape(len(self.keys), self.geometry.component_bytes[component])

    def sum_up(self, layer: int) -> None:
        """Checksum a layer, of which nothing is changed any more: while the next one is filled, and the processor still
        has it."""
        components = range(len(self.geometry.component_bytes))
        self._header.sum_up(layer, [self.component(layer, component) for component in components])
        self._to_sum.discard(layer)

    def seal(self) -> tuple[ExtentHeader, memoryview]:
        """Checksum what has not been yet, and write the header; nothing may be filled after that. Returns the header
        and the whole file's bytes. `PageStore.publish` seals a draft that has not been sealed."""
        if self._sealed is not None:
            return self._sealed
        layers, header = self.geometry.layers, self._header
        for layer in sorted(self._to_sum):
            self.sum_up(layer)
        for layer in range(layers):
            start = self.layout.data_offset + layer * self.layout.slab_bytes
            self._bytes[start + len(self.keys) * self.geometry.layer_bytes : start + self.layout.slab_bytes] = 0
            if header.rows:
                slab = self._bytes[start : start + self.layout.slab_bytes]
                at, length = self.layout.sector_sums(layer, 1)
                self._bytes[at : at + length] = header.sum_up_sectors(layer, slab).view(np.uint8)
        self._bytes[sum(self.layout.sector_sums(0, layers)) : self.n_bytes] = 0
        encoded = header.encode()
        self._bytes[: len(encoded)] = np.frombuffer(encoded, dtype=np.uint8)
        self._bytes[len(encoded) : self.layout.data_offset] = 0
        self._sealed = header, memoryview(self._bytes.data)
        return self._sealed


def _each(rows: np.ndarray) -> Iterable[Any]:
    """Every row by itself. Copying a short one is faster than making a view of it."""
    if rows.shape[1] >= ALIGNMENT:
        return rows
    return chain.from_iterable(struct.iter_unpack(f"{rows.shape[1]}s", rows.data))


class _Rows:
    """Rows of arrays that follow each other."""

    __slots__ = ("_arrays", "_length", "_starts")

    def __init__(self, arrays: Sequence[Any]):
        self._arrays = arrays
        if len(arrays) == 1:
            self._starts, self._length = [0], len(arrays[0])
        else:
            *self._starts, self._length = accumulate((len(array) for array in arrays), initial=0)

    def __len__(self) -> int:
        return self._length

    def part(self, first: int, last: int) -> Sequence[Any]:
        """The arrays of the rows from ``first`` to before ``last``."""
        starts, arrays = self._starts, self._arrays
        if first == 0 and last == self._length:
            return arrays
        if len(arrays) == 1:
            return (arrays[0][first:last],)
        i, end = bisect_right(starts, first) - 1, bisect_left(starts, last)
        if starts[i] == first and (last == self._length if end == len(starts) else starts[end] == last):
            return arrays[i:end]
        found = []
        while i < len(starts) and starts[i] < last:
            array = arrays[i]
            found.append(array[max(0, first - starts[i]) : last - starts[i]])
            i += 1
        return found
