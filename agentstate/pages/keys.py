"""Page keys in one piece of memory, so that a long chain is compared, cut and converted in a few calls."""

from __future__ import annotations

import struct
from binascii import unhexlify
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import overload

KEY_BYTES = 32
_KEY = struct.Struct(f"{KEY_BYTES}s")
_HEX = {2 * KEY_BYTES}


class PageKeys(Sequence[bytes]):
    """A sequence of keys, one after the other in ``packed``. Equal to any sequence of the same keys; parts of it are
    copies. Raises ValueError for bytes that are no whole keys."""

    __slots__ = ("packed",)

    def __init__(self, packed: bytes = b""):
        if len(packed) % KEY_BYTES:
            raise ValueError(f"{len(packed)} bytes of keys are no whole keys of {KEY_BYTES}")
        self.packed = packed

    @classmethod
    def of(cls, keys: Iterable[bytes]) -> PageKeys:
        """Raises ValueError for a key of another length."""
        if isinstance(keys, PageKeys):
            return keys
        keys = list(keys)
        if any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"keys have {KEY_BYTES} bytes")
        return cls(b"".join(keys))

    @classmethod
    def from_hex(cls, texts: Sequence[str]) -> PageKeys:
        """The keys that are written as 64 hexadecimal digits each. Raises ValueError for anything else."""
        if texts and set(map(len, texts)) != _HEX:
            raise ValueError(f"keys are written with {2 * KEY_BYTES} digits")
        return cls(unhexlify("".join(texts)))

    def __len__(self) -> int:
        return len(self.packed) // KEY_BYTES

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> PageKeys: ...

    def __getitem__(self, index: int | slice) -> bytes | PageKeys:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return PageKeys(self.packed[start * KEY_BYTES : max(start, stop) * KEY_BYTES])
            return PageKeys(b"".join(self[at] for at in range(start, stop, step)))
        at = index + len(self) if index < 0 else index
        if not 0 <= at < len(self):
            raise IndexError(f"key {index} of {len(self)}")
        return self.packed[at * KEY_BYTES : (at + 1) * KEY_BYTES]

    def __iter__(self) -> Iterator[bytes]:
        return chain.from_iterable(_KEY.iter_unpack(self.packed))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PageKeys):
            return self.packed == other.packed
        if isinstance(other, list | tuple):
            return len(other) == len(self) and all(mine == key for mine, key in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PageKeys({list(self)})"
